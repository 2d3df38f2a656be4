"""The selections over a batch on a GPU, with the arguments that the reference has, and the precision of the product."""

from __future__ import annotations

from flashsae.ops.select.above import above as above
from flashsae.ops.select.batch import batch_topk as batch_topk
