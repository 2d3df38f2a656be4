"""Sparse decode: `op.py` is the operation, `reference.py` what it means."""

from flashsae.ops.decode.op import DecodeLoss as DecodeLoss
from flashsae.ops.decode.op import decode as decode
from flashsae.ops.decode.op import decode_loss as decode_loss
