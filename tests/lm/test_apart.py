"""Windows that another process cuts are those that this one would cut, whatever becomes of the process."""

from __future__ import annotations

import errno
import pickle
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from threading import Barrier
from types import ModuleType, SimpleNamespace

import pytest
import torch

from flashsae.data.split import HeldOut
from flashsae.errors import DataError
from flashsae.lm.apart import WindowsApart, _Process
from flashsae.lm.windows import TokenBatch, Windows
from flashsae.settings.reading import ReadingConfig
from flashsae.text.content import Block, Content, Tokens

BLOCK: Block = [(number, f"document {number} " * (number % 7 + 1)) for number in range(3, 40)]


def is_same(one: list[TokenBatch], other: list[TokenBatch]) -> bool:
    """Tell whether batches are equal, dtypes included."""
    pairs = [(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(astuple(x), astuple(y), strict=True)]
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


@pytest.fixture(scope="module")
def windows(tiny: ModuleType) -> Windows:
    config = ReadingConfig("tiny", hookpoint="h.0", context_length=8, forward_tokens=32, pack=True).filled()
    return Windows(tiny.word_tokenizer(), config, None, HeldOut(0.3))


@pytest.fixture(scope="module")
def apart(windows: Windows) -> WindowsApart:
    return wait(WindowsApart(windows))


def wait(made: WindowsApart) -> WindowsApart:
    """Wait until all processes answer."""
    until = time.monotonic() + 100
    while not all(process.look() for process in made._there) and time.monotonic() < until:
        time.sleep(0.02)
    assert made._there
    assert all(process.look() for process in made._there)
    return made


def test_both_cut_alike(windows: Windows, apart: WindowsApart, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, of_none = windows.batches(BLOCK), windows.batches([])
    monkeypatch.setattr(Windows, "batches", lambda *_: pytest.fail("cut here"))
    assert is_same(apart.batches(BLOCK), expected)
    assert is_same(apart.batches([]), of_none)
    assert not is_same(apart.batches(BLOCK[1:]), expected[: len(apart.batches(BLOCK[1:]))])


def test_what_a_document_is_refused_for_is_raised_here(apart: WindowsApart) -> None:
    refused: tuple[int, Content] = (7, Tokens([1, 99999]))
    with pytest.raises(DataError, match="document 7 has the token 99999"):
        apart.batches([refused])
    assert apart.batches(BLOCK)  # and the process goes on


def test_before_it_is_ready_and_after_it_ended_windows_are_cut_here(windows: Windows) -> None:
    expected = windows.batches(BLOCK)
    apart = WindowsApart(windows)
    assert is_same(apart.batches(BLOCK), expected)
    (process,) = wait(apart)._there
    process.process.kill()
    assert is_same(apart.batches(BLOCK), expected)
    assert is_same(apart.batches(BLOCK), expected)
    assert not apart._there


def test_processes_end_with_whoever_asked_them(windows: Windows) -> None:
    apart = wait(WindowsApart(windows, 2))
    processes = [each.process for each in apart._there]
    assert [process.poll() for process in processes] == [None, None]
    del apart
    assert None not in [process.poll() for process in processes]


def test_an_answer_that_was_interrupted_is_not_taken_for_the_next(
    windows: Windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart = wait(WindowsApart(windows))
    with monkeypatch.context() as patch:
        patch.setattr(pickle, "load", interrupted)
        with pytest.raises(KeyboardInterrupt):
            apart.batches(BLOCK)
    assert is_same(apart.batches(BLOCK[:3]), windows.batches(BLOCK[:3]))


def interrupted(_: object) -> None:
    raise KeyboardInterrupt


def test_threads_take_turns(windows: Windows, apart: WindowsApart) -> None:
    blocks = [BLOCK[n:] for n in range(12)]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(apart.batches, blocks))
    assert all(is_same(each, windows.batches(block)) for each, block in zip(found, blocks))


def test_what_cannot_be_sent_is_cut_here() -> None:
    windows = SimpleNamespace(batches=lambda block: [len(block)], of="a lambda cannot be sent")
    apart = WindowsApart(windows)  # type: ignore[arg-type]
    assert not apart._there
    assert apart.batches(BLOCK) == [len(BLOCK)]


def test_several_processes_cut_at_the_same_time(windows: Windows, monkeypatch: pytest.MonkeyPatch) -> None:
    apart = wait(WindowsApart(windows, 2))
    blocks = [BLOCK[n:] for n in range(12)]
    expected = [windows.batches(block) for block in blocks]
    both = Barrier(2, timeout=60)
    asked = _Process.asked

    def together(process: _Process, block: Block) -> object:
        both.wait()
        return asked(process, block)

    monkeypatch.setattr(_Process, "asked", together)
    monkeypatch.setattr(Windows, "batches", lambda *_: pytest.fail("cut here"))
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(apart.batches, blocks))
    assert all(map(is_same, found, expected))


def test_one_that_ended_leaves_its_blocks_to_the_others(windows: Windows) -> None:
    apart = wait(WindowsApart(windows, 2))
    apart._there[0].process.kill()
    assert all(is_same(apart.batches(BLOCK[n:]), windows.batches(BLOCK[n:])) for n in range(3))
    assert len(apart._there) == 1


def test_a_program_may_end_while_its_processes_begin() -> None:
    program = """
from types import SimpleNamespace
from flashsae.lm.apart import WindowsApart
def run():
    held = [WindowsApart(SimpleNamespace(large=bytes(3_000_000)), 2)]
    held.append(held)
run()
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_an_interrupt_of_all_processes_of_a_terminal_leaves_them(windows: Windows, apart: WindowsApart) -> None:
    (process,) = apart._there
    process.process.send_signal(signal.SIGINT)
    assert is_same(apart.batches(BLOCK), windows.batches(BLOCK))
    assert apart._there == [process]
    assert not process.has_ended


def test_where_no_process_may_begin_windows_are_cut_here(windows: Windows, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refused)
    assert is_same(WindowsApart(windows, 2).batches(BLOCK), windows.batches(BLOCK))
