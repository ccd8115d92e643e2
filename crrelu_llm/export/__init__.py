"""Exports a patched model to other runtimes with `transformers.exporters`, reloads the export and checks it."""
