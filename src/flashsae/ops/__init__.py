"""Exact sparse-aware operations on tensors, with autograd. They know nothing of models or training loops."""

from flashsae.ops.decode import DecodeLoss, decode_loss, decode_sparse
from flashsae.ops.encode import TwoCodes, encode_topk, encode_topk_aux
from flashsae.ops.factored import FactoredGradient
from flashsae.ops.gradients import Collection, collect_factors, materialize, take_rows
from flashsae.ops.index import LatentIndex, build_index
from flashsae.ops.latent_rows import latent_rows

__all__ = [
    "Collection",
    "DecodeLoss",
    "FactoredGradient",
    "LatentIndex",
    "TwoCodes",
    "build_index",
    "collect_factors",
    "decode_loss",
    "decode_sparse",
    "encode_topk",
    "encode_topk_aux",
    "latent_rows",
    "materialize",
    "take_rows",
]
