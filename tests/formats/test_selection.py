from __future__ import annotations

import pytest
import torch

from flashsae.architecture import architecture_named, architecture_names
from flashsae.formats.content import Content
from flashsae.formats.selection import joined, l0_of, selection_of, split
from helpers.dense_content import made


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("topk", ("", "topk")),
        ("matryoshka", ("", "batch_topk")),
        ("matryoshka:topk", ("", "topk")),
        ("transcoder", ("transcoder", "topk")),
        ("skip_transcoder:jump_relu", ("skip_transcoder", "jump_relu")),
        ("transcoder:matryoshka", ("transcoder", "batch_topk")),
        ("transcoder:matryoshka:relu", ("transcoder", "relu")),
        ("crosscoder", ("crosscoder", "batch_topk")),
        ("crosscoder:topk", ("crosscoder", "topk")),
        ("mine:topk", ("", "mine:topk")),
    ],
)
def test_an_architecture_is_something_around_a_selection(name: str, parts: tuple[str, str]) -> None:
    assert split(name) == parts


def test_names_are_those_of_architectures() -> None:
    for outer in ("transcoder", "skip_transcoder", "crosscoder"):
        for base in ("topk", "batch_topk", "jump_relu", "relu"):
            assert architecture_named(joined(outer, base)).name == joined(outer, base)
            assert split(joined(outer, base)) == (outer, base)
    for name in architecture_names(installed=False):
        outer, base = split(name)
        assert architecture_named(joined(outer, base))


def content(architecture: str, **tensors: torch.Tensor) -> Content:
    tensors = {"W_enc_T": torch.zeros(5, 3), "W_dec": torch.zeros(5, 3), **tensors}
    return Content(architecture, {"k": 2, "prefixes": (1.0,)}, tensors)


def test_a_selection_is_that_of_inference() -> None:
    assert selection_of(content("matryoshka:topk")).k == 2
    assert selection_of(content("hierarchical_topk")).name == "topk"
    assert selection_of(content("gated")).name == "gated"
    assert selection_of(content("transcoder:relu")).name == "relu"
    theta = torch.arange(5.0)
    assert selection_of(content("jump_relu", threshold=theta)).threshold is theta
    for value, spread in ((0.25, 0.25), (-1.0, 0.0)):
        found = selection_of(content("transcoder:matryoshka", threshold=torch.tensor(value))).threshold
        assert found is not None
        assert torch.equal(found, torch.full([5], spread))
    assert selection_of(content("batch_topk")).threshold is None


@pytest.mark.parametrize(
    ("l0", "expected"), [(7.6, 8), (0.2, 1), (1e9, 37), (None, None), (True, None), (float("inf"), None), ("5", None)]
)
def test_how_many_latents_are_active_is_told_by_metadata(l0: object, expected: int | None) -> None:
    assert l0_of(made("relu", metadata={"l0": l0})) == expected
