from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flashsae.errors import CheckpointError
from flashsae.formats.checks import check_tensors, check_threshold, glimpse, of_one_dtype, sizes, widest


def test_tensors_are_those_that_a_format_has() -> None:
    path, shapes = Path("w.safetensors"), {"W": (-1, 3), "b": (3,)}
    good = {"W": torch.zeros(5, 3), "b": torch.zeros(3, dtype=torch.bfloat16)}
    check_tensors(path, good, shapes)
    check_tensors(path, {**good, "t": torch.zeros(())}, shapes, {"t": ()})
    assert widest(good) == torch.float32
    for wrong, sentence in (
        ({"W": good["W"]}, "it has no b; expected W, b"),
        ({**good, "k": torch.zeros(())}, "k is none of its tensors"),
        ({**good, "b": torch.zeros(4)}, r"b: expected floats \[3\], got float32 \[4\]"),
        ({**good, "W": torch.zeros(0, 3)}, r"W: expected floats \[any, 3\], got float32 \[0, 3\]"),
        ({**good, "W": torch.zeros(3)}, r"W: expected floats"),
        ({**good, "b": torch.zeros(3, dtype=torch.int64)}, r"got int64 \[3\]"),
    ):
        with pytest.raises(CheckpointError, match=rf"^w\.safetensors is damaged.*{sentence}.*Fetch it again\.$"):
            check_tensors(path, wrong, shapes)


def test_sizes_that_are_not_there_are_any() -> None:
    tensors = {"W": torch.zeros(5, 3), "b": torch.zeros(3), "empty": torch.zeros(0, 3), "number": 3}
    assert sizes(tensors, "W", 2) == (5, 3)
    assert sizes(tensors, "b", 1) == (3,)
    for name in ("b", "empty", "number", "none"):
        assert sizes(tensors, name, 2) == (-1, -1)


def test_thresholds_are_numbers() -> None:
    check_threshold(Path("w.pt"), torch.tensor([0.0, float("inf"), -float("inf")]))
    with pytest.raises(CheckpointError, match=r"^w\.pt is damaged: a threshold is no number\. Fetch it again\.$"):
        check_threshold(Path("w.pt"), torch.tensor([0.0, float("nan")]))


def test_one_dtype_holds_all_of_them() -> None:
    halves = {"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.ones(2, dtype=torch.bfloat16)}
    assert of_one_dtype({**halves, "t": torch.tensor(0.5)})["t"].dtype == torch.bfloat16
    exact = of_one_dtype({**halves, "t": torch.tensor(0.1)})
    assert {each.dtype for each in exact.values()} == {torch.float32}
    assert of_one_dtype({**halves, "t": torch.tensor(float("nan"))})["t"].isnan()
    mixed = of_one_dtype({"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.ones(2, dtype=torch.float16)})
    assert mixed["a"].dtype == torch.float32


def test_a_glimpse_never_fails(tmp_path: Path) -> None:
    for content in (b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"a": 1}' + b" " * (1 << 20)):
        (tmp_path / "c.json").write_bytes(content)
        assert glimpse(tmp_path / "c.json") == {}
    assert glimpse(tmp_path) == glimpse(tmp_path / "none") == {}
    (tmp_path / "c.json").write_text('{"a": 1}')
    assert glimpse(tmp_path / "c.json") == {"a": 1}
