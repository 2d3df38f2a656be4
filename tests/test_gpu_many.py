"""Several SAEs side by side on a GPU, each with a graph of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import flashsae
from flashsae import SAE
from flashsae.data.synthetic import SuperpositionModel
from helpers.resumed import same_after_a_kill

pytestmark = pytest.mark.gpu

SHARED: dict[str, Any] = {
    "tokens": 512 * 40, "batch_tokens": 512, "d_sae": 512, "dead_after_tokens": 512 * 12, "device": "cuda",
    "shuffle_tokens": 4096, "progress": False,
}  # fmt: skip
SETTINGS: list[dict[str, Any]] = [
    {"k": 8, "precision": "bf16"},
    {"k": 8, "precision": "bf16-int8"},
    {"k": 8, "precision": "bf16", "average_tokens": 512 * 10},
    {"k": 16, "seed": 3},
    {"arch": "batch_topk", "k": 8, "moments": "bf16"},
    {"arch": "jump_relu", "target_l0": 8, "d_sae": 1024},
]


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return SuperpositionModel(64, 256, active=6.0).sample(8000, seed=1)


def _same(a: SAE, b: SAE) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in a.state_dict().items())


@pytest.mark.parametrize("kind", ["array", "list", "on the device"])
def test_each_is_what_it_would_be_alone(kind: str, x: torch.Tensor) -> None:
    acts: Any = list(x.split(500)) if kind == "list" else x.cuda() if kind == "on the device" else x
    many = flashsae.fit_many(acts, SETTINGS, **SHARED)
    for sae, settings in zip(many, SETTINGS, strict=True):
        assert sae.W_dec.device.type == "cuda"
        assert _same(sae, flashsae.fit(acts, **{**SHARED, **settings})), settings


def test_an_average_is_the_same_killed_and_resumed(
    x: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {name: value for name, value in SHARED.items() if name != "progress"}
    for precision in ("bf16", "float32"):
        given = {**settings, "k": 8, "precision": precision, "average_tokens": 512 * 20, "checkpoint_every_steps": 8}
        same_after_a_kill(tmp_path / precision, monkeypatch, x=x, after=35, **given)


def test_several_resume_to_the_same_bytes(x: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flashsae.train import loop

    whole = flashsae.fit_many(x, SETTINGS, **SHARED)
    steps, step = [], loop.train_step

    def stops(*args: Any) -> Any:
        if len(steps) == 30 * len(SETTINGS) + 2:
            raise KeyboardInterrupt
        steps.append(1)
        return step(*args)

    given = {**SHARED, "run": tmp_path / "run", "checkpoint_every_steps": 7}
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", stops)
        with pytest.raises(KeyboardInterrupt):
            flashsae.fit_many(x, SETTINGS, **given)
    resumed = flashsae.fit_many(x, SETTINGS, resume=True, **given)
    assert all(map(_same, resumed, whole))
