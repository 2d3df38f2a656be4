"""The Triton kernel that writes sparse codes densely, a row in one program."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dense_code_kernel(
    acts_ptr,  # [B, k]
    indices_ptr,  # [B, k]
    out_ptr,  # [B, n]
    mark_ptr,  # the same memory as integers of the same width
    k,
    n,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Fill a row with zeros and write its code; repeated latents get the sum, added up in float32 in order.

    Whether a latent is repeated shows when entries write their places where their values will go: of those with one
    latent only one finds its own again.
    """
    row = tl.program_id(0).to(tl.int64)
    for start in range(0, n, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        tl.store(mark_ptr + row * n + column, tl.zeros([BLOCK_N], mark_ptr.dtype.element_ty), mask=column < n)
    place = tl.arange(0, BLOCK_K)
    inside = place < k
    latent = tl.load(indices_ptr + row * k + place, mask=inside, other=0)
    acts = tl.load(acts_ptr + row * k + place, mask=inside, other=0.0).to(tl.float32)
    tl.debug_barrier()  # zeros were written by other threads
    tl.store(mark_ptr + row * n + latent, place.to(mark_ptr.dtype.element_ty), mask=inside)
    tl.debug_barrier()
    found = tl.load(mark_ptr + row * n + latent, mask=inside, other=0).to(tl.int32)
    tl.debug_barrier()  # all have looked before anything is written
    if tl.sum(((found != place) & inside).to(tl.int32)) > 0:
        total = tl.zeros([BLOCK_K], tl.float32)
        for other in range(0, k):
            same = latent == tl.load(indices_ptr + row * k + other)
            total += tl.where(same, tl.load(acts_ptr + row * k + other).to(tl.float32), 0.0)
        acts = total
    tl.store(out_ptr + row * n + latent, acts.to(out_ptr.dtype.element_ty), mask=inside)
