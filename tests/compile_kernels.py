"""Compile every kernel variant ahead of time for a target, without a device: `python compile_kernels.py cuda 90 32`.

The CPU interpreter accepts what the compiler rejects, so CI does both. Run on its own, because kernels are decorated for
the interpreter or for the compiler when they are imported.
"""

from __future__ import annotations

import inspect
import sys
from itertools import product
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flashsae.ops.decode_sparse import kernels as decode
from flashsae.ops.encode_topk import certify_kernels as certify
from flashsae.ops.encode_topk import kernels as encode
from flashsae.ops.encode_topk.launch import Layout
from flashsae.ops.latent_rows import kernels as rows

F32, BF16, F16, I32, I64, I8 = "*fp32", "*bf16", "*fp16", "*i32", "*i64", "*i8"
SIZES = {"S": (24576, 32), "L": (131072, 64), "k=200": (65536, 200), "k=1024": (65536, 1024), "tiny": (40, 30)}


def variants() -> list[tuple[str, Any, dict[str, Any], int]]:
    """Return (label, kernel, argument types and constants by name, warps)."""
    found: list[tuple[str, Any, dict[str, Any], int]] = []
    floats = (F32, BF16)
    for raw, bias, scale, mask, (name, (n, k)) in product(
        floats, floats, (None, F32), (None, I8), SIZES.items()
    ):
        layout = Layout.of(n, k)
        common = {
            "raw_ptr": raw, "bias_ptr": bias, "scale_ptr": scale, "mask_ptr": mask, "GROUP": layout.group,
        }  # fmt: skip
        label = f"{name} {raw} {bias} scale={scale} mask={mask}"
        block_g = triton.next_power_of_2(max(1, min(layout.groups, 2048 // layout.group)))
        group_max = {**common, "low_ptr": I32, "BLOCK_G": block_g, "BLOCK_B": 16}
        certified = {**group_max, "raw_ptr": F16, "bias_ptr": F32, "column_ptr": F32, "row_ptr": F32, "high_ptr": I32}
        exact = {"column_ptr": None, "row_ptr": None, "high_ptr": None}
        found.append((f"group_max {label}", encode.encode_topk_group_max_kernel, {**group_max, **exact}, 4))
        select = {
            **common, "max_ptr": I32, "list_ptr": I32, "top_acts_ptr": F32, "top_indices_ptr": I64,
            "BLOCK_G": layout.block_g, "BLOCK_K": triton.next_power_of_2(k),
        }  # fmt: skip
        found.append((f"select {label}", encode.encode_topk_select_kernel, select, 8))
        if raw == F32 and bias == F32:
            found.append((f"certified group_max {label}", encode.encode_topk_group_max_kernel, certified, 8))
            found += _certified(label, layout, k, scale, mask)
    for dtype, block_d in product(floats, (1024, 16, 4096)):
        found.append((f"round {block_d}", certify.encode_topk_round_kernel, {
            "rows_ptr": F32, "half_ptr": F16, "facts_ptr": F32, "IS_TOKEN": dtype == F32, "BLOCK_D": block_d,
            "accumulation": "fp32",
        }, 4))  # fmt: skip
    for W, bias, weights, k in product(floats, (True, False), (None, F32), (1, 32, 64, 200)):
        block_k = triton.next_power_of_2(k)
        found.append((f"loss {W} k={k}", decode.decode_sparse_loss_kernel, {
            "acts_ptr": F32, "indices_ptr": I64, "W_ptr": W, "bias_ptr": W if bias else None, "target_ptr": W,
            "weights_ptr": weights, "x_hat_ptr": W, "residual_ptr": W, "errors_ptr": F32, "grad_acts_ptr": F32,
            "BLOCK_K": block_k, "BLOCK_D": max(16, 8192 // block_k),
        }, 4))  # fmt: skip
        found.append((f"decode {W} k={k}", decode.decode_sparse_fwd_kernel, {
            "acts_ptr": F32, "indices_ptr": I64, "W_ptr": W, "bias_ptr": W if bias else None, "out_ptr": W,
            "BLOCK_K": min(32, block_k), "BLOCK_D": 512,
        }, 4))  # fmt: skip
        for indices, counts in ((I64, None), (I32, I32)):
            found.append((f"dots {W} k={k}", decode.decode_sparse_bwd_acts_kernel, {
                "rows_ptr": W, "indices_ptr": indices, "counts_ptr": counts, "W_ptr": W, "dots_ptr": F32,
                "BLOCK_K": min(16, block_k), "BLOCK_D": 256,
            }, 4))  # fmt: skip
    for dtype, out, block_d in product(floats, floats, (512, 16)):
        lists = {
            "entries_ptr": I64, "latents_ptr": I32, "offsets_ptr": I32, "coeffs_ptr": F32, "rows_ptr": dtype,
            "partial_ptr": F32, "weights_ptr": F32, "RUN": 256, "BLOCK_D": block_d,
        }  # fmt: skip
        found.append((f"partial {dtype}", rows.latent_rows_partial_kernel, {**lists, "BLOCK_E": 8}, 4))
        found.append((f"sum {dtype} {out}", rows.latent_rows_sum_kernel, {
            **lists, "out_ptr": out, "sums_ptr": F32, "BLOCK_N": 4, "BLOCK_E": 4,
        }, 2))  # fmt: skip
    return found


def _certified(
    label: str, layout: Layout, k: int, scale: str | None, mask: str | None
) -> list[tuple[str, Any, dict[str, Any], int]]:
    choose = {"bias_ptr": F32, "scale_ptr": scale, "mask_ptr": mask, "CAPACITY": layout.capacity}
    result = {"top_acts_ptr": F32, "top_indices_ptr": I64}
    return [
        (f"candidates {label}", certify.encode_topk_candidates_kernel, {
            **choose, "raw_ptr": F16, "column_ptr": F32, "row_ptr": F32, "low_ptr": I32, "high_ptr": I32,
            "list_ptr": I32, "candidates_ptr": I32, "counts_ptr": I32, "GROUP": layout.group,
            "BLOCK_G": layout.block_g,
        }, 8),
        (f"finish {label}", certify.encode_topk_finish_kernel, {
            **choose, **result, "dots_ptr": F32, "candidates_ptr": I32, "counts_ptr": I32,
        }, 8),
        (f"redo {label}", certify.encode_topk_redo_kernel, {
            **choose, **result, "x_ptr": F32, "W_ptr": F32, "counts_ptr": I32, "values_ptr": F32, "keys_ptr": I32,
            "list_ptr": I32, "BLOCK_N": 64, "BLOCK_D": 128, "BLOCK_G": 4096,
            "BLOCK_K": triton.next_power_of_2(k),
        }, 8),
    ]  # fmt: skip


def main(backend: str, arch: str, warp: int) -> None:
    """Compile all variants; print how many. The first that fails raises."""
    target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, warp)
    done = 0
    for label, kernel, given, warps in variants():
        names = list(inspect.signature(kernel.fn).parameters)
        kinds = {name: given.get(name, "i32") for name in names}
        constants = {(names.index(name),): kind for name, kind in kinds.items() if not isinstance(kind, str)}
        signature = {name: kind if isinstance(kind, str) else "constexpr" for name, kind in kinds.items()}
        aligned = {
            (names.index(name),): [["tt.divisibility", 16]] for name, kind in kinds.items() if str(kind).startswith("*")
        }
        try:
            triton.compile(ASTSource(kernel, signature, constants, aligned), target, {"num_warps": warps})
        except Exception as error:
            raise SystemExit(f"{label}: {error}") from error
        done += 1
    print(f"{done} kernels compiled for {backend} {arch}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
