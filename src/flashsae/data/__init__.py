"""Activations: sources, text, language models, the cache on disk, shuffling."""
