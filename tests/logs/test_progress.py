from __future__ import annotations

import io

import pytest
from rich.console import Console

from flashsae.errors import DataError
from flashsae.logs.progress import ProgressBar, StageBar, filling

RECORD = {"step": 3, "tokens": 30, "loss": 0.5, "fvu": 0.5, "dead_latents": 2.0, "lr": 1e-3}


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


def test_without_a_terminal_a_stage_whose_end_is_not_known_tells_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, now = io.StringIO(), [0.0]
    monkeypatch.setattr("flashsae.logs.progress.time.monotonic", lambda: now[0])
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
