"""Compile every kernel variant ahead of time for a target, without a device: `python compile_kernels.py cuda 90 32`.

The CPU interpreter accepts what the compiler rejects, so both are tested. Run on its own, because kernels are decorated
for the interpreter or for the compiler when they are imported. What to compile is what the library launches: launches
are recorded instead of run, so this list needs no care when their parameters change.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from flashsae.ops import Pattern
from flashsae.ops.adam_rows import AdamRule
from flashsae.ops.adam_rows.launch import launch_adam_rows, launch_row_squares
from flashsae.ops.decode.launch import (
    launch_decode,
    launch_decode_levels,
    launch_decode_loss,
    launch_dots,
    launch_residual,
)
from flashsae.ops.dense.launch import launch_dense_code
from flashsae.ops.encode import screen
from flashsae.ops.encode.keys import Keys
from flashsae.ops.encode.launch import launch_center, launch_encode_topk
from flashsae.ops.encode.layout import Layout
from flashsae.ops.encode.onesided import OneSided
from flashsae.ops.encode.product import Part
from flashsae.ops.encode.screen import Screened
from flashsae.ops.factors import RowGradient, SparseFactor
from flashsae.ops.latent_rows.launch import launch_column_sums, launch_latent_rows, launch_latent_sums
from flashsae.ops.select import launch as select

OPTIONS = ("num_warps", "num_stages")
POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.int8: "*i8",
}
BF16, F32 = torch.bfloat16, torch.float32
SHARED_BYTES = {"80": 163 << 10, "89": 99 << 10, "90": 227 << 10}
"""Shared memory that a program may have."""


class Launches(dict[tuple[Any, ...], tuple[JITFunction, ASTSource, dict[str, int]]]):
    """The distinct launches so far, by what Triton compiles anew for."""

    def record(self, kernel: JITFunction, *args: Any, **kwargs: Any) -> None:
        """Note a call of `JITFunction.run`."""
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        given = {**dict(zip(kernel.arg_names, args)), **kwargs}
        signature: dict[str, str] = {}
        constants: dict[tuple[int], Any] = {}
        attributes: dict[tuple[int], list[list[Any]]] = {}
        for place, parameter in enumerate(kernel.params):
            value = given[parameter.name]
            if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
                signature[parameter.name] = "constexpr"
                constants[(place,)] = value
            elif isinstance(value, TensorDescriptor):
                signature[parameter.name] = f"tensordesc<{POINTERS[value.base.dtype][1:]}{value.block_shape}>"
            elif isinstance(value, Tensor):
                signature[parameter.name] = POINTERS[value.dtype]
                attributes[(place,)] = [["tt.divisibility", 16]]
            elif isinstance(value, float):
                signature[parameter.name] = "fp32"
            else:
                signature[parameter.name] = "i32" if value < 2**31 else "i64"
                if value % 16 == 0:
                    attributes[(place,)] = [["tt.divisibility", 16]]
        key = kernel.fn.__name__, *signature.values(), *constants.values(), *options.values()
        if key not in self:
            self[key] = kernel, ASTSource(kernel, signature, constants, attributes), options


def launch_everything(columns: int) -> None:
    """Call each launch with every kind of argument that changes what is compiled, at sizes that change it."""
    for n, k, scale, magnitude, precisions in (
        (24576, 32, False, False, ("bf16", "tf32", "float32")),
        (24576, 32, True, False, ("bf16", "float32")),
        (24576, 32, False, True, ("bf16", "float32")),
        (131072, 64, False, False, ("bf16",)),
        (65536, 200, True, False, ("bf16", "float32")),
        (65536, 1024, False, False, ("bf16", "float32")),
        (40, 30, True, True, ("tf32", "float32")),
    ):
        for precision in precisions:
            dtype = BF16 if precision == "bf16" else F32
            x, W = torch.zeros(2, 16, dtype=dtype), torch.zeros(n, 16, dtype=dtype)
            keys = Keys(W.new_zeros(n), torch.ones(n) if scale else None, magnitude)
            launch_encode_topk(x, W, keys, k, precision, [1 << 30, 0])
    wide = torch.zeros(2, 4096), torch.zeros(40, 4096)
    launch_encode_topk(*wide, Keys(torch.zeros(40)), 3, "float32", [1 << 30, 0])
    for dtype, index_dtype, k, d, bias, weighted in (
        (F32, torch.int64, 32, 768, True, False),
        (BF16, torch.int64, 64, 4096, True, True),
        (BF16, torch.int64, 256, 4096, True, False),
        (F32, torch.int32, 200, 13, False, True),
        (BF16, torch.int64, 1, 768, False, False),
    ):
        acts, indices = torch.zeros(2, k), torch.zeros(2, k, dtype=index_dtype)
        W, x = torch.zeros(40, d, dtype=dtype), torch.zeros(2, d, dtype=dtype)
        b_dec, weights = x[0] if bias else None, acts[:, 0] if weighted else None
        launch_residual(W[:2], b_dec, x, weights)
        launch_dense_code(acts, indices, 40, dtype)
        for pattern in (Pattern(indices, 40), _rows(2 * k)):
            flat = acts.view(pattern.latents.shape)
            launch_decode(flat, pattern, W, b_dec, dtype)
            launch_decode(flat, pattern, W, b_dec, F32)
            launch_decode_loss(flat, pattern, W, b_dec, x, weights)
            for L in (1, 5):
                rows, starts = torch.zeros(2 * k, dtype=torch.int32), torch.zeros(2 * L + 1, dtype=torch.int32)
                lists, level_weights = (pattern.latents, rows, starts), torch.ones(L, dtype=torch.float64)
                launch_decode_levels(flat, lists, W, b_dec, x, weights, level_weights)
            launch_dots(x, pattern.latents, W, starts=pattern.starts)
            launch_latent_sums(pattern.index, flat)
            launch_latent_sums(pattern.index, flat.to(dtype))
            for result in {dtype, F32}:
                launch_latent_rows(pattern.index, flat, x, result)
        for result in {dtype, F32}:
            launch_center(x, x[0], result)
            launch_column_sums(acts[:, 0].repeat(70), x.repeat(70, 1), result)
    far = torch.empty(2**17, 2**12, dtype=BF16)  # no memory is touched
    for k in (32, 64):
        acts, indices = torch.zeros(2, k), torch.zeros(2, k, dtype=torch.int64)
        for pattern in (Pattern(indices, 2**17), _rows(2 * k)):
            launch_decode_loss(acts.view(pattern.latents.shape), pattern, far, None, far[:2], None)
    launch_latent_pass()
    launch_selections()
    launch_onesided()
    launch_screens(columns)


def launch_onesided() -> None:
    """Select from what an 8-bit screen says, with operands of both kinds."""
    for n, k, scale, magnitude in (
        (24576, 32, False, False),
        (131072, 64, False, False),
        (65536, 200, True, False),
        (65536, 1024, False, True),
        (2048, 32, True, True),
    ):
        for dtype in (BF16, F32):
            x, W, layout = torch.empty(2, 256, dtype=dtype), torch.empty(n, 256, dtype=dtype), Layout.of(n, k)
            keys = Keys(torch.zeros(n), torch.ones(n) if scale else None, magnitude)
            facts = torch.zeros(3, 2), torch.zeros(2, n), torch.zeros(2, layout.groups)
            screened = Screened(torch.zeros(2, layout.groups, dtype=torch.int32), *facts)
            out, counts = (torch.zeros(2, k), torch.zeros(2, k, dtype=torch.int64)), torch.zeros(2, dtype=torch.int32)
            selection = OneSided(x, W, keys, layout, out, counts)
            selection.add(Part(slice(0, 2), torch.zeros(2, n, dtype=BF16), None, screened))
            selection.finish()


def _rows(capacity: int) -> Pattern:
    """Return a pattern of varying length of two tokens."""
    return Pattern(torch.zeros(capacity, dtype=torch.int32), 40, torch.zeros(3, dtype=torch.int32))


def launch_latent_pass() -> None:
    """Call both launches with the weights, moments and parts of a gradient that occur together."""
    for n, d, weights_dtype, split, rows_dtype, moments_dtype, unit_norm, parts in (
        (40, 768, F32, False, F32, F32, True, "sparse"),
        (40, 768, F32, False, F32, F32, False, "sparse slots"),
        (40, 768, F32, False, F32, BF16, True, "sparse slots"),
        (40, 768, F32, False, F32, BF16, False, "dense"),
        (40, 768, BF16, True, BF16, F32, True, "sparse slots"),
        (40, 768, BF16, True, BF16, F32, False, "sparse"),
        (40, 4096, BF16, True, BF16, BF16, True, "sparse slots"),
        (40, 4096, BF16, True, BF16, BF16, False, "dense"),
        (40, 4096, F32, False, F32, F32, True, "sparse dense"),
        (40, 13, F32, False, F32, F32, True, "sparse slots"),
        (40, 768, F32, False, F32, F32, True, "sparse rows"),
        (40, 4096, BF16, True, BF16, BF16, True, "sparse rows slots"),
        (40, 768, BF16, True, BF16, F32, False, "sparse rows"),
        (40, 13, BF16, False, BF16, F32, False, "sparse dense"),
        (40, 768, F32, False, F32, F32, True, "nothing"),
        (1, 24576, F32, False, F32, F32, False, "dense"),  # a bias
    ):
        weights = torch.zeros(n, d, dtype=weights_dtype)
        low = torch.zeros(n, d, dtype=torch.int16) if split else None
        moments = torch.zeros(n, d, dtype=moments_dtype), torch.zeros(n, d, dtype=moments_dtype)
        sparse = dense = slots = None
        if "sparse" in parts:
            pattern = _rows(64) if "rows" in parts else Pattern(torch.zeros(2, 32, dtype=torch.int64), n)
            coeffs = torch.zeros(pattern.latents.shape)
            sparse = SparseFactor(pattern.index, coeffs, torch.zeros(2, d, dtype=rows_dtype))
        if "dense" in parts:
            dense = torch.zeros(n, d, dtype=rows_dtype)
        if "slots" in parts:
            dense, slots = torch.zeros(16, d, dtype=rows_dtype), torch.zeros(n, dtype=torch.int32)
        gradient = RowGradient(sparse, dense, slots)
        one = torch.ones((), dtype=torch.float64)
        launch_adam_rows(weights, low, moments, gradient, (one, one, one.repeat(2)), AdamRule(unit_norm=unit_norm))
        launch_row_squares(weights, gradient, unit_norm)


def launch_screens(columns: int) -> None:
    """Round and multiply matrices of every dtype and of few and many columns and tokens, for both kinds of result."""
    for d, dtype, B, magnitude, scaled in (
        (4096, BF16, 200, False, False),
        (4096, F32, 200, True, True),
        (768, BF16, 8, False, True),
        (100, F32, 8, True, False),
        (columns, F32, 200, False, False),
    ):
        x, W = torch.zeros(B, d, dtype=dtype), torch.zeros(320, d, dtype=dtype)
        noise = torch.zeros((), dtype=torch.int64) if scaled else None
        left, right = screen.rounded(x, noise, is_token=True), screen.rounded(W, noise, is_token=False)
        screen.products(left, right, torch.zeros(B, 320, dtype=torch.float16))
        keys = Keys(W.new_zeros(320), torch.ones(320) if scaled else None, magnitude)
        screen.centres(left, right, keys, torch.zeros(B, 320, dtype=BF16), torch.zeros(B, 10, dtype=torch.int32))


def launch_selections() -> None:
    """Select over a batch in one part and in two, by groups of all sizes that matter."""
    for n, k, scale, magnitude, precisions in (
        (24576, 32, False, False, ("bf16", "tf32", "float32")),
        (131072, 64, True, False, ("bf16", "float32")),
        (131072, 64, False, True, ("bf16", "float32")),
        (40, 30, True, False, ("tf32", "float32")),
    ):
        for precision in precisions:
            dtype = BF16 if precision == "bf16" else F32
            x, W = torch.zeros(2, 16, dtype=dtype), torch.zeros(n, 16, dtype=dtype)
            key_scale, threshold = (torch.ones(n) if scale else None), torch.zeros(n if scale else 1)
            for workspace_bytes in (1, 1 << 30):
                select.batch_topk(x, W, Keys(W.new_zeros(n), key_scale, magnitude), k, precision, [workspace_bytes, 0])
                select.above(x, W, W.new_zeros(n), threshold, 64, precision, [workspace_bytes, 0])


def main(backend: str, arch: str, warp: int, only: str = "") -> None:
    """Compile all variants, or those of kernels whose names begin so; print how many. The first that fails raises."""
    launches = Launches()

    def run(kernel: JITFunction, *args: Any, grid: object, warmup: bool, **kwargs: Any) -> None:
        launches.record(kernel, *args, **kwargs)

    JITFunction.run = run  # type: ignore[method-assign]
    room = SHARED_BYTES.get(arch, 1 << 20)
    launch_everything(screen.MOST_COLUMNS if room >= screen.SHARED_BYTES else screen.MOST_COLUMNS // 2)
    target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, warp)
    wanted = [launch for launch in launches.values() if launch[0].fn.__name__.startswith(only)]
    for kernel, source, options in wanted:
        try:
            shared = triton.compile(source, target, options).metadata.shared
        except Exception as error:
            raise SystemExit(f"{kernel.fn.__name__} {source.signature} {source.constants}: {error}") from error
        if shared > room:
            raise SystemExit(f"{kernel.fn.__name__} {source.constants}: {shared} bytes of shared memory of {room}")
    names = sorted({kernel.fn.__name__ for kernel, *_ in wanted})
    print(f"{len(wanted)} variants of {len(names)} kernels compiled for {backend} {arch}: {' '.join(names)}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
