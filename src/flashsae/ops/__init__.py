"""Exact sparse-aware operations on tensors, with autograd. They know nothing of models or training loops."""

from flashsae.ops.code import SparseCode
from flashsae.ops.decode import DecodeLoss, decode, decode_loss
from flashsae.ops.encode import (
    Capacity,
    encode_above,
    encode_batch_topk,
    encode_topk,
    inference_memory,
    latent_sums,
    per_latent,
    pre_acts,
)
from flashsae.ops.factored import FactoredGradient
from flashsae.ops.gradients import Collection, collect_factors, materialize, take_rows
from flashsae.ops.latent_rows import latent_rows
from flashsae.ops.linear import linear
from flashsae.ops.norms import block_norms
from flashsae.ops.order import by_value
from flashsae.ops.pattern import LatentIndex, Pattern

__all__ = [
    "Capacity",
    "Collection",
    "DecodeLoss",
    "FactoredGradient",
    "LatentIndex",
    "Pattern",
    "SparseCode",
    "block_norms",
    "by_value",
    "collect_factors",
    "decode",
    "decode_loss",
    "encode_above",
    "encode_batch_topk",
    "encode_topk",
    "inference_memory",
    "latent_rows",
    "latent_sums",
    "linear",
    "materialize",
    "per_latent",
    "pre_acts",
    "take_rows",
]
