"""The log of a run, metrics.jsonl: a line a record, each with a checksum that runs on from the line before it.

So a line that was changed, taken out or moved is found; only at the end lines can be missing.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Mapping
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any, TextIO

from flashsae.errors import CheckpointError
from flashsae.files import atomic
from flashsae.files.documents import SEAL
from flashsae.files.reading import refusal
from flashsae.files.schema import LARGEST, parse
from flashsae.logs.callback import Callback

LOG_FILE = "metrics.jsonl"
_ADVICE = "Put a copy of the file back, or train again."
_SEALED = re.compile(rf'(.*), "{SEAL}": (\d+)}}')


def make_line(record: Mapping[str, float], before: int) -> tuple[str, int]:
    """Return a record as a line with its checksum, and the checksum.

    Args:
        record: what to log.
        before: the checksum of the line before; 0 for the first.
    """
    body = json.dumps(dict(record))
    checksum = zlib.crc32(body.encode(), before)
    return f'{body[:-1]}, "{SEAL}": {checksum}}}', checksum


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the records of a log, none if there is no such file; a last line that a kill cut short is left out.

    Raises:
        CheckpointError: another line is damaged or missing.
    """
    try:
        text = path.read_bytes().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {refusal(path, error)}") from error
    lines = text.split("\n")
    if not _is_json(lines[-1]):
        lines.pop()  # empty behind the end of the last line, or cut short
    is_sealed = any(_SEALED.fullmatch(line) for line in lines)  # nothing was in version 0.1
    records, checksum = [], 0
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        if not _is_json(line):
            raise CheckpointError(f"{where} is damaged: it is no JSON. {_ADVICE}")
        body = line
        if is_sealed:
            match = _SEALED.fullmatch(line)
            body = f"{match[1]}}}" if match else line
            checksum = zlib.crc32(body.encode(), checksum)
            if not match or int(match[2]) != checksum:
                raise CheckpointError(f"{where} is damaged, or does not follow the line before it. {_ADVICE}")
        records.append(_record(json.loads(body), where))
    return records


def _record(content: Any, where: str) -> dict[str, Any]:
    parse(dict[str, float | None], content, where, _ADVICE)
    step = content.get("step")
    if not isinstance(step, int) or not 0 <= step <= LARGEST:
        raise CheckpointError(f"{where} is damaged: expected the number of a step, got {step!r}. {_ADVICE}")
    return dict(content)


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


class JsonlLog(Callback):
    """Append every record to RUN/metrics.jsonl. When resumed, drop the lines behind the checkpoint first."""

    def __init__(self, run: Path) -> None:
        self._path = run / LOG_FILE
        self._file: TextIO | None = None
        self._checksum = 0

    def on_start(self, step: int, steps: int) -> None:
        """Open the log and cut it to what the checkpoint knows of; CheckpointError if it does not reach that far."""
        kept = list(takewhile(lambda record: record["step"] <= step, read_log(self._path)))
        if step and (not kept or kept[-1]["step"] != step):
            raise CheckpointError(
                f"{self._path} does not reach the checkpoint of step {step}: put the whole file back, or remove the "
                "folder checkpoints to train from the start."
            )
        self._checksum, text = 0, ""
        for record in kept:
            line, self._checksum = make_line(record, self._checksum)
            text += line + "\n"
        atomic.write_atomic(self._path, text)
        with atomic.storage_errors(self._path):
            self._file = self._path.open("a", encoding="utf-8", newline="\n")

    def on_log(self, record: Mapping[str, float]) -> None:
        """Write a line, at once."""
        if self._file is not None:
            line, self._checksum = make_line(record, self._checksum)
            with atomic.storage_errors(self._path):
                self._file.write(line + "\n")
                self._file.flush()

    def on_checkpoint(self, step: int) -> None:
        """Flush the lines to the disk, so that no checkpoint is ahead of its log."""
        if self._file is not None:
            with atomic.storage_errors(self._path):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; every line is on disk already, or its failure has been told."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
