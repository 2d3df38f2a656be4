"""Which part of the data trains and which one measures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flashsae.data.split import HeldOut, check_splits, split_mask
from flashsae.errors import DataError
from flashsae.text.open import open_text


def test_one_document_or_none_in_a_part_is_said_before_a_model_runs(tmp_path: Path) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("".join(f"document {i}\n" for i in range(1000)))
    for held_out in (None, 0.05):
        with pytest.raises(
            DataError, match=r"it is one document.* \(a \.txt is cut into documents at blank lines; \.jsonl"
        ):
            check_splits(open_text(lines), held_out)
    texts = open_text([f"document {i}" for i in range(30)])
    check_splits(texts, None)
    check_splits(texts, 0.2)
    with pytest.raises(DataError, match=r"no document fell to the held-out part, 1e-06 of all 30\. .* larger held_out"):
        check_splits(texts, 1e-6)
    with pytest.raises(DataError, match=r"all 30 documents fell to the held-out part\. .* smaller held_out"):
        check_splits(texts, 0.999999)


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.5, 0.999])
def test_one_document_is_held_out_as_many_are(fraction: float) -> None:
    numbers = [*range(2000), 2**40 + 3, 2**62, 2**63 - 1]
    expected = split_mask(torch.tensor(numbers), fraction, "held_out").tolist()
    assert [HeldOut(fraction)(number) for number in numbers] == expected
