"""What a user gets for bad input: one clear sentence on standard error, an exit code that is not 0, nothing lost."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from flashsae.cli import main


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"Paragraph number {i} says that the cat sat on mat {i}." for i in range(60)))
    return path


def _main(*arguments: str | Path) -> int:
    try:
        main(list(map(str, arguments)))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def _error(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert _main(*arguments) not in (0, None)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    return " ".join((captured.err + captured.out).replace("│", " ").split())


def _train(text: Path, run: Path, *more: str | Path) -> tuple[str | Path, ...]:
    batch = () if "--batch-tokens" in more else ("--batch-tokens", "64")
    return ("train", "minilm", text, "--run", run, "--tokens", "512", *batch, "--no-report", *more)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--k", "0"], "flashsae: k: expected a positive number, got 0."),
        (["--k", "65", "--d-sae", "64"], "k: expected k <= d_sae = 64, got 65."),
        (["--held-out", "1.5"], "held_out is a fraction of the data: expected 0 <= held_out < 1, got 1.5."),
        (["--held-out", "0"], "held_out: expected more than 0"),
        (["--held-out", "0.0001"], "is too small: no document fell to the held-out part"),
        (["--hookpoint", "encoder.layr.2"], "Near: encoder.layer.2"),
        (["--hookpoint", "encoder.layer.77"], "no module 'encoder.layer.77'"),
        (["--context-length", "0"], "context_length: expected a positive number, got 0."),
        (["--context-length", "9999"], "context_length: minilm reads at most 512 tokens, got 9999."),
        (["--batch-tokens", "5000"], "batch_tokens: expected batch_tokens <= tokens = 512, got 5000."),
        (["--device", "cuda:9"], "device: expected auto, cpu or a CUDA device that exists, got 'cuda:9'"),
        (["--logger", "mlflow"], "logger: expected one of tensorboard, wandb, got 'mlflow'."),
        (["--kk", "3"], "Unknown option: --kk"),
        (["--k", "many"], "Invalid value for --k"),
    ],
)
def test_bad_settings_are_one_sentence(
    more: list[str],
    message: str,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert message in _error(capsys, *_train(text, tmp_path / "run", *more))
    assert "--resume" not in message
    assert not (tmp_path / "run").exists()  # so the corrected command can be given at once


@pytest.mark.parametrize("setting", [("--held-out", "0.1"), ("--stream",), ("--activations", "acts")])
def test_a_cache_takes_no_setting_that_it_would_ignore(
    setting: tuple[str, ...], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = _error(capsys, "cache", "minilm", text, "--out", tmp_path / "acts", *setting)
    assert f"Unknown option: {setting[0]}" in message
    assert not (tmp_path / "acts").exists()


def test_bad_data_sets_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n")
    assert "is empty" in _error(capsys, *_train(empty, tmp_path / "a"))
    assert "none.txt" in _error(capsys, *_train(tmp_path / "none.txt", tmp_path / "b"))
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"body": "x"}\n')
    message = _error(capsys, *_train(lines, tmp_path / "c"))
    assert "text" in message
    assert "body" in message


def test_a_run_is_never_overwritten(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "precious").write_text("x")
    message = _error(capsys, *_train(text, run))
    assert f"{run} exists already and is not overwritten. Go on with it: flashsae train --resume {run}" in message
    assert (run / "precious").read_text() == "x"


def test_resume_of_what_is_no_run_and_with_other_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "Name a folder that flashsae train made." in _error(capsys, "train", "--resume", tmp_path)
    message = _error(capsys, "train", "--resume", tmp_path, "--k", "3")
    assert "resume: expected no other setting beside it" in message


def test_a_damaged_checkpoint_is_refused_and_the_way_out_is_named(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert _main(*_train(text, run)) == 0
    capsys.readouterr()
    (checkpoint,) = (run / "checkpoints").iterdir()
    tensors = checkpoint / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    message = _error(capsys, "train", "--resume", run)
    assert "tensors.safetensors is damaged" in message
    assert f"Remove the folder {checkpoint.name}" in message
    for file in checkpoint.iterdir():
        file.unlink()
    checkpoint.rmdir()
    assert _main("train", "--resume", run) == 0


def test_a_cache_that_does_not_match_is_refused(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = tmp_path / "acts"
    assert _main("cache", "minilm", text, "--hookpoint", "encoder.layer.0", "--out", cache) == 0
    assert f"flashsae train --activations {cache}" in capsys.readouterr().out
    common = ("--activations", cache, "--tokens", "512", "--batch-tokens", "64", "--no-report")
    message = _error(capsys, "train", "minilm", *common, "--context-length", "32", "--run", tmp_path / "a")
    assert "context_length is 256 there, 32 was asked for" in message
    message = _error(capsys, "train", *common, "--hookpoint", "encoder.layer.1", "--run", tmp_path / "b")
    assert "holds encoder.layer.0" in message
    message = _error(capsys, "train", *common, "--stream", "--run", tmp_path / "c")
    assert "expected no --activations beside --stream" in message
    assert _main("train", *common, "--run", tmp_path / "d") == 0  # all from the cache
    description = json.loads((tmp_path / "d" / "sae" / "flashsae.json").read_text())
    assert description["metadata"]["hookpoint"] == "encoder.layer.0"


def test_a_missing_extra_is_named_before_anything_is_done(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    arguments = [argument for argument in _train(text, tmp_path / "run") if argument != "--no-report"]
    message = _error(capsys, *arguments)
    assert "pip install 'flashsae[report]'" in message
    assert not (tmp_path / "activations").exists()
    monkeypatch.setitem(sys.modules, "transformers", None)
    message = _error(capsys, *_train(text, tmp_path / "other"))
    assert "pip install 'flashsae[hf]'" in message


def test_settings_from_a_file(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "my.toml"
    config.write_text('k = 5\nd_sae = 96\nhookpoint = "encoder.layer.0"\n')
    assert _main(*_train(text, tmp_path / "run", "--config", config, "--k", "6")) == 0
    saved = (tmp_path / "run" / "config.toml").read_text()
    assert "d_sae = 96" in saved
    assert "k = 6" in saved  # a flag beats the file
    config.write_text("kk = 5\n")
    assert "kk" in _error(capsys, *_train(text, tmp_path / "other", "--config", config))
    config.write_text("[train]\nk = 5\n")
    assert "got the section [train]" in _error(capsys, *_train(text, tmp_path / "other", "--config", config))
    config.write_text("k = = 5\n")
    assert "my.toml" in _error(capsys, *_train(text, tmp_path / "other", "--config", config))
    assert "none.toml" in _error(capsys, *_train(text, tmp_path / "other", "--config", "none.toml"))


def test_doctor_tells_versions_devices_and_backends(capsys: pytest.CaptureFixture[str]) -> None:
    assert _main("doctor") == 0
    output = capsys.readouterr().out
    for words in ("flashsae", "torch", "cpu", "backend triton: does not work", "backend reference: works"):
        assert words in output
