"""The program: calls the command, and says in one sentence what goes wrong outside of the code."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from flashsae.errors import FlashSAEError

STOPPED = 130
"""Exit code after Ctrl-C, as shells have it."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; what goes wrong outside of the code is one message on standard error.

    The exit code is 0, 1 for what cannot be done, 2 for what is no command, 130 after Ctrl-C or SIGTERM. A fault of
    the code itself stays a traceback.

    Args:
        arguments: behind the name of the program; None takes those of the process.
    """
    with _stopped_by_signals() as is_stopped:
        try:
            try:
                _call(sys.argv[1:] if arguments is None else arguments)
            finally:
                sys.stdout.flush()  # here, where a full disk or a closed pipe can still be told
        except SystemExit:
            raise
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) or is_stopped():  # a library may have made another error of it
                _end("\nStopped.", STOPPED)
            _tell(error)
            raise


@contextmanager
def _stopped_by_signals() -> Iterator[Callable[[], bool]]:
    """Take SIGTERM, the end of a cluster's patience, as Ctrl-C; yield what tells whether either has come."""
    came: list[int] = []

    def stop(number: int, frame: object) -> None:
        came.append(number)
        raise KeyboardInterrupt

    before = {}
    with suppress(ValueError):  # outside the main thread there are no signals to catch
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, stop)
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _call(words: Sequence[str]) -> None:
    from cyclopts import CycloptsError, UnusedCliTokensError
    from cyclopts.exceptions import MissingArgumentError, UnknownOptionError

    from flashsae.cli.arguments import unknown_option
    from flashsae.cli.commands import run

    try:
        run(words)
    except UnusedCliTokensError as error:
        unused = ", ".join(map(repr, error.unused_tokens or ()))
        several = " Several texts are a mixture, with weights: A@0.7 B@0.3." * (words[0] in ("train", "cache"))
        _end(f"flashsae: nothing takes the words {unused}; see --help.{several}", 2)
    except UnknownOptionError as error:
        _end(f"flashsae: {unknown_option(error, words)}", 2)
    except CycloptsError as error:
        if type(error) is MissingArgumentError and error.argument is not None:
            name = error.argument.name
            name = name if error.argument.index is None else name.removeprefix("--").upper()  # as the usage calls it
            what = f"{error.keyword} has no value" if error.keyword else f"{name} is missing"
            _end(f"flashsae: {what}; see flashsae {' '.join(error.command_chain or ())} --help.", 2)
        _end(f"flashsae: {' '.join(str(error).split())}", 2)


def _tell(error: BaseException) -> None:
    """End with a sentence on an error whose cause lies outside of the code; return from any other."""
    if isinstance(error, FlashSAEError):
        _end(f"flashsae: {error}", 1)
    if isinstance(error, BrokenPipeError):  # whoever read our output has seen enough
        _let_go_of_output()
        raise SystemExit(1) from None
    if isinstance(error, OSError) and error.strerror is not None:
        _let_go_of_output()
        what = f"{error.filename}: " if error.filename else "what it has to say cannot be written: "
        advice = " Check its permissions, or name another." if isinstance(error, PermissionError) else ""
        _end(f"flashsae: {what}{error.strerror}.{advice}", 1)
    if _is_out_of_memory(error):
        advice = "Take a smaller --batch-tokens or --d-sae, or --moments bf16; --plan says what a run needs."
        _end(f"flashsae: there is not enough memory ({_first_line(error)}). {advice}", 1)


def _end(message: str, code: int) -> None:
    print(message, file=sys.stderr)
    raise SystemExit(code) from None


def _let_go_of_output() -> None:
    """Send what is left of the output nowhere, so that Python does not fail over it again as it ends."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _is_out_of_memory(error: BaseException) -> bool:
    """Tell memory that ran out from other faults; torch raises an error of its own on a GPU, a plain one on a CPU."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
