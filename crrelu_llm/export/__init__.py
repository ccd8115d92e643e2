"""A patched model for other runtimes, over `transformers.exporters`: written, loaded again, and checked."""
