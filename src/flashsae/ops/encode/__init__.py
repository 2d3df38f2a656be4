"""Encode: `op.py` and its kin are the operations, `reference.py` what they mean."""

from flashsae.ops.encode.op import encode_topk as encode_topk
from flashsae.ops.encode.op import inference_memory as inference_memory
from flashsae.ops.encode.values import latent_sums as latent_sums
from flashsae.ops.encode.values import per_latent as per_latent
from flashsae.ops.encode.values import pre_acts as pre_acts
from flashsae.ops.encode.varying import Capacity as Capacity
from flashsae.ops.encode.varying import encode_above as encode_above
from flashsae.ops.encode.varying import encode_batch_topk as encode_batch_topk
