"""Mixed documents come once each, in an order of the seed, and on from any block with the same bytes."""

from __future__ import annotations

import dataclasses
import json
from types import ModuleType

import pytest
import torch

from flashsae.data.split import Split, split_mask
from flashsae.text import reading_order
from flashsae.text.dataset import TextDataset
from flashsae.text.open import open_text
from flashsae.text.reading_order import ReadingOrder

DOCUMENTS = [(i, i, "x" * (1 + i % 7)) for i in range(200) if i % 5]


def read(seed: int | None, offset: int = 0, start: int = 0) -> list[int]:
    rest = [document for document in DOCUMENTS if document[0] >= start]
    return [number for block, _, _ in ReadingOrder(10, seed).blocks(rest, offset) for number, _ in block]


def test_without_a_seed_documents_come_as_they_are() -> None:
    assert read(None) == [number for _, number, _ in DOCUMENTS]


def test_a_seed_mixes_every_document_once() -> None:
    assert sorted(read(0)) == [number for _, number, _ in DOCUMENTS]
    assert read(0) == read(0) != read(1)
    assert abs(torch.tensor(read(0)).diff()).double().median() > 30


def test_little_is_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading_order, "_WINDOW_CHARACTERS", 60)
    taken: list[int] = []

    def watched() -> object:
        for placed in DOCUMENTS:
            taken.append(placed[0])
            yield placed

    first = next(ReadingOrder(10, 0).blocks(watched(), 0))  # type: ignore[arg-type]
    assert len(taken) < 25
    assert max(number for number, _ in first[0]) <= taken[-1]
    assert sorted(read(0)) == [number for _, number, _ in DOCUMENTS]


@pytest.mark.parametrize("seed", [None, 3])
def test_reading_goes_on_behind_any_block(seed: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading_order, "_WINDOW_CHARACTERS", 60)
    whole = list(ReadingOrder(10, seed).blocks(DOCUMENTS, 0))
    for place, (_, _, behind) in enumerate(whole):
        expected = [number for block, _, _ in whole[place + 1 :] for number, _ in block]
        assert read(seed, behind.offset, behind.document) == expected


@pytest.mark.parametrize("split", ["train", "held_out", None])
def test_a_source_of_mixed_documents_resumes_at_any_cursor(
    tiny: ModuleType, split: Split | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading_order, "_WINDOW_CHARACTERS", 2000)
    reader = tiny.source(dataclasses.replace(tiny.SMALL, shuffle_documents=True, forward_tokens=16, document_seed=4))
    whole = list(reader.chunks(split))
    groups = torch.cat([chunk.group for chunk, _ in whole])
    assert bool((groups.diff() < 0).any())
    if split is not None:
        assert bool(split_mask(groups, 0.2, split).all())
    plain = tiny.collect(tiny.source(dataclasses.replace(tiny.SMALL, forward_tokens=16)), split)[0]
    assert sorted(plain.group.tolist()) == sorted(groups.tolist())
    for place in range(0, len(whole), 7):
        rest = list(reader.chunks(split, json.loads(json.dumps(whole[place][1]))))
        assert len(rest) == len(whole) - place - 1
        for (chunk, behind), (expected, expected_behind) in zip(rest, whole[place + 1 :]):
            assert behind == expected_behind
            assert tiny.same(chunk, expected)


def test_a_sorted_text_is_mixed_and_the_seed_decides_how(tiny: ModuleType) -> None:
    text = open_text(["the cat " * 3] * 30 + ["a mat " * 3] * 30)
    orders = []
    for seed in (0, 1):
        config = dataclasses.replace(tiny.SMALL, shuffle_documents=True, document_seed=seed)
        orders.append(tiny.collect(tiny.source(config, text), None)[0].group.tolist())
    first = orders[0][: len(orders[0]) // 4]
    assert 0.2 < sum(group < 30 for group in first) / len(first) < 0.8
    assert orders[0] != orders[1]


@pytest.mark.parametrize("max_tokens", [100, 250, 700])
def test_a_cut_is_the_beginning_of_the_order_of_reading(tiny: ModuleType, max_tokens: int) -> None:
    """Half of the documents fill windows, half are short: as many rows of each as there are in the text."""
    lengths = [48 if i % 2 else 4 for i in range(80)]
    text = open_text([" ".join(tiny.WORDS[(i + j) % 16] for j in range(n)) for i, n in enumerate(lengths)])
    config = dataclasses.replace(tiny.SMALL, forward_tokens=128)
    reader = tiny.source(config, text)
    rows = [chunk for chunk, _ in reader.chunks(None, None, max_tokens)]
    group = tiny.concatenate(rows).group
    assert len(group) == max_tokens
    share = sum(lengths[i] for i in range(80) if lengths[i] == 4) / sum(lengths)
    short = sum(lengths[number] == 4 for number in group.tolist()) / max_tokens
    assert short == pytest.approx(share, abs=0.06)
    counts = torch.bincount(group).tolist()
    assert counts[:-1] == lengths[: len(counts) - 1]
    whole = {tuple(row) for chunk, _ in reader.chunks(None) for row in chunk.acts["h.1"].tolist()}
    assert {tuple(row) for chunk in rows for row in chunk.acts["h.1"].tolist()} <= whole


@pytest.mark.parametrize("ratio", [None, 1.3])
def test_a_cut_reading_resumes_at_any_cursor(tiny: ModuleType, ratio: float | None) -> None:
    reader = tiny.source(dataclasses.replace(tiny.SMALL, max_norm_ratio=ratio))
    whole = list(reader.chunks(None, None, 300))
    assert whole[-1][1]["rows"] == 300
    for place, (_, cursor) in enumerate(whole):
        rest = list(reader.chunks(None, cursor, 300))
        assert [behind for _, behind in rest] == [behind for _, behind in whole[place + 1 :]]
        assert all(tiny.same(a, b) for (a, _), (b, _) in zip(rest, whole[place + 1 :]))


def test_batches_of_a_block_come_in_an_order_that_has_nothing_to_do_with_length(tiny: ModuleType) -> None:
    lengths = []
    for number in range(8):
        text = TextDataset("t", lambda start, n=number: ((n, d) for d in tiny.DOCUMENTS))
        chunk, _ = next(tiny.source(text=text, held_out=0.0).chunks(None))
        lengths.append(int(tiny.need(chunk.position).max()))
    assert len(set(lengths)) > 1
