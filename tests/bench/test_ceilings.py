from __future__ import annotations

from typing import get_args

import pytest
import torch

from flashsae.bench import ceilings
from flashsae.bench.ceilings import int8_gemm_run, measure_ceilings
from flashsae.bench.setups import Shape
from flashsae.precision import Precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(("tokens", "d_in", "d_sae", "out_bytes"), [(1, 5, 9, 1 << 20), (70, 12, 40, 4 * 40 * 33)])
def test_a_product_of_int8_takes_any_size_in_parts(
    tokens: int, d_in: int, d_sae: int, out_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ceilings, "GEMM_OUT_BYTES", out_bytes)
    x, W = (torch.randint(-127, 128, size, dtype=torch.int8) for size in ((tokens, d_in), (d_sae, d_in)))
    rows: list[int] = []
    multiply = torch._int_mm

    def noted(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> None:
        rows.append(len(a))
        assert a.shape[1] % 8 == b.shape[1] % 8 == 0  # what the library wants on a GPU
        torch.testing.assert_close(multiply(a, b, out=out), a.int() @ b.int())

    monkeypatch.setattr(torch, "_int_mm", noted)
    run, flops = int8_gemm_run(x, W)
    run(0)
    assert flops == 2.0 * tokens * d_in * d_sae
    assert sum(rows) >= tokens
    assert min(rows) > 16
    assert len(rows) == -(-tokens // 32)


@pytest.mark.parametrize("precision", get_args(Precision))
def test_every_precision_has_a_dense_product_beside_it(precision: str) -> None:
    found = measure_ceilings(Shape("x", 20, 12, 40, 3), precision, CPU, 1e-9)
    assert found.gemm_tflops > 0
    wanted = {"bf16": "bfloat16", "tf32": "float32", "float32": "float16"}
    assert found.gemm_dtype == wanted.get(precision, "int8")
