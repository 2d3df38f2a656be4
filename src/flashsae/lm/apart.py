"""Windows cut by a process of their own, so that no GPU waits for an interpreter that is busy with text.

Threads of one interpreter take turns. A thread that cuts text keeps the one that feeds the GPU waiting for milliseconds
at each of its operations; a process does not. What it returns is what `Windows.batches` returns.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
from threading import Lock, Thread
from typing import IO, Any

import torch

from flashsae.errors import FlashSAEError
from flashsae.lm.windows import TokenBatch, Windows
from flashsae.text.content import Block

_READY = "ready"
# the paths come first: without them the process may not find the package
_PROGRAM = (
    "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); from flashsae.lm.apart import serve; serve()"
)


class WindowsApart:
    """Cuts blocks in another process, and here as long as that one is not ready, or if it ended.

    The process takes seconds to begin, so whoever reads again keeps it. Any thread may ask. It ends with this object.

    Args:
        windows: cut them. Where these cannot be sent to a process, all are cut here.
        threads: of the other process.
    """

    def __init__(self, windows: Windows, threads: int = 2) -> None:
        self._windows = windows
        self._is_ready = False
        self._turn = Lock()
        self._process: subprocess.Popen[bytes] | None = None
        try:
            sent = pickle.dumps((windows, threads))
        except Exception:  # whatever a tokenizer raises that holds what cannot be sent
            return
        command = [sys.executable, "-c", _PROGRAM]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        os.set_blocking(self._answers.fileno(), False)
        # it reads the second part once it has imported what it needs, seconds later
        Thread(target=_write, args=(self._process.stdin, pickle.dumps(sys.path) + sent), daemon=True).start()

    @property
    def _answers(self) -> IO[bytes]:
        assert self._process is not None
        assert self._process.stdout is not None
        return self._process.stdout

    def _look(self) -> None:
        """Find out whether the process is ready."""
        if self._process is None or self._is_ready:
            return
        found = self._answers.read(1)
        if found == b"":
            self.close()  # it ended, as where a tokenizer cannot be made again from what was sent
        elif found is not None:
            self._is_ready = True
            os.set_blocking(self._answers.fileno(), True)

    def batches(self, block: Block) -> list[TokenBatch]:
        """Return what `Windows.batches` does, and raise what it raises."""
        with self._turn:
            answer = self._asked(block)
        if answer is None:
            return self._windows.batches(block)
        if isinstance(answer, Exception):
            raise answer
        return [TokenBatch(*map(torch.from_numpy, arrays)) for arrays in answer]

    def _asked(self, block: Block) -> Any:
        """Return what the process answers; None if there is none that would."""
        self._look()
        if not self._is_ready or self._process is None:
            return None
        try:
            _write(self._process.stdin, pickle.dumps(block, pickle.HIGHEST_PROTOCOL))
            return pickle.load(self._answers)
        except (OSError, EOFError, pickle.UnpicklingError):
            self.close()
            return None
        except BaseException:
            self.close()  # an answer that was interrupted would be taken for that of the next block
            raise

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            for end in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    assert end is not None
                    end.close()
            process.wait()

    def __del__(self) -> None:
        if "_process" in self.__dict__:
            self.close()


def _write(questions: IO[bytes] | None, data: bytes) -> None:
    """Send something to the process; if it has ended, its answers end too."""
    assert questions is not None
    with contextlib.suppress(OSError, ValueError):
        questions.write(data)
        questions.flush()


def serve() -> None:
    """Answer blocks with their batches until there are no more: what the process does."""
    with os.fdopen(os.dup(sys.stdout.fileno()), "wb") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints must not get among the answers
        questions = sys.stdin.buffer
        windows, threads = pickle.load(questions)
        torch.set_num_threads(threads)
        answers.write(b"\n")
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
