"""Segment sums over the index, in plain PyTorch: a sparse matrix times a dense one is an embedding bag."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flashsae.ops.pattern import LatentIndex
from flashsae.ops.validate import compute_dtype
from flashsae.shapes import Activations, CodeActs, InputBias, LatentBias, Weights

RUN = 128
"""Entries summed in one go. Longer runs are cut and their sums added in order: short sums round less."""


def latent_rows(index: LatentIndex, coeffs: CodeActs, rows: Activations) -> Weights:
    """Sum coeffs * rows over the entries of each latent: [B, k] or [capacity], [B, d] -> [d_sae, d], compute dtype."""
    dtype = compute_dtype(coeffs.dtype, rows.dtype)
    entries, tokens = index.entries, index.entry_tokens.long()
    if index.k is None:  # places that are not used stand behind all others
        used = int(index.offsets[-1])
        entries, tokens = entries[:used], tokens[:used]
    weights = coeffs.to(dtype).flatten()[entries]
    pieces = (index.offsets.diff() + RUN - 1) // RUN  # of each latent
    first_piece = F.pad(pieces.cumsum(0), (1, 0))
    n_pieces = int(first_piece[-1])
    latent = torch.repeat_interleave(pieces, output_size=n_pieces)
    number = torch.arange(n_pieces, dtype=torch.int64, device=rows.device) - first_piece[latent]
    starts = index.offsets[latent] + RUN * number
    sums = _bags(tokens, rows.to(dtype), starts, weights)
    ones = torch.ones(n_pieces, dtype=dtype, device=rows.device)
    return _bags(torch.arange(n_pieces, dtype=torch.int64, device=rows.device), sums, first_piece[:-1], ones)


def latent_sums(index: LatentIndex, coeffs: CodeActs) -> LatentBias:
    """Sum coeffs over the entries of each latent: [B, k] or [capacity] -> [d_sae], in the compute dtype."""
    if index.tokens is not None:
        index = index._replace(tokens=torch.zeros_like(index.tokens))  # one row of ones serves all
    rows = coeffs.new_ones(1 if index.k is None else coeffs.shape[0], 1)
    return latent_rows(index, coeffs, rows)[:, 0]


def column_sums(coeffs: Tensor, rows: Activations) -> InputBias:
    """Sum coeffs * rows over all rows, [B], [B, d] -> [d]: the case of one latent that every token uses."""
    tokens = torch.arange(rows.shape[0], dtype=torch.int64, device=rows.device)
    offsets = torch.arange(2, dtype=torch.int32, device=rows.device) * rows.shape[0]
    index = LatentIndex(tokens, torch.zeros_like(tokens, dtype=torch.int32), offsets, 1)
    return latent_rows(index, coeffs[:, None], rows)[0]


def _bags(members: Tensor, rows: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """Sum weighted rows of each bag; bag i begins at starts[i] and ends where the next one begins."""
    if len(members) == 0:
        return rows.new_zeros(len(starts), rows.shape[1])
    return F.embedding_bag(members, rows, starts, mode="sum", per_sample_weights=weights)
