"""Exact sparse-aware operations on tensors, with autograd. They know nothing of models or training loops."""

from flashsae.ops.decode_sparse import decode_sparse
from flashsae.ops.encode_topk import encode_topk
from flashsae.ops.index import LatentIndex, build_index
from flashsae.ops.latent_rows import latent_rows

__all__ = ["LatentIndex", "build_index", "decode_sparse", "encode_topk", "latent_rows"]
