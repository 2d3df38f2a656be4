"""The whole of `flashsae train`, in real processes that are really killed."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import flashsae
from flashsae.data.cache import ActivationCache
from flashsae.data.language_model import LanguageModelSource
from flashsae.data.open import ActivationsConfig
from flashsae.errors import ConfigError
from flashsae.files.documents import load_tensors
from flashsae.report.snippet_file import read_snippets
from flashsae.report.summary import final_figures
from flashsae.run.execute import execute, new_run, show_plan
from flashsae.settings import RunConfig
from flashsae.text.open import open_text
from flashsae.train import TrainConfig

pytestmark = pytest.mark.slow
ON_THE_WHOLE = pytest.mark.xdist_group("whole run")

FLASHSAE = [sys.executable, "-c", "from flashsae.cli import main; main()"]


def _settings(hookpoint: str = "encoder.layer.0", tokens: str = "24_576") -> list[str]:
    sizes = ["--d-sae", "512", "--k", "8", "--tokens", tokens, "--batch-tokens", "256", "--shuffle-tokens", "4096"]
    return [*sizes, "--checkpoint-every-steps", "8", "--hookpoint", hookpoint, "--context-length", "64"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    documents = open_text("python-docs").documents()
    path = tmp_path_factory.mktemp("text") / "docs.jsonl"
    path.write_text("".join(json.dumps({"text": next(documents)}) + "\n" for _ in range(150)))
    return path


def _command(*arguments: str | Path) -> list[str]:
    return [*FLASHSAE, *map(str, arguments)]


def _environment() -> dict[str, str]:
    # one thread, so that machines that are busy with other tests neither crawl nor sum in another order
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}


def _call(*arguments: str | Path, cwd: Path | None = None) -> str:
    command = _command(*arguments)
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=_environment(), cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _weights(run: Path) -> str:
    return hashlib.sha256((run / "sae" / "flashsae.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    run = tmp_path_factory.mktemp("whole") / "run"
    return run, _call("train", "minilm", text, *_settings(), "--run", run)


@ON_THE_WHOLE
def test_a_run_ends_with_figures_and_a_report(whole: tuple[Path, str]) -> None:
    run, output = whole
    for words in ("Plan", "peak memory", "512", "Result", "held-out FVU", "L0", "dead latents", "tokens/s"):
        assert words in output
    result = json.loads((run / "evaluation.json").read_text())
    assert 0.05 < result["fvu"] < 0.7
    assert result["l0"] == pytest.approx(8, abs=0.2)
    assert result["steps"] == 96
    page = (run / "report.html").read_text("utf-8")
    assert "encoder.layer.0" in page
    assert "<svg" in page
    sae = flashsae.SAE.load(run / "sae")
    (cache,) = (run.parent / "activations").iterdir()
    source = ActivationCache(cache)
    held_out = source.rows(source.split_rows("held_out"))["encoder.layer.0"].float()
    assert flashsae.evaluate(sae, held_out).fvu == pytest.approx(result["fvu"], rel=1e-6)
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert log[-1]["held_out_fvu"] == pytest.approx(result["fvu"], rel=0.05)


@ON_THE_WHOLE
def test_the_report_agrees_with_the_evaluation_and_the_terminal(whole: tuple[Path, str]) -> None:
    run, output = whole
    evaluation = json.loads((run / "evaluation.json").read_text())
    page = (run / "report.html").read_text("utf-8")
    printed = " ".join(output.split())
    for figure in final_figures(evaluation):
        assert f"{figure.name} {figure.line()}" in printed
        assert f">{figure.value}<" in page
    assert int(load_tensors(run / "latents.safetensors")["is_dead"].sum()) == evaluation["dead_latents"]
    assert str(run.parent) not in page
    assert str(run.parent) not in (run / "snippets.json").read_text()
    snippets = read_snippets(run / "snippets.json")
    splits = [snippet.split for latent in snippets.latents for snippet in latent.snippets]
    assert None not in splits
    assert splits.count("held_out") > 0
    assert 0 < (snippets.held_out_tokens or 0) < snippets.tokens


@ON_THE_WHOLE
def test_the_saved_settings_are_resolved_and_make_the_same_run(whole: tuple[Path, str], tmp_path: Path) -> None:
    run, _ = whole
    config = RunConfig.from_toml(run / "config.toml")
    assert config.train.lr is not None
    assert config.activations.hookpoint == "encoder.layer.0"
    _call("train", "--config", run / "config.toml", "--run", tmp_path / "again", "--no-report")
    assert _weights(tmp_path / "again") == _weights(run)
    assert not (tmp_path / "again" / "report.html").exists()
    assert str(tmp_path) in _call("report", tmp_path / "again")
    assert (tmp_path / "again" / "report.html").exists()
    again, first = (folder / "latents.safetensors" for folder in (tmp_path / "again", run))
    assert again.read_bytes() == first.read_bytes()  # also which latents were dead, though training is long over


def _kill_when(condition: Callable[[], bool], command: list[str]) -> bool:
    """Start a process, SIGKILL it as soon as the condition holds; return whether it was still running."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=_environment())
    deadline = time.monotonic() + 100
    while process.poll() is None and not condition():
        assert time.monotonic() < deadline, "the process never got there"
        time.sleep(0.002)
    alive = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return alive


def _any(run: Path, pattern: str) -> Callable[[], bool]:
    return lambda: any(run.parent.glob(pattern))


@ON_THE_WHOLE
@pytest.mark.parametrize(
    "moment",
    [
        "activations/*/index.json",  # while the model runs
        "run/metrics.jsonl",  # before the first checkpoint
        "run/checkpoints/.step-00000016*",  # in the middle of writing a checkpoint
        "run/checkpoints/step-00000040",  # between two checkpoints
        "run/evaluation.json",  # after training, before the report
    ],
)
def test_a_kill_at_any_moment_changes_no_byte(moment: str, text: Path, whole: tuple[Path, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    if not moment.startswith("activations"):
        (tmp_path / "activations").symlink_to(whole[0].parent / "activations")
    has_report = "checkpoint" not in moment  # kills between and in checkpoints need no report to show themselves
    flags = [] if has_report else ["--no-report"]
    command = _command("train", "minilm", text, *_settings(), *flags, "--run", run)
    assert _kill_when(_any(run, moment), command), f"ended before {moment} was there"
    assert not (run / "report.html").exists()
    _call("train", "--resume", run)
    assert _weights(run) == _weights(whole[0])
    assert (run / "report.html").exists() == has_report
    assert (run / "metrics.jsonl").read_text().count("\n") == (whole[0] / "metrics.jsonl").read_text().count("\n")


def test_sigterm_stops_like_ctrl_c_and_two_processes_do_not_share_a_run(text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = [*_settings(tokens="4_915_200"), "--stream", "--no-report"]  # far longer than the test
    command = _command("train", "minilm", text, *settings, "--run", run)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=_environment(), text=True)
    while not _any(run, "run/checkpoints/step-*")():
        assert process.poll() is None
        time.sleep(0.01)
    second = subprocess.run(
        _command("train", "--resume", run), capture_output=True, text=True, check=False, env=_environment()
    )
    assert second.returncode == 1
    assert "another process works in" in second.stderr
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == 130
    assert f"Go on with: flashsae train --resume {run}" in output


def test_a_plan_says_what_a_run_needs_and_makes_nothing(text: Path, tmp_path: Path) -> None:
    def plan(*arguments: str) -> str:
        output = _call("train", "minilm", text, *_settings(), "--plan", *arguments, cwd=tmp_path)
        return " ".join(output.replace("│", " ").split())

    cached, streamed = plan(), plan("--stream")
    assert "TopK, d_sae 512, k 8: 394,112 parameters" in cached
    assert "24,576 tokens in 96 steps of 256" in cached
    assert "weights 0.00, moments of Adam 0.00" in cached
    assert "language model" not in cached
    assert "language model 0.09" in streamed
    assert "shuffle buffer 4,096 tokens, which the model reads before the first step" in streamed
    assert "shuffle buffer" not in cached
    assert list(tmp_path.iterdir()) == []


def test_the_language_model_is_let_go_before_training(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[weakref.ref[LanguageModelSource]] = []

    class Watched(LanguageModelSource):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            models.append(weakref.ref(self))

    def no_training(*args: Any, **kwargs: Any) -> None:
        gc.collect()
        raise InterruptedError(f"{[model() for model in models]}")

    monkeypatch.setattr("flashsae.data.open.LanguageModelSource", Watched)
    monkeypatch.setattr("flashsae.run.rounds.train", no_training)
    train = TrainConfig(d_sae=64, k=4, tokens=2048, batch_tokens=256, device="cpu")
    activations = ActivationsConfig("minilm", str(text), hookpoint="encoder.layer.0", context_length=64, held_out=0.3)
    run = new_run(RunConfig(activations, train, report=False), tmp_path / "run")
    with pytest.raises(InterruptedError, match=r"^\[None\]$"):
        execute(run, Console(quiet=True))


def test_streaming_needs_no_cache_and_resumes(text: Path, tmp_path: Path) -> None:
    settings = [*_settings(tokens="10_240"), "--stream", "--no-report"]
    _call("train", "minilm", text, *settings, "--run", tmp_path / "whole")
    assert not (tmp_path / "activations").exists()
    run = tmp_path / "run"
    assert _kill_when(
        _any(run, "run/checkpoints/step-00000016"), _command("train", "minilm", text, *settings, "--run", run)
    )
    _call("train", "--resume", run)
    assert _weights(run) == _weights(tmp_path / "whole")


def test_a_wildcard_trains_one_sae_for_each_hookpoint(text: Path, tmp_path: Path) -> None:
    settings = _settings(hookpoint="encoder.layer.[01]", tokens="8192")
    _call("train", "minilm", text, *settings, "--run", tmp_path / "run")
    for name in ("encoder.layer.0", "encoder.layer.1"):
        assert flashsae.SAE.load(tmp_path / "run" / name / "sae").config.d_sae == 512
        assert (tmp_path / "run" / name / "report.html").exists()
    before = _weights(tmp_path / "run" / "encoder.layer.1")
    _call("train", "--resume", tmp_path / "run")
    assert _weights(tmp_path / "run" / "encoder.layer.1") == before
    assert _call("report", tmp_path / "run").count("report.html") == 2


def test_a_wildcard_trains_one_sae_for_each_hookpoint_of_a_stream_and_resumes(text: Path, tmp_path: Path) -> None:
    settings = [*_settings(hookpoint="encoder.layer.[01].intermediate:in", tokens="4096"), "--stream", "--no-report"]
    _call("train", "minilm", text, *settings, "--run", tmp_path / "whole")
    names = [f"encoder.layer.{layer}.intermediate@in" for layer in (0, 1)]
    assert sorted(path.name for path in (tmp_path / "whole").iterdir() if path.is_dir()) == ["checkpoints", *names]
    assert not (tmp_path / "activations").exists()
    run = tmp_path / "run"
    command = _command("train", "minilm", text, *settings, "--run", run)
    assert _kill_when(_any(run, f"run/{names[1]}/checkpoints/step-00000008"), command)
    _call("train", "--resume", run)
    for name in names:
        assert _weights(run / name) == _weights(tmp_path / "whole" / name)
    assert flashsae.SAE.load(run / names[0] / "sae").config.d_in == 384


def test_one_of_several_processes_begins_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run(RunConfig(), tmp_path / "run")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for begin in (lambda: execute(run, Console()), lambda: show_plan(RunConfig(), tmp_path / "other", Console())):
        with pytest.raises(ConfigError, match="WORLD_SIZE is 2: a training is one process"):
            begin()


@pytest.fixture(scope="module")
def sites(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a cache of the input and the output of an MLP, and of two layers."""
    folder = tmp_path_factory.mktemp("sites") / "acts"
    places = ["encoder.layer.0.intermediate:in", "encoder.layer.0.output.dense", "encoder.layer.{0,1}"]
    options = [word for place in places for word in ("--hookpoint", place)]
    _call("cache", "minilm", text, *options, "--context-length", "64", "--max-tokens", "9000", "--out", folder)
    return folder


@pytest.mark.parametrize(
    ("arch", "hookpoints"),
    [
        ("skip_transcoder", ["encoder.layer.0.intermediate:in", "encoder.layer.0.output.dense"]),
        ("crosscoder", ["encoder.layer.{1,0}"]),
    ],
)
def test_an_sae_of_several_hookpoints_is_killed_resumed_and_reported(
    arch: str, hookpoints: list[str], sites: Path, tmp_path: Path
) -> None:
    sizes = ["--d-sae", "256", "--k", "8", "--tokens", "8192", "--batch-tokens", "256", "--checkpoint-every-steps", "8"]
    settings = ["--activations", sites, "--arch", arch, *sizes, "--held-out", "0.2"]
    settings += [word for hookpoint in hookpoints for word in ("--hookpoint", hookpoint)]
    output = _call("train", *settings, "--run", tmp_path / "whole")
    run = tmp_path / "run"
    assert _kill_when(_any(run, "run/checkpoints/step-00000016"), _command("train", *settings, "--run", run))
    _call("train", "--resume", run)
    assert _weights(run) == _weights(tmp_path / "whole")
    sae, result = flashsae.SAE.load(run / "sae"), json.loads((run / "evaluation.json").read_text())
    assert sae.architecture.name == arch
    assert result["fvu"] < 0.8
    page = (run / "report.html").read_text("utf-8")
    names = ["encoder.layer.0", "encoder.layer.1"] if arch == "crosscoder" else hookpoints
    assert RunConfig.from_toml(run / "config.toml").activations.hookpoint == ", ".join(names)
    assert ", ".join(names) in page
    if arch == "crosscoder":
        assert (sae.config.arch.sites, sae.config.arch.widths) == (tuple(names), (384, 384))
        assert list(result["site_fvu"]) == names
        assert all(f"held-out FVU at {name}" in text for name in names for text in (page, " ".join(output.split())))
