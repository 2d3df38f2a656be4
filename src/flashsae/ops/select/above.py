"""Allocate and launch the selection of all above a threshold."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from flashsae.errors import ShapeError
from flashsae.ops.dense import op as dense
from flashsae.ops.encode.keys import Keys
from flashsae.ops.encode.product import Memory, Part
from flashsae.ops.select import above_kernels
from flashsae.ops.select.operands import Operands, bounds_of, rescore
from flashsae.ops.validate import packed

LARGEST = 2**31 - 1
"""Entries that starts can count."""


@dataclass(frozen=True)
class _Selection:
    """What is selected by, and where what was selected is noted.

    Args:
        operands: what is multiplied.
        threshold: [d_sae] or [1], float32.
        capacity: places that starts may name.
        words: words of 32 bits a token.
        chunk: words of a program.
        starts: [B + 1], int32.
        total: [1], int64: how many so far.
    """

    operands: Operands
    threshold: Tensor
    capacity: int
    words: int
    chunk: int
    starts: Tensor
    total: Tensor

    @property
    def chunks(self) -> int:
        """Programs a token."""
        return int(triton.cdiv(self.words, self.chunk))

    @property
    def by(self) -> tuple[Tensor, int]:
        """Return the threshold as kernels read it: with its stride."""
        return self.threshold, int(len(self.threshold) > 1)


@dataclass(frozen=True)
class _Entries:
    """Places for entries: latents [capacity], int32, tokens [capacity], int32, if certified, and values [capacity]."""

    latents: Tensor
    tokens: Tensor | None
    values: Tensor

    @classmethod
    def of(cls, capacity: int, operands: Operands) -> _Entries:
        """Return unused places."""
        device = operands.x.device
        return cls(
            torch.full((capacity,), len(operands.W), dtype=torch.int32, device=device),
            torch.empty(capacity, dtype=torch.int32, device=device) if operands.certified else None,
            torch.zeros(capacity, dtype=torch.float32, device=device),
        )


def above(
    centred: Tensor,
    W_enc_T: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    capacity: int | None,
    precision: str,
    memory: Memory,
    limit: int | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return latents, int32, starts [B + 1], int32, values, float32, and count, int64, as the reference does.

    Args:
        centred: [B, d_in].
        threshold: [d_sae] or [1].
        capacity: how many places there are, without a wait for the device; None: as many as are wanted, one wait a
            part.
        precision: of the product.
        memory: bounds of what exists at once.
        limit: as in the reference; only without a capacity.
        noise: as of `launch_encode_topk`.
    Raises:
        ShapeError: capacity is None, and 2**31 entries or more are wanted.
    """
    operands = Operands.of(centred, W_enc_T, Keys(b_enc), precision, memory, noise)
    B, device, words = len(centred), centred.device, triton.cdiv(len(W_enc_T), above_kernels.BITS.value)
    selection = _Selection(
        operands, packed(threshold.float()), LARGEST if capacity is None else capacity, words,
        min(1024, triton.next_power_of_2(words)), torch.zeros(B + 1, dtype=torch.int32, device=device),
        torch.zeros(1, dtype=torch.int64, device=device),
    )  # fmt: skip
    entries, base, pieces = _Entries.of(capacity or 0, operands), 0, []
    for part in operands.product.parts() if B else ():
        marks, places = _mark(selection, part)
        if capacity is None:
            total = int(selection.total)  # the one wait: how much memory
            if limit is not None and total > limit:
                latents, starts = (torch.empty(0, dtype=torch.int32, device=device) for _ in range(2))
                every = dense.pre_acts(centred, W_enc_T, b_enc, precision).flatten()
                return latents, starts, every, selection.total[0]
            if total > LARGEST:
                raise ShapeError(
                    f"threshold: expected fewer than 2**31 entries above it, got {total}: use fewer tokens."
                )
            entries = _Entries.of(total - base, operands)
            pieces.append(entries)
        _write(selection, part, (marks, places, base), entries)
        base = base if capacity is not None else total
    if pieces:
        joined = zip(*((piece.latents, piece.tokens, piece.values) for piece in pieces))
        entries = _Entries(*(None if each[0] is None else torch.cat(each) for each in joined))  # type: ignore[arg-type]
    if operands.certified:
        rescore(operands, (entries.latents, entries.tokens, selection.total), entries.values)
    return entries.latents, selection.starts, entries.values, selection.total[0]


def _mark(selection: _Selection, part: Part) -> tuple[Tensor, Tensor]:
    """Return a bit for each pre-activation of these rows, and the place of what each chunk selects."""
    products = part.products
    operands, rows, words, chunks = selection.operands, len(products), selection.words, selection.chunks
    n, device, certified = len(operands.W), products.device, selection.operands.certified
    marks = torch.empty(rows, words, dtype=torch.int32, device=device)
    sure = torch.empty_like(marks) if certified else None
    counts = torch.zeros(rows, chunks, dtype=torch.int32, device=device)
    block_g, block_b = min(64, selection.chunk), 16
    above_kernels.select_above_kernel[(triton.cdiv(words, block_g), triton.cdiv(rows, block_b))](
        products, operands.b_enc, *bounds_of(part), *selection.by, marks, sure, counts,
        rows, n, words, chunks, products.stride(0),
        CHUNK=selection.chunk, BLOCK_G=block_g, BLOCK_B=block_b, STAGES=1 if certified else 3,
        num_warps=8 if certified else 4,
    )  # fmt: skip
    if certified:
        x, W = operands.x[part.tokens], operands.W
        above_kernels.select_decide_kernel[(rows, chunks)](
            x, W, operands.b_enc, *selection.by, marks, sure, torch.empty_like(marks),
            torch.empty(rows, chunks, above_kernels.TILE.value, dtype=torch.int32, device=device), counts,
            words, chunks, x.shape[1], x.stride(0), W.stride(0),
            CHUNK=selection.chunk, BLOCK_D=min(128, triton.next_power_of_2(x.shape[1])), num_warps=4,
        )  # fmt: skip
    places = torch.empty(rows, chunks, dtype=torch.int64, device=device)
    above_kernels.select_places_kernel[(1,)](
        counts, places, selection.total, selection.starts[part.tokens.start :], rows * chunks, chunks,
        selection.capacity, BLOCK=min(8192, max(32, triton.next_power_of_2(rows * chunks))), num_warps=8,
    )  # fmt: skip
    return marks, places


def _write(selection: _Selection, part: Part, marked: tuple[Tensor, Tensor, int], entries: _Entries) -> None:
    """Write entries of these rows; `marked`: bits, places, and the place that the first of `entries` has."""
    marks, places, base = marked
    operands, products = selection.operands, part.products
    if len(entries.latents):
        above_kernels.select_above_write_kernel[(len(products), selection.chunks)](
            None if operands.certified else products, operands.b_enc, marks, torch.empty_like(marks), places,
            entries.latents, entries.tokens, entries.values, part.tokens.start, base, len(entries.latents),
            len(operands.W), selection.words, selection.chunks, products.stride(0),
            CHUNK=selection.chunk, num_warps=4,
        )  # fmt: skip
