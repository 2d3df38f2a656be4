"""Forwards of a language model that are replayed as graphs give the bits of forwards that are not."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flashsae.lm import replay
from flashsae.lm.hooked import HookedModel
from flashsae.lm.replay import Replays

pytestmark = pytest.mark.gpu


def model_of(tiny: ModuleType, dtype: torch.dtype = torch.bfloat16) -> Any:
    return tiny.gpt2().transformer.to("cuda", dtype)


def inputs(seed: int, shape: tuple[int, int] = (4, 8)) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 20, shape, generator=torch.Generator().manual_seed(seed))
    return ids, torch.ones_like(ids)


def kept(name: str, output: Tensor) -> Tensor:
    return output.flatten(0, 1)[1::2].clone()


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every forward count as one that waits for the host."""
    monkeypatch.setattr(replay, "_WAITS", 1e9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("waiting")
def test_replays_give_the_bits_of_forwards(tiny: ModuleType, dtype: torch.dtype) -> None:
    model = HookedModel(model_of(tiny, dtype), ("h.0", "h.1"))
    replays = Replays(model)
    for seed in range(12):
        for shape in ((4, 8), (3, 5)):
            ids, attention = inputs(seed, shape)
            expected = model(ids.cuda(), attention.cuda(), kept)
            found = replays(ids, attention, kept)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert [captured.compared for captured in replays._captures] == [1, 1]


@pytest.mark.parametrize("family", ["llama", "bert", "gpt_neox", "opt", "bloom", "roberta", "t5"])
@pytest.mark.usefixtures("waiting")
def test_models_of_all_kinds_give_their_bits(tiny: ModuleType, family: str) -> None:
    lm = tiny.MORE_FAMILIES.get(family, tiny.bert)().to("cuda", torch.bfloat16)
    (first, *_) = [name for name, _ in lm.named_modules() if name.endswith(".1")]
    model = HookedModel(lm, (first,))
    replays = Replays(model)
    for seed in range(8):
        ids, attention = inputs(seed)
        expected = model(ids.cuda(), attention.cuda(), kept)
        assert torch.equal(replays(ids, attention, kept)[first], expected[first])


@pytest.mark.usefixtures("waiting")
def test_padded_inputs_are_replayed_too(tiny: ModuleType) -> None:
    model = HookedModel(model_of(tiny), ("h.1",))
    replays = Replays(model)
    for seed in range(10):
        ids, attention = inputs(seed)
        attention[1, 2 + seed % 5 :] = 0
        expected = model(ids.cuda(), attention.cuda(), kept)
        found = replays(ids, attention, kept)["h.1"]
        keep = attention.flatten()[1::2].bool().cuda()
        assert torch.equal(found[keep], expected["h.1"][keep])
    assert len(replays._captures) == 1


class Looks(nn.Module):
    """Does something else where the host sees a number."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **settings: Any) -> Any:
        output = self.inner(*args, **settings)
        first = output[0] if isinstance(output, tuple) else output
        return first * 2 if bool(first.sum() > 0) else first


@pytest.mark.usefixtures("waiting")
def test_a_model_whose_host_looks_at_numbers_goes_on_as_it_does(tiny: ModuleType) -> None:
    lm = model_of(tiny)
    lm.h[0] = Looks(lm.h[0])
    model = HookedModel(lm, ("h.0",))
    replays = Replays(model)
    for seed in range(8):
        ids, attention = inputs(seed)
        expected = model(ids.cuda(), attention.cuda(), kept)
        assert torch.equal(replays(ids, attention, kept)["h.0"], expected["h.0"])
    assert not replays._captures


class Counts(nn.Module):
    """Gives something else each time, which a graph cannot."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.n = inner, 0

    def forward(self, *args: Any, **settings: Any) -> Any:
        self.n += 1
        output = self.inner(*args, **settings)
        return (output[0] if isinstance(output, tuple) else output) + self.n


@pytest.mark.usefixtures("waiting")
def test_a_graph_that_gives_other_bits_is_not_used(tiny: ModuleType) -> None:
    lm = model_of(tiny, torch.float32)
    counts = lm.h[0] = Counts(lm.h[0])
    replays = Replays(HookedModel(lm, ("h.0",)))
    values = []
    for _ in range(8):
        ids, attention = inputs(0)
        values.append(replays(ids, attention, kept)["h.0"].mean().item())
    assert not replays._captures
    assert counts.n == 10  # a forward each, and two captures
    assert sorted(values) == values


@pytest.mark.usefixtures("waiting")
def test_hooks_of_others_are_called_in_every_forward(tiny: ModuleType) -> None:
    lm, calls = model_of(tiny), []
    lm.h[0].register_forward_hook(lambda *_: calls.append(1))
    replays = Replays(HookedModel(lm, ("h.0",)))
    for seed in range(8):
        replays(*inputs(seed), kept)
    assert len(calls) == 8
