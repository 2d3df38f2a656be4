"""Checkpoints and the formats of others."""
