"""Windows cut by processes of their own, so that no GPU waits for an interpreter that is busy with text.

Threads of one interpreter take turns. A thread that cuts text keeps the one that feeds the GPU waiting for milliseconds
at each of its operations; a process does not. What one returns is what `Windows.batches` returns.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import subprocess
import sys
from threading import Condition, Thread
from typing import Any

import torch

from flashsae.backend import limit_threads
from flashsae.errors import FlashSAEError
from flashsae.lm.windows import TokenBatch, Windows
from flashsae.text.content import Block

_READY = b"\n"
# Ctrl-C reaches all processes of a terminal, and whoever asks may go on after it, as a notebook does; the paths come
# before all else that is imported: without them the process may not find the package
_PROGRAM = """
import pickle, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.path[:] = pickle.load(sys.stdin.buffer)
from flashsae.lm.apart import serve
serve()
"""


class WindowsApart:
    """Cuts blocks in other processes, and here as long as none is ready, or if they ended.

    A process takes seconds to begin, so whoever reads again keeps them. Any thread may ask; as many as there are
    processes have their blocks cut at the same time. They end with this object.

    Args:
        windows: cut them. Where these cannot be sent to a process, all are cut here.
        processes: how many.
        threads: of each.
    """

    def __init__(self, windows: Windows, processes: int = 1, threads: int = 2) -> None:
        self._windows = windows
        self.processes = processes
        self._free = Condition()
        self._there: list[_Process] = []
        try:
            sent = pickle.dumps(threads) + pickle.dumps(windows)
        except Exception:  # whatever a tokenizer raises that holds what cannot be sent
            return
        with contextlib.suppress(OSError):  # where no more processes may begin, those that there are do it
            for _ in range(processes):
                self._there.append(_Process(sent))

    def batches(self, block: Block) -> list[TokenBatch]:
        """Return what `Windows.batches` does, and raise what it raises."""
        process = self._taken()
        answer = None
        if process is not None:
            try:
                answer = process.asked(block)
            finally:
                with self._free:
                    process.is_busy = False
                    self._free.notify()
        if answer is None:
            return self._windows.batches(block)
        if isinstance(answer, Exception):
            raise answer
        return [TokenBatch(*map(torch.from_numpy, arrays)) for arrays in answer]

    def _taken(self) -> _Process | None:
        """Return a process that is ready, for this thread alone; None if there is none."""
        with self._free:
            while True:
                ready = [process for process in self._there if process.is_busy or process.look()]
                self._there = [process for process in self._there if not process.has_ended]
                idle = next((process for process in ready if not process.is_busy), None)
                if idle is not None:
                    idle.is_busy = True
                    return idle
                if not ready:
                    return None
                self._free.wait()

    def close(self) -> None:
        """End the processes."""
        for process in self._there:
            process.close()

    def __del__(self) -> None:
        if "_there" in self.__dict__:
            self.close()


class _Process:
    """A process that cuts blocks.

    Args:
        sent: what it needs to know, pickled.
    """

    def __init__(self, sent: bytes) -> None:
        self.is_busy = self.has_ended = False
        self._is_ready: bool | None = None  # None as long as nobody knows
        command = [sys.executable, "-c", _PROGRAM]
        # without a buffer, whose lock the thread below would take with it if this interpreter ends while it writes
        self.process = subprocess.Popen(
            command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert isinstance(self.process.stdin, io.FileIO)
        assert isinstance(self.process.stdout, io.FileIO)
        self._questions: io.FileIO = self.process.stdin
        self._answers = io.BufferedReader(self.process.stdout)
        # it reads the second part once it has imported what it needs, seconds later
        said = pickle.dumps(sys.path) + sent
        Thread(target=self._begin, args=(said, self.process.stdout), daemon=True).start()

    def _begin(self, said: bytes, answers: io.FileIO) -> None:
        """Tell the process what it needs to know, and wait until it is ready or has ended."""
        _write(self._questions, said)
        found: bytes | None = None
        with contextlib.suppress(OSError, ValueError):
            found = answers.read(1)
        self._is_ready = found == _READY

    def look(self) -> bool:
        """Find out whether the process is ready."""
        if self._is_ready is False:
            self.close()  # it ended, as where a tokenizer cannot be made again from what was sent
        return bool(self._is_ready) and not self.has_ended

    def asked(self, block: Block) -> Any:
        """Return what the process answers; None if it has ended."""
        try:
            _write(self._questions, pickle.dumps(block, pickle.HIGHEST_PROTOCOL))
            return pickle.load(self._answers)
        except (OSError, EOFError, pickle.UnpicklingError):
            self.close()
            return None
        except BaseException:
            self.close()  # an answer that was interrupted would be taken for that of the next block
            raise

    def close(self) -> None:
        """End the process."""
        if self.has_ended:
            return
        self.has_ended = True
        self.process.kill()
        for end in (self._questions, self._answers):
            with contextlib.suppress(OSError):
                end.close()
        self.process.wait()


def _write(questions: io.FileIO, data: bytes) -> None:
    """Send something to the process; if it has ended, its answers end too."""
    left = memoryview(data)
    with contextlib.suppress(OSError, ValueError):
        while left:
            left = left[questions.write(left) :]


def serve() -> None:
    """Answer blocks with their batches until there are no more: what the process does."""
    with os.fdopen(os.dup(sys.stdout.fileno()), "wb") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints must not get among the answers
        questions = sys.stdin.buffer
        limit_threads(pickle.load(questions))  # before a tokenizer begins some
        windows = pickle.load(questions)
        answers.write(_READY)
        answers.flush()
        while True:
            try:
                block = pickle.load(questions)
            except EOFError:
                return
            pickle.dump(_answer(windows, block), answers, pickle.HIGHEST_PROTOCOL)
            answers.flush()


def _answer(windows: Windows, block: Block) -> Any:
    try:
        batches = windows.batches(block)
    except FlashSAEError as error:
        return error
    return [(b.ids.numpy(), b.attention.numpy(), b.keep.numpy(), b.documents.numpy(), b.order.numpy()) for b in batches]
