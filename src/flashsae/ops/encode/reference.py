"""Encode and select, in plain PyTorch, a bounded number of rows at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from flashsae.ops.encode.keys import Keys
from flashsae.ops.validate import compute_dtype
from flashsae.shapes import Activations, InputBias, LatentActs, TopActs, TopIndices, Weights

WORKSPACE_BYTES = 512 << 20
_GROUP = 8
_PASSES = 3  # pre-activations, and at worst two more of their size while ties are settled


def encode_topk(
    x: Activations,
    W_enc_T: Weights,
    keys: Keys,
    k: int,
    workspace_bytes: int,
) -> tuple[TopActs, TopIndices]:
    """Return the k of each row of x @ W_enc_T.T + b_enc that have the largest keys, and their indices: [B, k] both."""
    dtype = compute_dtype(x.dtype, W_enc_T.dtype)
    weights, bias = W_enc_T.to(dtype), keys.b_enc.to(dtype)
    indices = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    acts = torch.empty(len(x), k, dtype=dtype, device=x.device)
    step = max(1, workspace_bytes // (_PASSES * len(weights) * dtype.itemsize))
    for start in range(0, len(x), step):
        part = slice(start, start + step)
        pre_acts = F.linear(x[part].to(dtype), weights, bias)
        indices[part] = select_topk(keys.of(pre_acts), k)
        acts[part] = pre_acts.gather(1, indices[part])
    return acts, indices


def center(x: Activations, b_dec: InputBias | None) -> Activations:
    """Return x - b_dec in the compute dtype: [B, d_in]."""
    dtype = compute_dtype(x.dtype)
    return x.to(dtype) if b_dec is None else x.to(dtype) - b_dec.to(dtype)


def select_topk(pre_acts: LatentActs, k: int) -> TopIndices:
    """Return the indices of the k largest of each row, ascending; of equal values the lowest index wins: [B, k]."""
    n = pre_acts.shape[1]
    # one more than asked for: if it equals the k-th, the choice between them is ours to make, not topk's
    values, indices = _largest(pre_acts, min(k + 1, n))
    indices = indices[:, :k].clone()
    if k < n:
        kth, next_one = values[:, k - 1], values[:, k]
        tied = ((kth == next_one) | next_one.isnan()).nonzero()[:, 0]  # topk ranks NaN first: the k-th is one, too
        if len(tied):
            indices[tied] = _lowest_of_ties(pre_acts[tied], values[tied, k - 1 : k], k)
    return indices.sort(dim=1).values


def _largest(keys: LatentActs, m: int) -> tuple[TopActs, TopIndices]:
    """Do keys.topk(m, dim=1), by way of the maxima of groups of columns where a row is long: they are soon found.

    The m groups with the largest maxima hold the m largest keys: one outside is no larger than the m maxima inside.
    """
    width = keys.shape[1] // _GROUP  # column j is in group j % width; what is left over is in none
    if width < 2 * m:
        return keys.topk(m, dim=1)
    grouped = keys[:, : _GROUP * width]
    rest = torch.arange(_GROUP * width, keys.shape[1], dtype=torch.int64, device=keys.device)
    groups = grouped.view(len(keys), _GROUP, width).amax(1).topk(m, dim=1, sorted=False).indices
    members = groups[:, None] + width * torch.arange(_GROUP, dtype=torch.int64, device=keys.device)[:, None]
    columns = torch.cat([members.flatten(1), rest.expand(len(keys), -1)], dim=1)
    values, chosen = keys.gather(1, columns).topk(m, dim=1)
    return values, columns.gather(1, chosen)


def _lowest_of_ties(pre_acts: LatentActs, kth: Float[Tensor, "B 1"], k: int) -> TopIndices:
    is_nan, nan_is_kth = pre_acts.isnan(), kth.isnan()
    above = torch.where(nan_is_kth, False, (pre_acts > kth) | is_nan)
    equal = torch.where(nan_is_kth, is_nan, pre_acts == kth)
    room = k - above.sum(1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(1, dtype=torch.int32) <= room))
    return chosen.nonzero()[:, 1].view(len(pre_acts), k)
