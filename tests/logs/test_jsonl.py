from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from flashsae.errors import CheckpointError, StorageError
from flashsae.logs.jsonl import JsonlLog, read_log

RECORD = {"step": 3, "tokens": 30, "loss": 0.5, "fvu": 0.5, "dead_latents": 2.0, "lr": 1e-3}
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
