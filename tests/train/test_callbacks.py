from __future__ import annotations

import builtins
import io
from pathlib import Path

import pytest
from rich.console import Console

from flashsae.errors import CheckpointError, ConfigError, DataError, MissingExtraError, StorageError
from flashsae.train.callbacks import JsonlLog, ProgressBar, StageBar, build_logger, filling, read_log

RECORD = {"step": 3, "tokens": 30, "loss": 0.5, "fvu": 0.5, "dead_latents": 2.0, "lr": 1e-3}


def test_the_log_is_cut_to_the_checkpoint_and_gone_on_with(tmp_path: Path) -> None:
    with JsonlLog(tmp_path) as log:
        log.on_start(0, 10)
        for step in (1, 2, 3, 4):
            log.on_log({**RECORD, "step": step})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 5, "tok')  # a kill in the middle of a line
    assert [record["step"] for record in read_log(path)] == [1, 2, 3, 4]
    with JsonlLog(tmp_path) as log:
        log.on_start(2, 10)
        log.on_log(RECORD)
        assert read_log(path)[-1] == RECORD  # at once, not at the end
    assert [record["step"] for record in read_log(path)] == [1, 2, 3]


def test_damage_inside_the_log_is_named(tmp_path: Path) -> None:
    (tmp_path / "m").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(CheckpointError, match=r"m, line 2 is damaged"):
        read_log(tmp_path / "m")


def test_a_full_disk_under_the_log_is_one_sentence(tmp_path: Path) -> None:
    with JsonlLog(tmp_path) as log:
        log.on_start(0, 10)
        assert log._file is not None
        log._file.close()
        log._file = io.TextIOWrapper(open("/dev/full", "ab", buffering=0), write_through=True)  # noqa: SIM115
        with pytest.raises(StorageError, match=r"could not write .*metrics\.jsonl: No space left on device"):
            log.on_log(RECORD)


@pytest.mark.parametrize("terminal", [True, False])
def test_the_bar_shows_figures_on_terminals_and_lines_elsewhere(terminal: bool) -> None:
    out = io.StringIO()
    with ProgressBar(Console(file=out, force_terminal=terminal, width=120)) as bar:
        bar.on_start(0, 30)
        bar.on_log(RECORD)
        bar.on_step(3)
        bar.on_step(4)
    text = out.getvalue()
    assert "FVU 0.500" in text
    assert text.count("training: 3 of 30 steps") == (0 if terminal else 1)
    assert "4 of 30" not in text or terminal


def test_tensorboard_receives_every_figure(tmp_path: Path) -> None:
    with build_logger("tensorboard", tmp_path, {}) as logger:
        logger.on_start(0, 10)
        logger.on_log(RECORD)
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == RECORD.keys() - {"step"}
    assert [(e.step, e.value) for e in events.Scalars("fvu")] == [(3, 0.5)]


def test_wandb_receives_every_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    class Run:
        def log(self, record: dict[str, float], step: int) -> None:
            calls.append((record, step))

        def finish(self) -> None:
            calls.append("finished")

    class Wandb:
        @staticmethod
        def init(**options: object) -> Run:
            calls.append(options["config"])
            return Run()

    monkeypatch.setitem(__import__("sys").modules, "wandb", Wandb)
    with build_logger("wandb", tmp_path, {"k": 4}) as logger:
        logger.on_log(RECORD)
    assert calls == [{"k": 4}, (RECORD, 3), "finished"]


def test_a_logger_that_is_not_there_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)  # as if it were not installed
    assert original is builtins.__import__
    with pytest.raises(MissingExtraError, match=r"pip install 'flashsae\[wandb\]'"):
        build_logger("wandb", tmp_path, {})
    with pytest.raises(ConfigError, match="logger: expected one of tensorboard, wandb, got 'mlflow'"):
        build_logger("mlflow", tmp_path, {})


def test_without_a_terminal_a_stage_whose_end_is_not_known_tells_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, now = io.StringIO(), [0.0]
    monkeypatch.setattr("flashsae.train.callbacks.time.monotonic", lambda: now[0])
    bar = StageBar(Console(file=out), "activations", "tokens")
    bar.start(0, None)
    for done, seconds in ((1000, 1), (2000, 21), (3000, 22), (4000, 23)):
        now[0] = seconds
        bar.update(done)
    bar.stop()
    assert out.getvalue() == "activations: 2,000 tokens\nactivations: 4,000 tokens\n"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_stage_that_had_less_to_do_than_was_expected_ends_full(is_terminal: bool) -> None:
    out = io.StringIO()
    bar = StageBar(Console(file=out, force_terminal=is_terminal, width=120), "texts", "tokens")
    bar.start(0, 1000)
    bar.update(120)
    bar.finish()
    assert "120/120" in out.getvalue() if is_terminal else out.getvalue().endswith("texts: 120 of 120 tokens\n")
    assert not bar._bar.live.is_started


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_buffer_that_is_filled_shows_how_far_it_is(is_terminal: bool) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=is_terminal, width=120)
    with filling(console):
        pass  # a buffer that a checkpoint puts back is not filled
    assert out.getvalue() == ""
    with filling(console) as on_fill:
        for done in (10, 30, 60):
            on_fill(done, 100)
    if is_terminal:
        assert "shuffle buffer" in out.getvalue()
        assert "60/60" in out.getvalue()  # all that there was
    else:
        lines = [f"shuffle buffer: {done} tokens\n" for done in ("10 of 100", "30 of 100", "60 of 100", "60 of 60")]
        assert out.getvalue() == "".join(lines)

    def fail() -> None:
        with filling(console) as on_fill:
            on_fill(10, 100)
            raise DataError("NaN")

    with pytest.raises(DataError, match="NaN"):
        fail()
    assert console._live_stack == []
