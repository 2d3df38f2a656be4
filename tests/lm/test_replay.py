"""Windows are padded to few shapes that hold them; what can be replayed is known of the model alone."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import nn

from flashsae.lm.hooked import HookedModel
from flashsae.lm.replay import Replays, is_small, padded


@pytest.fixture(scope="module")
def replays(tiny: ModuleType) -> Replays:
    return Replays(HookedModel(tiny.gpt2(), ("transformer.h.0",)), 8192, 7, 250)


def test_all_batches_of_a_reading_have_few_shapes_that_are_little_larger(replays: Replays) -> None:
    shapes = set()
    for length in range(1, 251):
        n = 8192 // length
        rows, width = replays.shape_for(n, length)
        assert rows >= n
        assert length <= width <= 250
        assert rows * width <= 8192 * 1.126
        for fewer in (1, n // 2 + 1):
            assert replays.shape_for(fewer, length) == (rows, width)
        shapes.add((rows, width))
    assert len(shapes) == 8 + 8 * 4 + 8
    assert replays.shape_for(9000, 3) == (9000, 3)


def test_what_is_added_is_padding_and_the_first_row_again() -> None:
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert padded(ids, 4, 5, 7).tolist() == [[1, 2, 3, 7, 7], [4, 5, 6, 7, 7], [1, 2, 3, 7, 7], [1, 2, 3, 7, 7]]
    assert torch.equal(padded(ids, 2, 3, 7), ids)


def test_nothing_is_replayed_on_the_cpu(replays: Replays, tiny: ModuleType) -> None:
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    expected = HookedModel(tiny.gpt2(), ("transformer.h.0",))(ids, torch.ones_like(ids))
    found = replays(ids, torch.ones_like(ids), lambda name, output: output.clone())
    assert not replays.is_on
    assert torch.equal(found["transformer.h.0"], expected["transformer.h.0"])


def test_models_of_a_width_of_1024_are_small_whatever_their_vocabulary() -> None:
    def model_of(width: int) -> nn.Module:
        with torch.device("meta"):
            sizes = [(width, width)] * 4 + [(width, 4 * width), (4 * width, width)]
            return nn.Sequential(nn.Embedding(10**6, width), *(nn.Linear(*size) for size in sizes))

    assert is_small(model_of(384))
    assert is_small(model_of(1024))
    assert not is_small(model_of(1280))
