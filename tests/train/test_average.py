"""Weights averaged over the last steps, and trainings that go on behind their end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flashsae
from flashsae import SAE, TrainConfig
from flashsae.data.shuffle import RowShuffle
from flashsae.data.sources import ArraySource
from flashsae.data.synthetic import SuperpositionModel
from flashsae.errors import CheckpointError, ConfigError, FlashSAEWarning
from flashsae.optim.schedule import learning_rate
from flashsae.train import TrainState, init_state, train, train_step
from flashsae.train import state as state_module
from flashsae.train.average import steps_averaged
from flashsae.train.checkpoint import list_checkpoints
from flashsae.train.state import progress_at
from helpers.resumed import same_after_a_kill

X = SuperpositionModel(8, 16, active=2.0).sample(640, seed=1)
SETTINGS: dict[str, Any] = {
    "d_sae": 16, "k": 2, "batch_tokens": 64, "tokens": 64 * 12, "checkpoint_every_steps": 4, "lr": 3e-3,
}  # fmt: skip


def _state(config: TrainConfig) -> TrainState:
    batches = RowShuffle(ArraySource(X), config.batch_tokens, seed=config.seed)
    return init_state(config, batches, torch.device("cpu"))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_average_is_the_mean_of_the_weights_behind_the_last_steps(precision: Any) -> None:
    config = TrainConfig(**SETTINGS, average_tokens=64 * 4 + 1, precision=precision).resolve(8)
    state, seen = _state(config), list[dict[str, Tensor]]()
    for _ in range(config.steps):
        train_step(state, state.batches.next_batch(), config)
        names = ("W_enc_T", "W_dec", "b_enc", "b_dec")
        seen.append({name: state.optimizer.float32_weights(getattr(state.sae, name)).clone() for name in names})
    assert list(state.average) == ["W_dec", "W_enc_T", "b_enc", "b_dec"]
    for name, mean in state.average.items():
        expected = torch.stack([each[name].double() for each in seen[-5:]]).mean(0)
        torch.testing.assert_close(mean.double(), expected, rtol=1e-6, atol=1e-8)
    finished = state.finished_sae()
    torch.testing.assert_close(finished.W_dec.norm(dim=1), torch.ones(16))
    torch.testing.assert_close(finished.W_enc_T, state.average["W_enc_T"])
    torch.testing.assert_close(finished.b_dec, state.average["b_dec"] / state.scale)


def test_without_it_nothing_is_kept_and_the_last_weights_are_those_of_before() -> None:
    config = TrainConfig(**SETTINGS).resolve(8)
    state = _state(config)
    finished = train(state, config)
    assert state.average == {}
    averaged = train(_state(config), TrainConfig(**SETTINGS, average_tokens=64).resolve(8))
    for name, tensor in finished.state_dict().items():
        torch.testing.assert_close(averaged.state_dict()[name], tensor)  # of one step: the same, but for a norm
    assert [steps_averaged(n, TrainConfig(**SETTINGS, average_tokens=10**9)) for n in (1, 12)] == [1, 12]


@pytest.mark.parametrize(
    ("ends_at", "told"), [(5, "are those of that step: average_tokens counts from the end"), (10, "over what there is")]
)
def test_data_that_end_before_it_are_told_of(ends_at: int, told: str) -> None:
    with pytest.warns(FlashSAEWarning, match=rf"the iterable x ended.*{told}\.$"):
        flashsae.fit(iter(X.split(64)[:ends_at]), **SETTINGS, average_tokens=64 * 4, progress=False)


@pytest.mark.parametrize(
    "settings",
    [{}, {"precision": "bf16", "moments": "bf16"}, {"arch": "jump_relu", "target_l0": 2}, {"average_tokens": 10**6}],
)
def test_a_kill_within_it_changes_no_byte(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {**SETTINGS, "average_tokens": 64 * 6, **settings}
    if "arch" in settings:
        del given["k"]
    same_after_a_kill(tmp_path, monkeypatch, x=X, after=10, **given)


def test_an_average_that_is_missing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flashsae.fit(X, run=tmp_path / "run", progress=False, **SETTINGS)
    config = TrainConfig(**SETTINGS, average_tokens=64 * 6).resolve(8)
    monkeypatch.setattr(state_module, "check_settings", lambda *_: None)
    batches = RowShuffle(ArraySource(X), 64, seed=0)
    with pytest.raises(CheckpointError, match="the checkpoint of step 12 is damaged: it lacks the average"):
        init_state(config, batches, torch.device("cpu"), tmp_path / "run" / "checkpoints")


def test_the_rate_rises_and_falls_again_in_an_extension() -> None:
    config = TrainConfig(**{**SETTINGS, "tokens": 64 * 100, "lr": 1.0}, warmup_steps=10).resolve(8)
    longer = TrainConfig(**{**vars(config), "tokens": 64 * 150, "extended": (64 * 100,)})
    rates = [learning_rate(step, longer) for step in range(150)]
    assert rates[:100] == [learning_rate(step, config) for step in range(100)]
    assert rates[100:110] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert rates[110:140] == [1.0] * 30
    assert rates[140:] == pytest.approx([1.0, *(0.1 * n for n in range(9, 0, -1))])
    constant = TrainConfig(**{**vars(longer), "decay_fraction": 0.0})
    assert {learning_rate(step, constant) for step in range(10, 150)} == {1.0}
    assert [progress_at(step, longer).fraction for step in (0, 50, 99, 100, 149)] == [0, 0.5, 0.99, 1, 1]
    short = TrainConfig(**{**vars(longer), "tokens": 64 * 103})
    assert [learning_rate(step, short) for step in (100, 101, 102)] == pytest.approx([1 / 3, 2 / 3, 1.0])


def _extended(tokens: int, *before: int, **settings: Any) -> dict[str, Any]:
    return {**SETTINGS, "tokens": tokens, "extended": before, "warmup_steps": 2, "dead_after_tokens": 300, **settings}


def _same(a: SAE, b: SAE) -> bool:
    return all(torch.equal(tensor, b.state_dict()[name]) for name, tensor in a.state_dict().items())


@pytest.mark.parametrize("kind", ["array", "list"])
def test_a_run_that_ended_goes_on_to_the_bytes_of_one_in_one_go(kind: str, tmp_path: Path) -> None:
    x = X if kind == "array" else list(X.split(50))

    def go(folder: str, settings: dict[str, Any], *, resume: bool = False) -> SAE:
        return flashsae.fit(
            x, run=tmp_path / folder, resume=resume, progress=False, shuffle_tokens=256, average_tokens=128, **settings
        )

    whole = go("whole", _extended(64 * 20, 64 * 12))
    first = go("run", {**_extended(64 * 12), "extended": ()})
    assert not _same(first, whole)
    assert _same(go("run", _extended(64 * 20, 64 * 12), resume=True), whole)
    with pytest.raises(CheckpointError, match=r"tokens was 1280 and is 1408 now"):
        go("run", _extended(64 * 22, 64 * 12), resume=True)
    twice = go("run", _extended(64 * 24, 64 * 12, 64 * 20), resume=True)
    assert _same(twice, go("three", _extended(64 * 24, 64 * 12, 64 * 20)))


def test_an_extension_is_killed_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = _extended(64 * 24, 64 * 12, average_tokens=64 * 8)
    same_after_a_kill(tmp_path, monkeypatch, x=X, after=19, **settings)


@pytest.mark.parametrize("ends", [(64 * 12,), (64 * 13,), (640, 64), (64 * 11 + 63,)])
def test_ends_that_do_not_ascend_are_refused(ends: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"^extended: expected ends of trainings that ascend to tokens = 768"):
        TrainConfig(**SETTINGS, extended=ends)


@pytest.mark.parametrize("settings", [{}, {"precision": "bf16"}, {"average_tokens": 64 * 6}, {"arch": "batch_topk"}])
def test_a_checkpoint_is_an_sae(settings: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    sae = flashsae.fit(X, run=run, progress=False, **SETTINGS, **settings)
    before = torch.get_rng_state()
    for path in (run, str(run / "checkpoints"), run / "checkpoints" / "step-00000012"):
        loaded = flashsae.load_checkpoint(path)
        assert _same(loaded, sae)
        assert loaded.config == sae.config
        assert not loaded.training
    assert torch.equal(torch.get_rng_state(), before)
    earlier = flashsae.load_checkpoint(run / "checkpoints" / "step-00000008")
    assert not _same(earlier, sae)
    assert flashsae.evaluate(earlier, X).fvu < 1.5


def test_what_is_no_checkpoint_of_an_sae_is_told(tmp_path: Path) -> None:
    run = tmp_path / "run"
    flashsae.fit_many(X, [{"k": 2}, {"k": 3}], run=run, progress=False, **{**SETTINGS, "k": None})
    assert flashsae.load_checkpoint(run / "k3").config.arch.k == 3
    with pytest.raises(CheckpointError, match="holds no SAE, but the place in the data of several"):
        flashsae.load_checkpoint(run)
    with pytest.raises(CheckpointError, match="holds no checkpoint: expected a folder step-"):
        flashsae.load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"cannot read .*step-00000099.*manifest\.json"):
        flashsae.load_checkpoint(run / "k3" / "checkpoints" / "step-00000099")
    (newest,) = [path for path in list_checkpoints(run / "k3" / "checkpoints") if path.name.endswith("12")]
    with pytest.raises(CheckpointError, match=r"is a checkpoint of a training: flashsae\.load_checkpoint reads it"):
        SAE.load(newest)
