"""The plan of memory counts what each precision keeps within a step."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from flashsae import TrainConfig
from flashsae.ops.encode.reference import WORKSPACE_BYTES
from flashsae.precision import Precision
from flashsae.train.plan import make_plan

B, D_SAE, D_IN = 8192, 1 << 17, 4000


def step_bytes(precision: Any, device: str = "cuda", d_in: int = D_IN, **arch: Any) -> int:
    settings = {"d_sae": D_SAE, **(arch or {"k": 64}), "tokens": 1 << 20, "batch_tokens": B, "auxk_alpha": 0.0}
    config = TrainConfig(**settings, precision=precision).resolve(d_in)
    return make_plan(config, torch.device(device)).parts["one step"]


@pytest.mark.parametrize("d_in", [D_IN, 100])
def test_a_screen_keeps_rows_of_8_bits_and_lists(d_in: int) -> None:
    padded, rows = -(-d_in // 128) * 128, WORKSPACE_BYTES // (2 * D_SAE)
    screen = D_SAE * (padded + 12) + rows * (padded + 24) + 16 * B * 512
    assert step_bytes("bf16-int8", d_in=d_in) == step_bytes("bf16", d_in=d_in) + screen
    copies = max(2 * D_SAE * d_in, screen) - 2 * D_SAE * d_in - 2 * B * d_in  # in its place, and no tokens of float16
    assert step_bytes("float32-int8", d_in=d_in) == step_bytes("float32", d_in=d_in) + copies


def test_a_selection_that_is_never_screened_keeps_none() -> None:
    for arch in ({"arch": "batch_topk", "k": 64}, {"arch": "relu"}):
        for precision in ("bf16", "float32"):
            assert step_bytes(f"{precision}-int8", **arch) == step_bytes(precision, **arch)


def test_at_large_sizes_a_screen_takes_0_6_gb_at_most() -> None:
    assert step_bytes("bf16-int8", d_in=4096) - step_bytes("bf16", d_in=4096) < 0.65e9
    assert step_bytes("float32-int8") < step_bytes("float32")


def test_on_the_cpu_all_precisions_need_the_same() -> None:
    assert len({step_bytes(precision, "cpu") for precision in get_args(Precision)}) == 1
