"""Trainings leave their screen where it leaves too much open, and take it up again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from flashsae.architecture import Progress
from flashsae.data.shuffle import RowShuffle
from flashsae.data.sources import ArraySource
from flashsae.ops.encode import screen
from flashsae.ops.encode.screen import always
from flashsae.train import TrainConfig, init_state, screening
from flashsae.train.checkpoint import save_checkpoint
from flashsae.train.state import TrainState, to_checkpoint
from flashsae.train.step import train_step

CPU = torch.device("cpu")


def begin(
    precision: str, checkpoints: Path | None = None, **arch: Any
) -> tuple[TrainState, TrainConfig, dict[str, Tensor]]:
    x = torch.randn(512, 16, generator=torch.Generator().manual_seed(0))
    config = TrainConfig(
        d_sae=64, tokens=64 * 8, batch_tokens=64, precision=precision, seed=1, **(arch or {"k": 4})
    ).resolve(16)
    state = init_state(config, RowShuffle(ArraySource(x), 64, seed=0), CPU, checkpoints)
    return state, config, state.batches.next_batch()


@pytest.fixture
def _kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(screening, "use_kernels", lambda _: True)
    with always():
        yield


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize(("precision", "operand", "most"), [("bf16-int8", "bf16", 16), ("float32-int8", "float32", 24)])
def test_a_screen_that_leaves_too_much_open_is_left(
    precision: str, operand: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, config, batch = begin(precision)
    for step, found, expected in (
        (0, most, precision),
        (64, most + 1, operand),
        (65, 0, operand),
        (128, 0, precision),
        (192, 99, operand),
    ):
        monkeypatch.setattr(screening, "_open_latents", lambda *_, found=found: float(found))
        state.step = step
        screening.look(state, batch, config)
        assert state.sae.precision == expected, step


def test_others_do_not_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screening, "_open_latents", lambda *_: pytest.fail("looked"))
    for precision in ("bf16", "float32", "bf16-int8"):  # the last without kernels
        state, config, batch = begin(precision)
        screening.look(state, batch, config)
        assert state.sae.precision == precision
    monkeypatch.setattr(screening, "use_kernels", lambda _: True)
    screening.look(state, batch, config)  # kernels do not screen what is so small
    assert state.sae.precision == "bf16-int8"


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("arch", ["batch_topk", "jump_relu", "relu", "gated", "matryoshka:batch_topk"])
def test_what_is_selected_over_a_batch_or_above_a_threshold_is_not_looked_at(
    arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(screening, "_open_latents", lambda *_: pytest.fail("looked"))
    state, config, batch = begin("bf16-int8", arch=arch)
    screening.look(state, batch, config)
    assert state.sae.precision == "bf16-int8"


def test_many_latents_of_a_token_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screening, "use_kernels", lambda _: True)
    monkeypatch.setattr(screen, "pays", lambda B, n, d, k, **_: k is not None)
    looked: list[int] = []
    monkeypatch.setattr(screening, "_open_latents", lambda sae, x, k: looked.append(k) or 0.0)
    for k in (1, 2):  # of 64 latents one is what upper bounds tell
        state, config, batch = begin("bf16-int8", k=k)
        screening.look(state, batch, config)
    assert looked == [1]


@pytest.mark.parametrize(
    ("arch", "now", "expected"),
    [
        ({"k": 4}, 0.5, 4),
        ({"k": 4, "k_start": 16}, 0.0, 16),
        ({"k": 4, "k_start": 16}, 0.9, 4),
        ({"k": 16, "k_start": 4}, 0.0, 4),
        ({"k": 4, "multi_topk": 0.1}, 0.0, 16),
        ({"k": 4, "k_start": 8, "multi_topk": 0.1}, 0.9, 16),
        ({"k": 32, "multi_topk": 0.1}, 0.0, 64),
    ],
)
def test_as_many_are_asked_for_as_are_selected_at_a_step(arch: dict[str, Any], now: float, expected: int) -> None:
    state, _, batch = begin("float32", **arch)
    sae = state.sae
    sae.set_progress(Progress(round(now * 10), 10))
    assert screening.selected(sae) == expected
    code = sae.encode(*batch.values())
    assert code.pattern.latents.shape[1] == expected


@pytest.mark.usefixtures("_kernels")
def test_latents_that_are_open_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    state, config, batch = begin("float32-int8")
    sae = state.sae
    (x,) = batch.values()
    assert 4 <= screening._open_latents(sae, x[:8], 4) < 20
    with torch.no_grad():  # all latents alike: any of them may be among the largest
        sae.W_enc_T.copy_(sae.W_enc_T[:1].expand(64, -1))
        sae.b_enc.zero_()
    assert screening._open_latents(sae, x[:8], 4) > 50
    screening.look(state, {site: acts[:8] for site, acts in batch.items()}, config)
    assert sae.precision == "float32"


def test_a_checkpoint_knows_whether_there_is_a_screen(tmp_path: Path) -> None:
    state, config, _ = begin("bf16-int8")
    state.sae.precision = "bf16"
    save_checkpoint(tmp_path, to_checkpoint(state, config))
    again, config, batch = begin("bf16-int8", tmp_path)
    assert again.sae.precision == "bf16"
    state.sae.precision = "bf16-int8"
    train_step(state, batch, config)
    save_checkpoint(tmp_path, to_checkpoint(state, config))
    assert begin("bf16-int8", tmp_path)[0].sae.precision == "bf16-int8"
