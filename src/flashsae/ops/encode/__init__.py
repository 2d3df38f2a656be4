"""Encode: `op.py` are the operations, `reference.py` what they mean."""

from flashsae.ops.encode.op import encode_topk as encode_topk
from flashsae.ops.encode.op import per_latent as per_latent
from flashsae.ops.encode.op import pre_acts as pre_acts
