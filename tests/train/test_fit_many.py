"""Several SAEs side by side are what each would be alone, whenever they are killed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import flashsae
from flashsae import SAE, TrainConfig
from flashsae.data.synthetic import SuperpositionModel
from flashsae.errors import CheckpointError, ConfigError, DivergedError, StorageError
from flashsae.logs.callback import WarnOfOne
from flashsae.logs.jsonl import JsonlLog
from flashsae.train import following, loop
from helpers import kill

X = SuperpositionModel(8, 16, active=2.0).sample(640, seed=1)
SMALL = TrainConfig(d_sae=16, batch_tokens=64, tokens=64 * 12, checkpoint_every_steps=4, shuffle_tokens=256)
SETTINGS: list[dict[str, Any]] = [
    {"k": 2},
    {"k": 3, "seed": 5},
    {"arch": "batch_topk", "k": 3},
    {"arch": "jump_relu", "target_l0": 3, "d_sae": 24, "lr": 3e-3},
    {"k": 2, "precision": "bf16", "moments": "bf16", "clip_norm": 0.5},
    {"k": 2, "normalize_activations": "layer_norm", "seed": 5},
    {"k": 3, "precision": "bf16-int8"},
]


def _same(a: SAE, b: SAE) -> bool:
    theirs = b.state_dict()
    return a.config == b.config and all(torch.equal(tensor, theirs[name]) for name, tensor in a.state_dict().items())


@pytest.mark.parametrize(
    "make",
    [lambda: X, lambda: list(X.split(50)), lambda: iter(X.repeat(3, 1).split(50))],
    ids=["array", "list", "iterator"],
)
def test_each_is_what_it_would_be_alone(make: Callable[[], Any]) -> None:
    """Same order of the data for each seed, also where a stream can be read but once."""
    many = flashsae.fit_many(make(), SETTINGS, config=SMALL, progress=False)
    for sae, settings in zip(many, SETTINGS, strict=True):
        assert _same(sae, flashsae.fit(make(), config=SMALL, progress=False, **settings)), settings
    assert not _same(many[0], many[1])


def test_the_data_are_read_once_for_all_seeds() -> None:
    read: list[int] = []

    def stream() -> Any:
        for number, part in enumerate(X.split(40)):
            read.append(number)
            yield part

    flashsae.fit_many(stream(), [{"seed": seed} for seed in range(4)], k=2, config=SMALL, tokens=64 * 9, progress=False)
    assert read == sorted(set(read))


def test_sites_are_chosen_by_name_and_share_a_batch() -> None:
    x = {"a": X, "b": torch.cat([X, -X], 1), "c": X.square()}
    settings = [
        {"hookpoint": "b"},
        {"hookpoint": "a"},
        {"hookpoint": "c, b", "arch": "transcoder"},
        {"hookpoint": "a, b", "arch": "crosscoder", "d_sae": 20},
    ]
    alone = [x["b"], x["a"], {"in": x["c"], "out": x["b"]}, {"a": x["a"], "b": x["b"]}]
    many = flashsae.fit_many(x, settings, k=2, config=SMALL, progress=False)
    for sae, given, own in zip(many, settings, alone, strict=True):
        others = {name: value for name, value in given.items() if name != "hookpoint"}
        assert _same(sae, flashsae.fit(own, k=2, config=SMALL, progress=False, **others)), given
    batches = (dict(zip(x, parts)) for parts in zip(*(rows.split(50) for rows in x.values())))
    from_iterable = flashsae.fit_many(batches, settings[:2], k=2, config=SMALL, tokens=64 * 8, progress=False)
    assert [sae.config.d_in for sae in from_iterable] == [16, 8]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["array", "list"])
def test_a_kill_between_any_two_writes_changes_no_byte_of_any(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = X if kind == "array" else list(X.split(50))
    config = TrainConfig(
        d_sae=12, k=2, batch_tokens=64, tokens=64 * 2, checkpoint_every_steps=1, shuffle_tokens=128, log_every_steps=2
    )
    settings = [{"seed": 1}, {"k": 3}]
    monkeypatch.setattr(following._Clock, "rate", lambda *_: 1.0)  # the one figure of the log that no seed decides
    monkeypatch.setattr(JsonlLog, "on_checkpoint", lambda *_: None)  # lines that were flushed once are never lost

    def work(root: Path) -> None:
        run = root / "run"
        flashsae.fit_many(x, settings, config=config, run=run, resume=run.exists(), progress=False)

    moments = range(0 if kind == "array" else 1, 1000, 2)
    assert kill.survive_every_kill(tmp_path, monkeypatch, work=work, moments=moments) > 70


def _stop_after(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    done, step = [], loop.train_step

    def stops(*args: Any) -> Any:
        if len(done) == calls:
            raise KeyboardInterrupt
        done.append(1)
        return step(*args)

    monkeypatch.setattr(loop, "train_step", stops)


def test_other_saes_than_those_of_the_run_are_not_resumed_and_lose_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def go(settings: list[dict[str, Any]], *, resume: bool) -> list[SAE]:
        return flashsae.fit_many(X, settings, config=SMALL, run=tmp_path / "run", resume=resume, progress=False)

    with monkeypatch.context() as patch:
        _stop_after(22, patch)
        with pytest.raises(KeyboardInterrupt):
            go([{"k": 2}, {"k": 3}], resume=False)
    before = kill.contents(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"was begun with the SAEs k2, k3, and is asked to go on with k2, k3, k4"):
        go([{"k": 2}, {"k": 3}, {"k": 4}], resume=True)
    with pytest.raises(StorageError, match="exists already and is not overwritten"):
        go([{"k": 2}, {"k": 3}], resume=False)
    assert kill.contents(tmp_path / "run") == before
    whole = flashsae.fit_many(X, [{"k": 2}, {"k": 3}], config=SMALL, progress=False)
    (newest,) = list((tmp_path / "run" / "k3" / "checkpoints").glob("step-*8"))
    assert newest.name == "step-00000008"
    resumed = go([{"k": 3}, {"k": 2}], resume=True)  # their order does not matter
    assert _same(resumed[1], whole[0])
    assert _same(resumed[0], whole[1])


def test_runs_of_one_and_of_several_are_not_taken_for_each_other(tmp_path: Path) -> None:
    flashsae.fit(X, k=2, config=SMALL, run=tmp_path / "one", progress=False)
    several = [{"k": 2}, {"k": 3}]
    flashsae.fit_many(X, several, config=SMALL, run=tmp_path / "several", progress=False)
    with pytest.raises(CheckpointError, match=r"one was begun with one SAE alone, and is asked to go on with k2, k3\."):
        flashsae.fit_many(X, several, config=SMALL, run=tmp_path / "one", resume=True, progress=False)
    with pytest.raises(CheckpointError, match=r"is of several SAEs, which go on together: resume with what began them"):
        flashsae.fit(X, k=2, config=SMALL, run=tmp_path / "several", resume=True, progress=False)
    with pytest.raises(CheckpointError, match=r"is of one of several SAEs, which .* Resume the run of all of them"):
        flashsae.fit(X, k=2, config=SMALL, run=tmp_path / "several" / "k2", resume=True, progress=False)


@pytest.mark.parametrize("gone", ["checkpoints", "k2/checkpoints"])
def test_checkpoints_that_are_gone_are_told_of(gone: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flashsae.fit_many(X, [{"k": 2}, {"k": 3}], config=SMALL, run=run, progress=False)
    shutil.rmtree(run / gone)
    with pytest.raises(CheckpointError, match=r"(is missing, which says where|has no checkpoint of one step for all)"):
        flashsae.fit_many(X, [{"k": 2}, {"k": 3}], config=SMALL, run=run, resume=True, progress=False)
    assert (run / "k3" / "checkpoints" / "step-00000012").exists()


def _diverging(monkeypatch: pytest.MonkeyPatch, at: int = 6) -> None:
    """Let the loss of the SAE with a seed of 7 not be finite at a step."""
    step = loop.train_step

    def stumbles(state: Any, batch: Any, config: TrainConfig) -> dict[str, Tensor]:
        metrics = step(state, batch, config)
        return {**metrics, "loss": metrics["loss"] * torch.nan} if config.seed == 7 and state.step == at else metrics

    monkeypatch.setattr(loop, "train_step", stumbles)


def test_one_that_diverges_is_told_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, run = [{"k": 2}, {"k": 2, "seed": 7}, {"k": 3}], tmp_path / "run"
    alone = [flashsae.fit(X, config=SMALL, progress=False, **settings[n]) for n in (0, 2)]
    _diverging(monkeypatch)
    config = TrainConfig(**{**vars(SMALL), "log_every_steps": 1})
    message = r"1 of 3 SAEs failed, and `saes` of this has the others: k2-seed7: step 6: the loss is nan"
    with pytest.raises(DivergedError, match=message) as caught:
        flashsae.fit_many(X, settings, config=config, run=run, progress=False)
    assert caught.value.saes[1] is None
    for sae, expected in zip([caught.value.saes[n] for n in (0, 2)], alone):
        assert _same(sae, expected)
    assert (run / "k2-seed7" / "failed.json").exists()
    shutil.rmtree(run / "k2-seed0" / "checkpoints" / "step-00000012")
    with pytest.raises(DivergedError, match="k2-seed7: step 6") as again:  # the others resume without it
        flashsae.fit_many(X, settings, config=config, run=run, resume=True, progress=False)
    assert _same(again.value.saes[2], alone[1])


def test_a_single_one_of_a_list_is_trained(tmp_path: Path) -> None:
    (sae,) = flashsae.fit_many(X, [{"k": 2}], config=SMALL, run=tmp_path / "run", progress=False)
    assert _same(sae, flashsae.fit(X, k=2, config=SMALL, progress=False))


def test_configs_and_names_make_the_settings_of_each() -> None:
    settings = [TrainConfig(**{**vars(SMALL), "seed": 3}), SMALL]
    saes = flashsae.fit_many(X.numpy(), settings, k=2, progress=False)
    expected = flashsae.fit(X, k=2, seed=3, config=SMALL, progress=False)
    assert _same(saes[0], expected)
    assert [sae.config.arch.k for sae in saes] == [2, 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], r"^settings: expected settings of at least one SAE, got none\."),
        ({"k": 2}, r"^settings: expected a list with settings for each SAE, got a dict\."),
        (["k"], r"^settings: expected a dict of settings or a TrainConfig for each SAE, got str as number 0\."),
        ([{"k": 2}, {"k": 2}], r"^settings: expected SAEs that differ, got number 1 as number 0 is\."),
        ([{"k": 2}, {"kk": 2}], r"^kk: topk, the arch of config, has no such setting\. Did you mean k\?"),
        ([{"tokens": 640}, {"tokens": 1280}], r"^tokens: expected one value, since the SAEs train side by side, got"),
        ([{"batch_tokens": 32}, {}], r"^batch_tokens: expected one value, .* got 32, 64\."),
        (
            [{"device": "cpu"}, {"k": 3}],
            r"^device: expected one value, since the SAEs .*, got auto, cpu",
        ),
        ([{"hookpoint": "y"}, {"k": 3}], r"^hookpoint: expected sites of x, x, got 'y'\."),
        ([{"k": 2}, {"k": 99}], r"^k: expected k <= d_sae = 16, got 99\."),
    ],
)
def test_what_makes_no_saes_is_told(settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        flashsae.fit_many(X, settings, config=SMALL, progress=False)


def test_a_full_disk_stops_all_and_what_was_written_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, run = [{"k": 2}, {"k": 3}], tmp_path / "run"
    whole = flashsae.fit_many(X, settings, config=SMALL, progress=False)
    save, calls = following.save_checkpoint, []

    def full(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise StorageError("could not write: No space left on device.")
        return save(*args)

    with monkeypatch.context() as patch:
        patch.setattr(following, "save_checkpoint", full)
        with pytest.raises(StorageError, match="No space left"):
            flashsae.fit_many(X, settings, config=SMALL, run=run, progress=False)
    resumed = flashsae.fit_many(X, settings, config=SMALL, run=run, resume=True, progress=False)
    assert all(map(_same, resumed, whole))


def test_warnings_come_once(recwarn: pytest.WarningsRecorder) -> None:
    spiked = X.clone()
    spiked[::200] *= 1000
    with pytest.warns(flashsae.errors.FlashSAEWarning, match="hold") as caught:
        flashsae.fit_many(spiked, [{"k": 2}, {"k": 3}], config=SMALL, progress=False)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    told: list[str] = []
    one, other = (WarnOfOne(told.append, name, set()) for name in ("one", "other"))
    one.on_warning("of the data")
    one.on_step(1)
    one.on_warning("of itself")
    other.on_warning("of the data")
    assert told == ["of the data", "one: of itself", "of the data"]


def test_numpy_rows_of_many_sites_are_arrays_too() -> None:
    x = {"a": np.asarray(X), "b": np.asarray(X) * 2}
    assert len(flashsae.fit_many(x, [{"hookpoint": "a"}, {"hookpoint": "b"}], k=2, config=SMALL, progress=False)) == 2


def test_data_that_end_early_end_all_of_them_as_one_alone(tmp_path: Path) -> None:
    settings = [{"k": 2}, {"k": 3, "seed": 5}]
    given: dict[str, Any] = {"config": SMALL, "tokens": 64 * 30, "progress": False}
    with pytest.warns(flashsae.errors.FlashSAEWarning, match="The SAE is that of 640 tokens, not 1,920"):
        many = flashsae.fit_many(iter(X.split(50)), settings, run=tmp_path / "run", **given)
    for sae, one in zip(many, settings, strict=True):
        with pytest.warns(flashsae.errors.FlashSAEWarning, match="The SAE is that of 640 tokens"):
            assert _same(sae, flashsae.fit(iter(X.split(50)), **given, **one))
    assert [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())][-1] == "step-00000010"
