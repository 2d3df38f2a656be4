"""The 8-bit screen: a product of rounded rows, and what bounds its error."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from flashsae.backend import interprets_kernels
from flashsae.ops.encode import screen_kernels
from flashsae.ops.encode.keys import Keys

LOG_CHANCE = 50.0
"""A bound does not hold with a chance of at most e to the minus this. Why so much: docs/numerics.md#the-int8-screen."""

GROUP = 32
"""Latents whose largest centre is noted."""

MOST_COLUMNS = 1 << 14
"""Of a row, which a program rotates at once: more need more shared memory than any card has."""

SHARED_BYTES = 160 << 10
"""Shared memory that so many columns need; where there is less, as on sm_89, half as many are rounded."""

_BLOCK: int = screen_kernels.BLOCK.value
_OPERAND = tl.float32 if interprets_kernels() else tl.bfloat16  # which the interpreter cannot multiply


@dataclass(frozen=True)
class Rounded:
    """Rows that were rotated and rounded to int8.

    Args:
        rows: [n, D], int8; D is d_in, rounded up to a multiple of 128.
        facts: [6, n] of tokens, [3, n] of latents, float32: what `screen_round_kernel` says.
    """

    rows: Tensor
    facts: Tensor


@dataclass(frozen=True)
class Screened:
    """What bounds keys whose centres are known.

    Args:
        maxima: [rows, groups], int32: key of the largest centre of each `GROUP` latents.
        of_tokens: [3, rows], float32: unit, p and q.
        of_latents: [2, d_sae], float32: unit and unit · square, both times the scale of the latent. A key lies within
            unit of the token · (unit · p + unit · square · q) of its centre, beside what bfloat16 rounds.
        of_groups: [2, groups]: the largest of these in each group.
    """

    maxima: Tensor
    of_tokens: Tensor
    of_latents: Tensor
    of_groups: Tensor


_ALWAYS = ContextVar("always", default=False)


@contextmanager
def always() -> Iterator[None]:
    """Screen what a device has room for, whether it pays or not."""
    token = _ALWAYS.set(True)
    try:
        yield
    finally:
        _ALWAYS.reset(token)


def pays(B: int, n: int, d: int, k: int | None, *, rounds: bool, device: torch.device | None = None) -> bool:
    """Return whether the k largest are found sooner through a screen, on a device that has room for its rows.

    By what was measured on one H100 (LOG.md), in nanoseconds: the product and the pass behind it that are spared,
    against rounding all weights, looking at what is open, and rescoring k latents a token more than without.

    Args:
        B, n, d, k: tokens, latents, columns and latents a token. k is None where what is selected is not known by upper
            bounds alone, as over a batch or above a threshold: bounds on either side leave too much open.
        rounds: whether operands are bfloat16.
        device: where; None for any.
    """
    if padded(d) > _most_columns(device):
        return False
    if _ALWAYS.get():
        return True
    if k is None:
        return False
    spared = B * n * (d * 1.0e-6 + (0.7e-3 if rounds else 2e-3))
    rescored = B * k * d * (8e-4 if rounds else 9e-4)
    return spared > rescored + B * 70 + n * d * 1e-3 + 1e5


def _most_columns(device: torch.device | None) -> int:
    if device is None or device.type != "cuda":
        return MOST_COLUMNS
    shared = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)
    return MOST_COLUMNS if shared >= SHARED_BYTES else MOST_COLUMNS // 2


def padded(d: int) -> int:
    """Return the columns of rounded rows."""
    return int(triton.cdiv(d, _BLOCK) * _BLOCK)


def typical_square(D: int) -> float:
    """Return about what the squared norm of a rounded row is, whose largest number is 127.

    Bounds hold whatever it is, as long as it depends on nothing random.
    """
    return D * 127.0**2 / 14


def slack(D: int) -> float:
    """Return what float32 arithmetic may change of a product, relative to the norms of its rows.

    A tensor core adds at least 8 products at a time and loses less than 2**-21 of the largest sum each time, so the
    rotation of a row is off by less than √128 · 16 · 2**-21 of its norm; two bfloat16 numbers by 2**-17 of a float32
    one. The dot product that is compared with is off by no more than (D / 128 + 32) · 2**-23.
    """
    rotation = math.sqrt(_BLOCK) * _BLOCK / 8 * 2.0**-21 + 2.0**-16
    return 2.1 * rotation + (D / 128 + 32) * 2.0**-23


def shift_of(D: int) -> float:
    """Return the power of two that takes products to float16."""
    return math.ldexp(1.0, -math.ceil(math.log2(127.0**2 * D / 32768)))


def rounded(matrix: Tensor, noise: Tensor | None, *, is_token: bool, first: int = 0) -> Rounded:
    """Rotate and round the rows of a matrix.

    Args:
        matrix: [n, d], bfloat16 or float32, packed.
        noise: scalar, int64: the seed of the noise; None is 0.
        is_token: whether rows are tokens, or those of weights.
        first: number of the first row, where these are some of a matrix.
    """
    (n, d), device = matrix.shape, matrix.device
    D = padded(d)
    result = Rounded(
        torch.empty(n, D, dtype=torch.int8, device=device),
        torch.empty(6 if is_token else 3, n, dtype=torch.float32, device=device),
    )
    blocks = D // _BLOCK
    wide = int(triton.next_power_of_2(blocks))
    at_once = max(1, 64 // wide)
    screen_kernels.screen_round_kernel[(min(triton.cdiv(n, at_once), 4 * _processors(device)),)](
        matrix, result.rows, result.facts, noise, n, d, blocks, matrix.stride(0), first,
        LOG_CHANCE, typical_square(D), slack(D), math.sqrt(D) * 2.0**-16, shift_of(D),
        IS_TOKEN=is_token, ROWS=at_once, BLOCKS=wide, OPERAND=_OPERAND, num_warps=max(4, wide // 16),
    )  # fmt: skip
    return result


def products(x: Rounded, W: Rounded, out: Tensor) -> None:
    """Multiply rounded rows.

    Args:
        x: tokens.
        W: latents.
        out: [rows, d_sae], float16, rows some 16 bytes apart; receives products as `_bounds` of the encoder takes them.
    """
    _multiply(x, W, out, None, None)


def centres(x: Rounded, W: Rounded, keys: Keys, out: Tensor, maxima: Tensor) -> None:
    """Multiply rounded rows, and tell what the keys are about.

    Args:
        x: tokens.
        W: latents.
        keys: what these latents are selected by, packed.
        out: [rows, d_sae], bfloat16, rows some 16 bytes apart; receives the centres.
        maxima: [rows, groups], int32; receives the largest of each group.
    """
    _multiply(x, W, out.view(torch.int16), keys, maxima)


def errors_of(facts: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the facts of latents and of groups that `Screened` has, from those of rounded rows of weights."""
    latents = facts[1:]
    if scale is not None:
        latents, least = latents * scale, torch.finfo(torch.float32).tiny
        latents = torch.where(
            (latents < least) & (scale > 0), least, latents
        )  # what vanishes bounds an error all the same
    more = -latents.shape[1] % GROUP
    return latents, F.pad(latents, (0, more)).view(2, -1, GROUP).amax(2)


def _multiply(x: Rounded, W: Rounded, out: Tensor, keys: Keys | None, maxima: Tensor | None) -> None:
    (rows, D), n = x.rows.shape, len(W.rows)
    tile = _tile_of(rows)
    tiles = triton.cdiv(rows, tile["BLOCK_M"]) * triton.cdiv(n, tile["BLOCK_N"])
    left = TensorDescriptor.from_tensor(x.rows, [tile["BLOCK_M"], tile["BLOCK_K"]])
    right = TensorDescriptor.from_tensor(W.rows, [tile["BLOCK_N"], tile["BLOCK_K"]])
    to = TensorDescriptor(out, [rows, n], [out.stride(0), 1], [tile["BLOCK_M"], tile["BLOCK_N"]])
    screen_kernels.screen_product_kernel[(min(tiles, _processors(out.device)),)](
        left, right, to, maxima, x.facts, W.facts, None if keys is None else keys.b_enc,
        None if keys is None else keys.scale, rows, n, D, x.facts.stride(0),
        0 if maxima is None else maxima.stride(0), shift_of(D),
        MAGNITUDE=keys is not None and keys.magnitude, GROUP=GROUP, **tile,
    )  # fmt: skip


def _tile_of(rows: int) -> dict[str, int]:
    """Return the tile of a product, as measured (LOG.md)."""
    if rows <= 64:
        return {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 128, "STAGES": 4, "num_warps": 4}
    return {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 128, "STAGES": 3, "num_warps": 8}


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
