"""Batches of several SAEs: what each gets of them, and where they may go on."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

import flashsae
from flashsae.data.shuffle import shuffled
from flashsae.data.sources import ArraySource, IterableSource, Source
from flashsae.data.tee import Tee
from flashsae.data.together import Together
from flashsae.errors import CheckpointError

ROWS = torch.arange(400, dtype=torch.float32)[:, None].expand(-1, 3).contiguous()
SITES = {"a": ROWS, "b": -ROWS[:, :2]}


def _source(kind: str) -> Source:
    if kind == "array":
        return ArraySource(SITES)
    parts = zip(*(rows.split(30) for rows in SITES.values()))
    return IterableSource([dict(zip(SITES, each)) for each in parts], sites=tuple(SITES))


def _together(kind: str, *seeds: int) -> Together:
    return Together(_source(kind), 32, seeds=seeds, buffer_tokens=96)


@pytest.mark.parametrize("kind", ["array", "stream"])
@pytest.mark.parametrize("seeds", [(3,), (3, 1, 3)])
def test_each_gets_its_sites_in_the_order_of_its_seed(kind: str, seeds: tuple[int, ...]) -> None:
    together = _together(kind, *seeds)
    views = [together.view(seed, sites) for seed in seeds for sites in (["b"], ["a"], ["b", "a"])]
    alone = [shuffled(_source(kind), 32, seed=seed, buffer_tokens=96) for seed in seeds for _ in range(3)]
    assert torch.equal(views[0].sample(50)["b"], alone[0].sample(50)["b"])
    for _ in range(40):  # more than two epochs
        batch = together.next_batch()
        for view, batches in zip(views, alone):
            own, expected = view.of(batch), batches.next_batch()
            assert all(torch.equal(acts, expected[site]) for site, acts in own.items())
    assert list(views[2].of(batch)) == ["b", "a"]
    assert together.epoch_tokens == views[0].epoch_tokens == 400


@pytest.mark.parametrize("kind", ["array", "stream"])
def test_a_place_is_gone_on_from_with_the_same_seeds_alone(kind: str) -> None:
    whole = _together(kind, 3, 1)
    for _ in range(7):
        whole.next_batch()
    state = whole.state()
    resumed = _together(kind, 1, 3)  # their order does not matter
    resumed.restore(state)
    for _ in range(20):
        batch, again = whole.next_batch(), resumed.next_batch()
        assert all(torch.equal(acts, again[site]) for site, acts in batch.items())
    with pytest.raises(CheckpointError, match="is that of the seeds 3, 1, and the run has 3, 2 now"):
        _together(kind, 3, 2).restore(state)
    with pytest.raises(CheckpointError, match="the place in the data is damaged"):
        _together(kind, 3, 1).restore(({"orders": 3}, {}))


def test_readers_of_a_stream_begin_at_one_place() -> None:
    tee = Tee(_source("stream"), 2)
    first, second = (tee.reader(number) for number in range(2))
    _, cursor = next(first.chunks("train"))
    with pytest.raises(CheckpointError, match="expected all SAEs of a run at one place in the stream"):
        next(second.chunks("train", cursor))
    assert list(second.chunks("held_out")) == []
    assert dict(first.widths) == {"a": 3, "b": 2}


def test_a_language_model_is_read_once_for_hookpoints_and_seeds(tiny: ModuleType) -> None:
    model = tiny.gpt2()
    settings: list[dict[str, Any]] = [
        {"hookpoint": "h.0"},
        {"hookpoint": "h.1", "seed": 4},
        {"hookpoint": "h.0", "k": 3},
    ]
    given = {"d_sae": 24, "k": 2, "batch_tokens": 32, "tokens": 32 * 9, "shuffle_tokens": 128, "device": "cpu"}
    many = flashsae.fit_many(
        tiny.source(model=model, hookpoints=["h.0", "h.1"]), [{**given, **one} for one in settings], progress=False
    )
    for sae, one in zip(many, settings):
        own = {name: value for name, value in one.items() if name != "hookpoint"}
        alone = flashsae.fit(
            tiny.source(model=model, hookpoints=[one["hookpoint"]]), progress=False, **{**given, **own}
        )
        assert all(torch.equal(tensor, alone.state_dict()[name]) for name, tensor in sae.state_dict().items()), one
