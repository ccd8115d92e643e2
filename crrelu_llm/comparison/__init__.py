"""Comparing arms: the run matrix, paired statistics and the report."""
