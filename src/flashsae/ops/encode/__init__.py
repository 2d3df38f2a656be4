"""encode_topk: `op.py` is the operation, `reference.py` what it means."""

from flashsae.ops.encode.op import TwoCodes as TwoCodes
from flashsae.ops.encode.op import encode_topk as encode_topk
from flashsae.ops.encode.op import encode_topk_aux as encode_topk_aux
