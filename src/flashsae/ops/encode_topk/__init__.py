"""encode_topk: `op.py` is the operation, `reference.py` what it means."""

from flashsae.ops.encode_topk.op import encode_topk as encode_topk
