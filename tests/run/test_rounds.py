"""Runs of several SAEs: cached and streamed, stopped and resumed, in rounds, extended, and with one that fails."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

import flashsae
from flashsae.cli import main
from flashsae.data import language_model
from flashsae.errors import ConfigError
from flashsae.run import start
from flashsae.run.execute import draw_report, execute, new_run, show_plan
from flashsae.settings import ActivationsConfig, RunConfig
from flashsae.settings.run import CONFIG_FILE
from flashsae.train import TrainConfig
from helpers.quick_runs import quick_runs

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("rounds")]
QUIET = Console(quiet=True)
LOOP = sys.modules["flashsae.train.loop"]
SAES: tuple[dict[str, Any], ...] = (
    {"k": 2},
    {"k": 3, "seed": 5, "hookpoint": "encoder.layer.0"},
    {"arch": "skip_transcoder:batch_topk", "k": 2, "hookpoint": "encoder.layer.0, encoder.layer.1"},
)
NAMES = [
    "encoder.layer.0-topk-k2-seed0",
    "encoder.layer.1-topk-k2-seed0",
    "encoder.layer.0-topk-k3-seed5",
    "encoder.layer.0+encoder.layer.1-skip_transcoder_batch_topk-k2-seed0",
]


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    with quick_runs():
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    (home / "text.txt").write_text("\n\n".join(f"the cat {i} sat on the mat and saw {i * i} mice" for i in range(40)))
    return home


def _config(home: Path, **changes: Any) -> RunConfig:
    reading = {"dataset": str(home / "text.txt"), "hookpoint": "encoder.layer.[01]", "context_length": 16}
    settings: dict[str, Any] = {"d_sae": 24, "tokens": 256, "batch_tokens": 32, "checkpoint_every_steps": 3}
    settings |= {"evaluate_every_steps": 4, "device": "cpu", "shuffle_tokens": 128}
    config = RunConfig(ActivationsConfig(**reading, held_out=0.2), TrainConfig(**settings), (), False, SAES)
    return replace(config, **changes)


def _weights(run: Path, names: list[str] = NAMES) -> dict[str, bytes]:
    return {name: (run / name / "sae" / "flashsae.safetensors").read_bytes() for name in names}


@pytest.fixture(scope="module")
def cached(home: Path) -> Path:
    """A run of all SAEs from a cache."""
    assert execute(new_run(_config(home), home / "cached"), QUIET) == {}
    return home / "cached"


@pytest.fixture(scope="module")
def streamed(home: Path) -> Path:
    config = _config(home)
    config = replace(config, activations=replace(config.activations, stream=True))
    assert execute(new_run(config, home / "streamed"), QUIET) == {}
    return home / "streamed"


@pytest.mark.parametrize("kind", ["cached", "streamed"])
def test_each_sae_has_the_bytes_that_it_has_alone(kind: str, home: Path, request: pytest.FixtureRequest) -> None:
    run: Path = request.getfixturevalue(kind)
    assert sorted(path.name for path in run.iterdir() if path.is_dir()) == sorted([*NAMES, "checkpoints"])
    for name in NAMES:
        alone = home / f"alone-{kind}-{name}"
        execute(new_run(RunConfig.from_toml(run / name / CONFIG_FILE), alone), QUIET)
        for file in ("sae/flashsae.safetensors", "sae/flashsae.json"):
            assert (alone / file).read_bytes() == (run / name / file).read_bytes(), (name, file)
        figures = [json.loads((folder / "evaluation.json").read_text()) for folder in (alone, run / name)]
        assert figures[0]["fvu"] == figures[1]["fvu"]
        logs = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (alone, run / name)]
        assert [json.loads(line).get("held_out_fvu") for line in logs[0]] == [
            json.loads(line).get("held_out_fvu") for line in logs[1]
        ]


def test_a_stream_is_read_once_for_all(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config(home)
    config = replace(config, activations=replace(config.activations, stream=True))
    reads: list[tuple[str, ...]] = []
    chunks = language_model.LanguageModelSource.chunks

    def watched(self: Any, split: Any, *args: Any) -> Any:
        reads.append((split, *self.hookpoints))
        return chunks(self, split, *args)

    monkeypatch.setattr(language_model.LanguageModelSource, "chunks", watched)
    execute(new_run(config, home / "watched"), QUIET)
    both = ("encoder.layer.0", "encoder.layer.1")
    assert reads == [("held_out", *both), ("train", *both), ("held_out", *both)]


@pytest.mark.parametrize("kind", ["cached", "streamed"])
@pytest.mark.parametrize("after", [4 * 5 + 2, 4 * 6])
def test_a_run_that_was_stopped_resumes_to_the_same_bytes(
    kind: str, after: int, home: Path, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _weights(request.getfixturevalue(kind))
    config = _config(home)
    config = replace(config, activations=replace(config.activations, stream=kind == "streamed" or None))
    done, step = [], LOOP.train_step

    def stops(*args: Any) -> Any:
        if len(done) == after:
            raise KeyboardInterrupt
        done.append(1)
        return step(*args)

    run = new_run(config, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(LOOP, "train_step", stops)
        with pytest.raises(KeyboardInterrupt):
            execute(run, QUIET)
    execute(run, QUIET)
    assert _weights(run) == expected
    execute(run, QUIET)  # of a run that has ended, nothing changes
    assert _weights(run) == expected


def test_rounds_have_the_same_bytes_and_need_a_cache(cached: Path, home: Path, tmp_path: Path) -> None:
    run = new_run(_config(home, at_once=2), home / "rounds")
    execute(run, QUIET)
    assert _weights(run) == _weights(cached)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["round-1", "round-2"]
    config = _config(home)
    streamed = replace(config.activations, stream=True)
    for changes, name in (
        ({"at_once": 2}, "at_once"),
        ({"sae": ({"k": 2, "tokens": 128}, {"k": 3})}, "tokens"),
        ({"sae": ({"k": 2, "batch_tokens": 16}, {"k": 3})}, "batch_tokens"),
    ):
        with pytest.raises(ConfigError, match=rf"^{name}: expected all SAEs side by side where the model streams"):
            show_plan(replace(config, activations=streamed, **changes), tmp_path / "run", QUIET)
    mixed = _config(home, sae=({"k": 2, "tokens": 128}, {"k": 3}))  # of other lengths: rounds over the cache
    execute(new_run(mixed, home / "mixed"), QUIET)
    assert flashsae.SAE.load(home / "mixed" / "encoder.layer.0-k2-tokens128" / "sae").config.arch.k == 2


def test_one_that_fails_is_told_and_the_others_are_done(
    cached: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = LOOP.train_step

    def stumbles(state: Any, batch: Any, config: TrainConfig) -> dict[str, Tensor]:
        metrics = step(state, batch, config)
        return {**metrics, "loss": metrics["loss"] * torch.nan} if config.seed == 5 and state.step > 4 else metrics

    monkeypatch.setattr(LOOP, "train_step", stumbles)
    run = new_run(_config(home, report=True), home / "failing")
    with pytest.raises(SystemExit) as ended:
        main(["train", "--resume", str(run)])
    assert ended.value.code == 1
    told = capsys.readouterr()
    assert f"1 of the SAEs of {run} failed, and the others are done: {NAMES[2]}: step 6: the loss is nan" in told.err
    others = [name for name in NAMES if name != NAMES[2]]
    assert _weights(run, others) == _weights(cached, others)
    page = (run / "comparison.html").read_text("utf-8")
    assert "step 6: the loss is nan" in page
    assert f"{others[0]}/report.html" in page
    assert not (run / NAMES[2] / "report.html").exists()
    monkeypatch.setattr(LOOP, "train_step", step)
    assert list(execute(run, QUIET)) == [NAMES[2]]  # what failed is not tried again by itself
    assert len(draw_report(run, QUIET)) == len(others) + 1
    (run / NAMES[2] / "failed.json").write_text("{}")
    with pytest.raises(flashsae.errors.CheckpointError, match=r"failed\.json.* Put a copy of it back"):
        execute(run, QUIET)


def test_a_run_that_has_ended_is_extended(home: Path, cached: Path) -> None:
    run = new_run(_config(home), home / "extended")
    with pytest.raises(ConfigError, match=r"^extend: expected a run that has ended, and .* has done 0 of 8 steps\."):
        start.extended(start.saved_config(run), run, 64)
    execute(run, QUIET)
    with pytest.raises(ConfigError, match=r"^extend: expected at least 1 tokens, which make another step, got 0\."):
        start.extended(start.saved_config(run), run, 0)
    before = (run / CONFIG_FILE).read_bytes()
    start.write_extended(start.extended(start.saved_config(run), run, 64), run)
    with pytest.raises(ConfigError, match=r"not begun with what it was extended by\. Finish it first: flashsae train"):
        start.extended(start.saved_config(run), run, 64)  # the same command again, after a kill
    (run / CONFIG_FILE).write_bytes(before)
    with pytest.raises(SystemExit) as ended:
        main(["train", "--resume", str(run), "--extend", "64"])
    assert not ended.value.code
    evaluation = (run / NAMES[1] / "evaluation.json").read_bytes()
    (run / NAMES[1] / "evaluation.json").write_bytes((cached / NAMES[1] / "evaluation.json").read_bytes())
    with pytest.raises(ConfigError, match=r"has done its 10 steps and was not measured behind them\. Finish it first"):
        start.extended(start.saved_config(run), run, 64)
    execute(run, QUIET)  # as after a kill before it was measured anew
    assert json.loads((run / NAMES[1] / "evaluation.json").read_text())["fvu"] == json.loads(evaluation)["fvu"]
    whole = replace(_config(home).train, tokens=320, extended=(256,))
    cache = start.saved_config(cached).activations
    other = new_run(
        _config(home, train=whole, activations=replace(cache, hookpoint="encoder.layer.[01]")), home / "in one go"
    )
    execute(other, QUIET)
    assert _weights(run) == _weights(other)
    assert _weights(run) != _weights(cached)
    assert json.loads((run / NAMES[0] / "evaluation.json").read_text())["steps"] == 10
    config = RunConfig.from_toml(run / NAMES[0] / CONFIG_FILE).train
    assert (config.tokens, config.extended) == (320, (256,))


def test_saes_that_were_trained_in_turn_go_on_in_turn(home: Path, cached: Path) -> None:
    """As of runs of earlier versions, where each SAE had a place in the data of its own."""
    run = new_run(_config(home), home / "in turn")
    execute(run, QUIET)
    shutil.rmtree(run / "checkpoints")
    for name in NAMES[1:]:
        shutil.rmtree(run / name)
    alone = home / f"alone-cached-{NAMES[0]}"
    if not alone.exists():
        execute(new_run(RunConfig.from_toml(cached / NAMES[0] / CONFIG_FILE), alone), QUIET)
    shutil.rmtree(run / NAMES[0] / "checkpoints")
    shutil.copytree(alone / "checkpoints", run / NAMES[0] / "checkpoints")
    execute(run, QUIET)
    assert _weights(run) == _weights(cached)


def test_one_of_several_is_not_resumed_by_itself(cached: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--resume", str(cached / NAMES[0])])
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(
        ConfigError, match=rf"^resume: .*{NAMES[0]} is one of the SAEs of .*cached, which go on together"
    ):
        execute(cached / NAMES[0], QUIET)


def test_a_plan_names_all_and_says_how_many_fit(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def plan(**changes: Any) -> str:
        show_plan(_config(home, **changes), tmp_path / "run", Console(width=200))
        return " ".join(capsys.readouterr().out.split())

    shown = plan()
    assert "4 SAEs side by side" in shown
    assert all(name in shown for name in NAMES)
    assert "256 tokens in 8 steps of 32" in shown
    assert "in 2 rounds, one after another" in plan(at_once=2)
    module = sys.modules["flashsae.train.plan"]
    monkeypatch.setattr(module, "_PROCESS_BYTES", 0)
    monkeypatch.setattr(module, "_cpu_step", lambda _: 10**5)
    monkeypatch.setattr(module, "memory_bytes", lambda _: 29 * 10**5)
    assert "3 of 4 SAEs fit side by side: --at-once 3 trains them in rounds" in plan()
    monkeypatch.setattr(module, "memory_bytes", lambda _: 25 * 10**5)
    message = r"^at_once: a training of this size keeps .* in all\. 3 of 4 SAEs fit side by side: --at-once 3 trains"
    with pytest.raises(ConfigError, match=message):
        plan()
