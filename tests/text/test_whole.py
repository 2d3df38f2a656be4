"""An order over a whole data set: every document once, by the seed alone, and on from any place with the same bytes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from flashsae.data.split import Split
from flashsae.errors import ConfigError
from flashsae.text import spool
from flashsae.text.mixture import mixed
from flashsae.text.open import open_text
from flashsae.text.whole import Permutation, shuffled


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000])
def test_every_number_has_one_place(n: int) -> None:
    for seed in (0, 1, 2**62):
        assert sorted(map(Permutation(n, seed), range(n))) == list(range(n))


def test_orders_are_as_mixed_as_random_ones() -> None:
    n = 4096
    order = torch.tensor(list(map(Permutation(n, 3), range(n)))).double()
    places = torch.arange(n).double()
    assert abs(float(torch.corrcoef(torch.stack([order, places]))[0, 1])) < 4 / n**0.5
    assert abs(float(torch.corrcoef(torch.stack([order[1:], order[:-1]]))[0, 1])) < 4 / n**0.5
    assert float(order.diff().abs().mean()) == pytest.approx(n / 3, rel=0.05)
    firsts = [Permutation(10, seed)(0) for seed in range(2000)]
    assert max(abs(firsts.count(i) - 200) for i in range(10)) < 5 * 200**0.5


def test_a_number_of_a_huge_set_is_worked_out_alone() -> None:
    order = Permutation(10**15 + 37, 0)
    found = {order(place) for place in range(200)}
    assert len(found) == 200
    assert max(found) < 10**15 + 37
    assert max(found) > 9 * 10**14


def test_documents_keep_their_numbers_and_reading_goes_on_anywhere(tmp_path: Path) -> None:
    texts = [f"document {i}" for i in range(50)] + ["", "last"]
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    np.save(tmp_path / "x.npy", np.arange(200).reshape(50, 4))
    for text in (
        open_text(texts),
        open_text(tmp_path / "x.jsonl"),
        open_text(iter(texts)),
        open_text(tmp_path / "x.npy"),
    ):
        in_order = dict(text.numbered())
        whole = list(shuffled(text, 7).placed())
        assert dict(row[1:] for row in whole) == in_order
        assert [number for _, number, _ in whole] != sorted(in_order)
        for start in (1, 20, 51, 99):
            assert list(shuffled(text, 7).placed(start)) == [row for row in whole if row[0] >= start]
        assert [row[1] for row in shuffled(text, 8).placed()] != [row[1] for row in whole]
        assert sorted(number for number, _ in shuffled(text, 7, 10).numbered()) == list(range(10))


def test_files_are_copied_once_and_only_if_need_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.txt").write_text("a\n\nb\n\nc")
    made: list[object] = []
    create = spool.tempfile.TemporaryFile
    monkeypatch.setattr(spool.tempfile, "TemporaryFile", lambda: (made.append(0), create())[1])
    text = open_text(tmp_path / "x.txt")
    assert not made
    for _ in range(3):
        assert sorted(map(str, shuffled(text, 0).documents())) == ["a", "b", "c"]
    assert len(made) == 2
    shuffled(open_text(["a", "b"]), 0)
    assert len(made) == 2


def test_parts_of_a_mixture_are_mixed_each_by_itself() -> None:
    parts = [open_text([f"{letter}{i:02}" for i in range(20)]) for letter in "ab"]
    text = shuffled(mixed([(part, 1.0) for part in parts]), 0)
    documents = list(map(str, text.documents()))
    assert sorted(documents) == sorted(str(d) for part in parts for d in part.documents())
    for letter in "ab":
        own = [document for document in documents if document[0] == letter]
        assert own != sorted(own)
    assert [document[0] for document in documents[:4]] == list("abab")


@pytest.mark.parametrize("split", ["train", "held_out", None])
@pytest.mark.parametrize("kind", ["whole", "mixture", "whole mixture", "limited"])
def test_a_source_resumes_at_any_cursor(tiny: ModuleType, kind: str, split: Split | None) -> None:
    text = tiny.TEXT
    if "mixture" in kind:
        text = mixed([(open_text(tiny.DOCUMENTS[::2]), 0.7), (open_text(tiny.DOCUMENTS[1::2]), 0.3)])
    changed: dict[str, Any] = {"shuffle_documents": True, "shuffle_whole": kind != "mixture", "document_seed": 4}
    if kind == "limited":
        changed["max_documents"] = 17
    reader = tiny.source(dataclasses.replace(tiny.SMALL, forward_tokens=48, **changed), text)
    whole = list(reader.chunks(split))
    groups = torch.cat([chunk.group for chunk, _ in whole])
    assert bool((groups.diff() < 0).any()) or split == "held_out"
    if kind == "limited":
        assert int(groups.max()) < 17
    if kind == "whole":
        plain = tiny.collect(tiny.source(dataclasses.replace(tiny.SMALL, forward_tokens=48)), split)[0]
        assert sorted(plain.group.tolist()) == sorted(groups.tolist())
    for place in range(0, len(whole), 1 + len(whole) // 4):
        rest = list(reader.chunks(split, json.loads(json.dumps(whole[place][1]))))
        assert len(rest) == len(whole) - place - 1
        for (chunk, behind), (expected, expected_behind) in zip(rest, whole[place + 1 :]):
            assert behind == expected_behind
            assert tiny.same(chunk, expected)


def test_what_can_only_be_streamed_is_refused_before_it_is_read(tiny: ModuleType) -> None:
    stream = open_text(lambda: iter(tiny.DOCUMENTS))
    config = dataclasses.replace(tiny.SMALL, shuffle_documents=True, shuffle_whole=True)
    for text in (stream, mixed([(tiny.TEXT, 1.0), (stream, 1.0)])):
        with pytest.raises(ConfigError, match=r"shuffle_whole: .* got a stream of documents, which is"):
            tiny.source(config, text)
        with pytest.raises(ConfigError, match="shuffle_whole"):
            shuffled(text, 0)
