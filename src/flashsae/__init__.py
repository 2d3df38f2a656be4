"""FlashSAE: exact, sparse-aware training of sparse autoencoders."""
