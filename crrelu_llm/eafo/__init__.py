"""Entropy-based Activation Function Optimization (arXiv 2405.12954): see the README.md beside this file."""
