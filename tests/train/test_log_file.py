from __future__ import annotations

import json
from pathlib import Path

import pytest

from flashsae.errors import CheckpointError
from flashsae.train.callbacks import JsonlLog
from flashsae.train.log_file import read_log

RECORDS = [{"step": step, "tokens": 10 * step, "fvu": 1 / step} for step in (1, 2, 3, 4)]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    with JsonlLog(tmp_path) as writer:
        writer.on_start(0, 10)
        for record in RECORDS:
            writer.on_log(record)
    return tmp_path / "metrics.jsonl"


def test_every_flipped_bit_is_found_or_does_no_harm(log: Path) -> None:
    whole = log.read_bytes()
    assert read_log(log) == RECORDS
    for place in range(8 * (len(whole) - 1)):  # without the end of the last line
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        log.write_bytes(flipped)
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl, line \d"):
            read_log(log)


@pytest.mark.parametrize("order", [[0, 2, 3], [1, 2, 3], [0, 2, 1, 3], [0, 0, 1, 2, 3]])
def test_lines_that_were_taken_out_moved_or_doubled_are_found(log: Path, order: list[int]) -> None:
    lines = log.read_text().splitlines()
    log.write_text("".join(lines[number] + "\n" for number in order))
    with pytest.raises(CheckpointError, match="is damaged, or does not follow the line before it"):
        read_log(log)


def test_what_version_0_1_wrote_is_read_and_gone_on_with(log: Path) -> None:
    log.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    assert read_log(log) == RECORDS
    with JsonlLog(log.parent) as writer:
        writer.on_start(3, 10)
    assert read_log(log) == RECORDS[:3]
    assert log.read_text().count("crc32") == 3


@pytest.mark.parametrize("content", [None, "", '{"step": 1}\n'])
def test_a_log_that_does_not_reach_the_checkpoint_is_refused(log: Path, content: str | None) -> None:
    log.unlink() if content is None else log.write_text(content)
    with (
        JsonlLog(log.parent) as writer,
        pytest.raises(CheckpointError, match="does not reach the checkpoint of step 4"),
    ):
        writer.on_start(4, 10)


@pytest.mark.parametrize("line", ["[]", "3", '{"step": "x"}', '{"step": -1}', '{"fvu": 1}', '{"step": 1, "a": []}'])
def test_a_line_of_another_kind_is_one_sentence(log: Path, line: str) -> None:
    log.write_text(line + "\n")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl, line 1 is damaged"):
        read_log(log)


def test_deep_nesting_is_one_sentence(log: Path) -> None:
    log.write_text("[" * 100_000 + "\n")
    with pytest.raises(CheckpointError, match="line 1 is damaged: it is no JSON"):
        read_log(log)
