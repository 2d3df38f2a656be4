"""What the device can do at most: copy, gather from its cache, and multiply matrices of this size."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flashsae.bench.setups import Shape
from flashsae.bench.timing import float32_products, free, time_runs

GEMM_OUT_BYTES = 2**31
GEMM_DTYPES = {
    "bf16": torch.bfloat16, "tf32": torch.float32, "float32": torch.float16,
    "bf16-int8": torch.int8, "float32-int8": torch.int8,
}  # fmt: skip
"""Of the product in encode_topk."""


@dataclass(frozen=True)
class Ceilings:
    """Rates measured on the device.

    Args:
        copy_gbs: bytes read and written by a copy of 1 GB, GB/s.
        gather_gbs: bytes gathered from the second-level cache, GB/s; None without Triton.
        gemm_tflops: of PyTorch's dense product at the size of the encode, TFLOP/s.
        gemm_dtype: of its operands: what the encode multiplies in.
    """

    copy_gbs: float
    gather_gbs: float | None
    gemm_tflops: float
    gemm_dtype: str


def copy_run(device: torch.device) -> tuple[Callable[[int], object], float]:
    """Return a device copy and the bytes that it moves."""
    size = 2**30 if device.type == "cuda" else 2**20
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    return lambda i: target.copy_(source), 2.0 * size


def gather_run(device: torch.device) -> tuple[Callable[[int], object], float] | None:
    """Return a gather of rows from the second-level cache and the bytes that it moves; None where Triton cannot run."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    from flashsae.bench.gather import gather_problem, gather_sum

    table, indices, out = gather_problem(device)
    moved = float(indices.numel() * table.shape[1] * table.element_size())
    return lambda i: gather_sum(table, indices, out), moved


def gemm_run(x: Tensor, W_enc_T: Tensor) -> tuple[Callable[[int], object], float]:
    """Return the encode as PyTorch's dense product alone, in row chunks where the result is large, and its FLOP."""
    (d_sae, d_in), tokens = W_enc_T.shape, len(x)
    rows = max(1, min(tokens, GEMM_OUT_BYTES // (d_sae * x.element_size())))
    out = torch.empty(rows, d_sae, dtype=x.dtype, device=x.device)

    def run(i: int) -> None:
        for chunk in torch.split(x, rows):
            torch.mm(chunk, W_enc_T.T, out=out[: len(chunk)])

    return run, 2.0 * tokens * d_in * d_sae


def int8_gemm_run(x: Tensor, W_enc_T: Tensor) -> tuple[Callable[[int], object], float]:
    """Return the same of integers of 8 bits, whose sums are of 32.

    The library wants more than 16 rows at a time, and multiples of 8: what is added to reach them is not counted.
    """
    (d_sae, d_in), tokens = W_enc_T.shape, len(x)
    d_pad, n_pad = -d_in % 8, -d_sae % 8
    parts = -(-tokens * (d_sae + n_pad) * 4 // GEMM_OUT_BYTES)
    rows = max(32, -(-tokens // parts))
    x, W = F.pad(x, (0, d_pad, 0, -tokens % rows)), F.pad(W_enc_T, (0, d_pad, 0, n_pad))
    out = torch.empty(rows, len(W), dtype=torch.int32, device=x.device)

    def run(i: int) -> None:
        for chunk in torch.split(x, rows):
            torch._int_mm(chunk, W.T, out=out)

    return run, 2.0 * tokens * d_in * d_sae


def measure_ceilings(shape: Shape, precision: str, device: torch.device, seconds: float) -> Ceilings:
    """Measure all of them, one after another."""

    def rate(made: tuple[Callable[[int], object], float] | None, unit: float) -> float | None:
        if made is None:
            return None
        (timing,) = time_runs([made[0]], device, seconds)
        return made[1] / timing.median_ms / unit

    copy, gather = rate(copy_run(device), 1e6), rate(gather_run(device), 1e6)
    free(device)
    dtype = GEMM_DTYPES[precision]
    x, W_enc_T = (_random((size, shape.d_in), dtype, device) for size in (shape.batch_tokens, shape.d_sae))
    with float32_products("tf32" if precision == "tf32" else None):
        gemm = rate((int8_gemm_run if dtype == torch.int8 else gemm_run)(x, W_enc_T), 1e9)
    assert copy is not None
    assert gemm is not None
    del x, W_enc_T
    free(device)
    return Ceilings(copy, gather, gemm, str(dtype).removeprefix("torch."))


def _random(size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    if dtype == torch.int8:
        return torch.randint(-127, 128, size, dtype=dtype, device=device)
    return torch.randn(size, dtype=dtype, device=device)
