"""Select over a batch, in plain PyTorch, a bounded number of rows at a time.

What is selected is flat, in order of token and then of latent; token t owns starts[t]:starts[t + 1].
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from flashsae import distributed
from flashsae.ops.encode.keys import Keys
from flashsae.ops.validate import compute_dtype
from flashsae.shapes import Activations, LatentActs, LatentBias, Weights

Latents = Int[Tensor, " nnz"]
Starts = Int[Tensor, " B+1"]
Values = Float[Tensor, " nnz"]

_PASSES = 8  # pre-activations, keys, and at worst, where all are equal, a sort of all of them
_GROUPS = (32, 16, 8, 4, 2)


def batch_topk(
    x: Activations,
    W_enc_T: Weights,
    keys: Keys,
    k: int,
    workspace_bytes: int,
) -> tuple[Latents, Starts, Values]:
    """Return latents, starts and values of the B·k of x @ W_enc_T.T + b_enc with the largest keys, of any sign.

    Of equal ones the first token wins, then the lowest latent; NaN is the largest. What is below the B·k largest of the
    rows so far is dropped at once.
    """
    B, n = len(x), len(W_enc_T)
    wanted, dtype = B * k, compute_dtype(x.dtype, W_enc_T.dtype)
    places = torch.empty(0, dtype=torch.int64, device=x.device)
    values, best_keys = places.to(dtype), places.to(dtype)
    for first, pre_acts in _parts(x, W_enc_T, keys.b_enc, workspace_bytes):
        part_keys = keys.of(pre_acts)
        if len(best_keys) == wanted:
            # equal to the least of those means behind it in order
            chosen = _exceeds(part_keys, best_keys.sort(descending=True).values[-1])
        else:
            chosen = _may_be_largest(part_keys, wanted)
        new = chosen.flatten().nonzero()[:, 0]
        places, values = torch.cat([places, first * n + new]), torch.cat([values, pre_acts.flatten()[new]])
        best_keys = torch.cat([best_keys, part_keys.flatten()[new]])
        if len(best_keys) > wanted:
            best = distributed.largest(best_keys, wanted)
            places, values, best_keys = places[best], values[best], best_keys[best]
    return (places % n).int(), _starts(places // n, B), values


def above(
    x: Activations,
    W_enc_T: Weights,
    b_enc: LatentBias,
    threshold: Float[Tensor, " thresholds"],
    capacity: int | None,
    workspace_bytes: int,
    limit: int | None = None,
) -> tuple[Int[Tensor, " places"], Int[Tensor, " starts"], Values, Int[Tensor, ""]]:
    """Return latents, starts, values and count of all of x @ W_enc_T.T + b_enc that exceed the threshold.

    Args:
        threshold: [d_sae] or [1]. NaN, on either side, counts as exceeding.
        capacity: how many places the result has: the first in order are kept, those left over hold d_sae and 0. None:
            as many as are wanted.
        limit: where more than so many are wanted, all values are returned, flat, without latents and starts.
    """
    B, n, dtype = len(x), len(W_enc_T), compute_dtype(x.dtype, W_enc_T.dtype)
    places = torch.empty(0, dtype=torch.int64, device=x.device)
    values, counts = places.to(dtype), torch.zeros(B, dtype=torch.int64, device=x.device)
    for first, pre_acts in _parts(x, W_enc_T, b_enc, workspace_bytes):
        chosen = ~(pre_acts <= threshold.to(dtype))
        counts[first : first + len(chosen)] = chosen.sum(1)
        if limit is not None and int(counts.sum()) > limit:
            every = pre_acts if len(pre_acts) == B else F.linear(x.to(dtype), W_enc_T.to(dtype), b_enc.to(dtype))
            latents, starts = (torch.empty(0, dtype=torch.int32, device=x.device) for _ in range(2))
            return latents, starts, every.flatten(), counts.sum()
        new = chosen.flatten().nonzero()[:, 0]
        if capacity is not None:
            new = new[: capacity - len(places)]
        places, values = torch.cat([places, first * n + new]), torch.cat([values, pre_acts.flatten()[new]])
    room = len(places) if capacity is None else capacity
    unused = room - len(places)
    return (
        F.pad((places % n).int(), (0, unused), value=n),
        F.pad(counts.cumsum(0), (1, 0)).clamp(max=room).int(),
        F.pad(values, (0, unused)),
        counts.sum(),
    )


def _parts(
    x: Activations, W_enc_T: Weights, b_enc: LatentBias, workspace_bytes: int
) -> Iterator[tuple[int, LatentActs]]:
    """Yield the pre-activations of some rows after others, and the first of these rows."""
    dtype = compute_dtype(x.dtype, W_enc_T.dtype)
    weights, bias = W_enc_T.to(dtype), b_enc.to(dtype)
    step = max(1, workspace_bytes // (_PASSES * len(weights) * dtype.itemsize))
    for start in range(0, len(x), step):
        yield start, F.linear(x[start : start + step].to(dtype), weights, bias)


def _exceeds(keys: LatentActs, least: Float[Tensor, ""]) -> Tensor:
    return (keys > least) | (keys.isnan() & ~least.isnan())


def _may_be_largest(keys: LatentActs, m: int) -> Tensor:
    """Return which keys may be among the m largest: those that reach the m-th largest of the maxima of groups."""
    if keys.numel() <= m:
        return torch.ones_like(keys, dtype=torch.bool)
    group = next((group for group in _GROUPS if len(keys) * (keys.shape[1] // group) >= 2 * m), 1)
    width = keys.shape[1] // group
    maxima = keys[:, : group * width].view(len(keys), group, width).amax(1)
    bound = maxima.flatten().topk(m).values[-1]
    return (keys >= bound) | keys.isnan()


def _starts(tokens: Int[Tensor, " nnz"], B: int) -> Int[Tensor, " starts"]:
    return F.pad(torch.bincount(tokens, minlength=B).cumsum(0), (1, 0)).int()
