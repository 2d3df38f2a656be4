"""Measuring a whole training step: ours by stage, beside dense PyTorch and other libraries. See `flashsae bench`."""
