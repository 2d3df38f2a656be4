"""Forwards of a language model that are replayed as graphs give what forwards give, the same bits each time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from flashsae.backend import resolve_device
from flashsae.lm.hooked import HookedModel
from flashsae.lm.replay import Replays, ReplaysByStream

pytestmark = pytest.mark.gpu


def model_of(tiny: ModuleType, dtype: torch.dtype = torch.bfloat16) -> Any:
    return tiny.gpt2().transformer.to("cuda", dtype)


def inputs(seed: int, shape: tuple[int, int] = (4, 8), padding: int = 0) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 20, shape, generator=torch.Generator().manual_seed(seed))
    attention = torch.ones_like(ids)
    if padding:
        attention[1::2, -padding:] = 0
    return ids, attention


def whole(name: str, output: Tensor) -> Tensor:
    return output.clone()


def replays_of(model: HookedModel) -> Replays:
    return Replays(model, 32, 0, 16)


def is_close(found: Tensor, expected: Tensor, attention: Tensor) -> bool:
    keep = attention.bool().to(found.device)
    bound = 1e-5 if found.dtype == torch.float32 else 0.02
    return bool((found[keep] - expected[keep]).float().norm() <= bound * expected[keep].float().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replays_give_what_forwards_give(tiny: ModuleType, dtype: torch.dtype) -> None:
    model = HookedModel(model_of(tiny, dtype), ("h.0", "h.1"))
    replays = replays_of(model)
    for seed in range(4):
        for shape, padding in (((4, 8), 0), ((3, 8), 0), ((2, 11), 3), ((2, 12), 1), ((1, 16), 0), ((30, 1), 0)):
            ids, attention = inputs(seed, shape, padding)
            expected = model(ids.cuda(), attention.cuda(), whole)
            found = replays(ids, attention, whole)
            assert found.keys() == expected.keys()
            assert all(is_close(found[name], expected[name], attention) for name in expected)
    assert replays.is_on
    assert len(replays._captured) == 5  # (4, 8) and (3, 8) are of one shape


@pytest.mark.parametrize("family", ["llama", "bert", "gpt_neox", "opt", "bloom", "roberta", "t5"])
def test_models_of_all_kinds_give_what_they_give(tiny: ModuleType, family: str) -> None:
    lm = tiny.MORE_FAMILIES.get(family, tiny.bert)().to("cuda", torch.bfloat16)
    (first, *_) = [name for name, _ in lm.named_modules() if name.endswith(".1")]
    model = HookedModel(lm, (first,))
    replays = replays_of(model)
    for seed in range(4):
        ids, attention = inputs(seed, padding=seed)
        expected = model(ids.cuda(), attention.cuda(), whole)
        assert is_close(replays(ids, attention, whole)[first], expected[first], attention)


def test_a_batch_has_the_same_bits_whatever_was_read_before(tiny: ModuleType) -> None:
    model = HookedModel(model_of(tiny), ("h.1",))
    batches = [inputs(seed, (seed % 4 + 1, seed % 8 + 1), seed % 2) for seed in range(16)]
    read = replays_of(model)
    found = [read(*batch, whole)["h.1"] for batch in batches]
    for start in (1, 7, 15):
        again = replays_of(model)
        assert all(
            torch.equal(again(*batch, whole)["h.1"], acts) for batch, acts in zip(batches[start:], found[start:])
        )


class Looks(nn.Module):
    """Does something else where the host sees a number."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **settings: Any) -> Any:
        output = self.inner(*args, **settings)
        first = output[0] if isinstance(output, tuple) else output
        return first * 2 if bool(first.sum() > 0) else first


def test_a_model_whose_host_looks_at_numbers_runs_as_it_is(tiny: ModuleType) -> None:
    lm = model_of(tiny)
    lm.h[0] = Looks(lm.h[0])
    model = HookedModel(lm, ("h.0",))
    replays = replays_of(model)
    for seed in range(4):
        ids, attention = inputs(seed)
        expected = model(ids.cuda(), attention.cuda(), whole)
        assert torch.equal(replays(ids, attention, whole)["h.0"], expected["h.0"])
    assert not replays.is_on


class Differs(nn.Module):
    """Gives something else in a capture."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **settings: Any) -> Any:
        output = self.inner(*args, **settings)
        first = output[0] if isinstance(output, tuple) else output
        return first * 1.2 if torch.cuda.is_current_stream_capturing() else first


def test_a_graph_that_gives_something_else_is_not_used(tiny: ModuleType) -> None:
    lm = model_of(tiny)
    lm.h[0] = Differs(lm.h[0])
    model = HookedModel(lm, ("h.0",))
    replays = replays_of(model)
    ids, attention = inputs(0)
    expected = model(ids.cuda(), attention.cuda(), whole)
    assert torch.equal(replays(ids, attention, whole)["h.0"], expected["h.0"])
    assert not replays.is_on


def test_hooks_of_others_are_called_in_every_forward(tiny: ModuleType) -> None:
    lm, calls = model_of(tiny), []
    lm.h[0].register_forward_hook(lambda *_: calls.append(1))
    replays = replays_of(HookedModel(lm, ("h.0",)))
    for seed in range(4):
        replays(*inputs(seed), whole)
    assert len(calls) == 4


def test_each_stream_has_its_own_until_the_weights_are_replaced(tiny: ModuleType) -> None:
    lm = model_of(tiny, torch.float32)
    model = HookedModel(lm, ("h.1",))
    replays = ReplaysByStream(model, 32, 0, 16)
    ids, attention = inputs(0)
    replays.begin()
    here = replays.here()
    before = here(ids, attention, whole)["h.1"]
    with torch.cuda.stream(torch.cuda.Stream()):
        assert replays.here() is not here
    replays.begin()
    assert replays.here() is here
    with torch.no_grad():
        lm.wte.weight = nn.Parameter(lm.wte.weight * 3)
    replays.begin()
    found = replays.here()(ids, attention, whole)["h.1"]
    assert is_close(found, model(ids.cuda(), attention.cuda(), whole)["h.1"], attention)
    assert not is_close(found, before, attention)


def test_positions_that_begin_again_are_replayed(tiny: ModuleType) -> None:
    model = HookedModel(tiny.llama().to("cuda", torch.float32), ("layers.1",))
    replays = replays_of(model)
    for seed in range(3):
        ids, attention = inputs(seed, (3, 8 - seed))
        places = torch.arange(8 - seed).expand_as(ids)
        positions = torch.where(places < 3, places, places - 3)
        expected = model(ids.cuda(), attention.cuda(), whole, positions.cuda())["layers.1"]
        alone = model(ids[:, 3:].cuda(), attention[:, 3:].cuda(), whole)["layers.1"]
        found = replays(ids, attention, whole, positions)["layers.1"]
        assert is_close(found, expected, attention)
        assert is_close(found[:, 3:], alone, attention[:, 3:])
    assert len(replays._captured) == 3


def test_a_model_on_the_device_that_is_found_is_replayed(tiny: ModuleType) -> None:
    replays = replays_of(HookedModel(model_of(tiny), ("h.1",), device=resolve_device()))
    replays(*inputs(0), whole)
    assert replays.is_on
    assert replays._captured


class Masks(TorchFunctionMode):
    """Notes which calls of attention in a capture have a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[bool] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention and torch.cuda.is_current_stream_capturing():
            given = dict(zip(("query", "key", "value", "attn_mask"), args)) | (kwargs or {})
            self.seen.append(given.get("attn_mask") is not None)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["llama", "bert", "gpt_neox", "roberta"])
def test_windows_without_padding_are_read_without_a_mask(tiny: ModuleType, family: str) -> None:
    lm = tiny.MORE_FAMILIES.get(family, tiny.bert)().to("cuda", torch.bfloat16)
    (first, *_) = [name for name, _ in lm.named_modules() if name.endswith(".1")]
    model = HookedModel(lm, (first,))
    replays = replays_of(model)
    for padding in (0, 2):
        for seed in range(3):
            ids, attention = inputs(seed, padding=padding)
            ids[:, 2] = replays._pad_token  # text may hold it, too
            expected = model(ids.cuda(), attention.cuda(), whole)
            with Masks() as masks:
                found = replays(ids, attention, whole)
            assert is_close(found[first], expected[first], attention)
            assert all(mask == bool(padding) for mask in masks.seen)
            assert bool(masks.seen) == (seed == 0)
    assert replays.is_on
    assert len(replays._captured) == 2


class NeedsPadding(nn.Module):
    """Has a mask only where there are tokens of padding, as a model that looks for them itself."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, *args: Any, **settings: Any) -> Any:
        ids, heads = self.ids, x.unsqueeze(1)
        mask = (ids != 0)[:, None, None].expand(-1, 1, ids.shape[1], -1)
        if not torch.cuda.is_current_stream_capturing() and bool(mask.all()):
            mask = None
        output = self.inner(x, *args, **settings)
        first = output[0] if isinstance(output, tuple) else output
        return first + scaled_dot_product_attention(heads, heads, heads, mask)[:, 0]


def test_a_mask_that_ids_decide_is_kept(tiny: ModuleType) -> None:
    lm = model_of(tiny, torch.float32)
    layer = lm.h[0] = NeedsPadding(lm.h[0])
    model = HookedModel(lm, ("h.0",))
    embed = lm.wte.forward

    def noting(ids: Tensor) -> Any:
        layer.ids = ids
        return embed(ids)

    lm.wte.forward = noting
    replays = replays_of(model)
    for seed, token in ((0, 5), (1, 0)):
        ids, attention = inputs(seed)
        ids = ids.clamp(1)
        ids[:, 2] = token
        expected = model(ids.cuda(), attention.cuda(), whole)
        assert is_close(replays(ids, attention, whole)["h.0"], expected["h.0"], attention)
    assert replays.is_on


def test_another_thread_with_another_stream_reads_the_same_bits(tiny: ModuleType) -> None:
    model = HookedModel(model_of(tiny), ("h.1",))
    replays = ReplaysByStream(model, 32, 0, 16)
    batches = [inputs(seed, (seed % 4 + 1, seed % 8 + 1), seed % 2) for seed in range(16)]

    def read() -> list[Tensor]:
        return [replays.here()(*batch, whole)["h.1"] for batch in batches]

    def read_apart() -> list[Tensor]:
        with torch.cuda.stream(torch.cuda.Stream()):
            found = read()
            torch.cuda.current_stream().synchronize()
            return found

    replays.begin()
    here = read()
    with ThreadPoolExecutor(1) as pool:
        apart = pool.submit(read_apart).result()
    assert all(torch.equal(one, other) for one, other in zip(here, apart, strict=True))
