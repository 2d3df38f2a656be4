from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import pytest
import torch

from flashsae.data.prefetch import Prefetcher
from flashsae.data.shuffle import shuffled
from flashsae.data.sources import ArraySource, Chunk, Cursor, IterableSource
from flashsae.errors import DataError
from flashsae.train import TrainConfig, fit

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def _keep_busy(device: str) -> None:
    if device == "cuda":
        torch.cuda._sleep(2_000_000)  # about a millisecond


class Stream:
    """Activations that take their device a while, as those of a language model do."""

    name = "a model"

    def __init__(self, device: str, **widths: int) -> None:
        self.device, self.widths = device, widths

    def chunks(self, split: str, cursor: Cursor | None = None) -> Iterator[tuple[Chunk, Cursor]]:
        for number in range((cursor or {"number": 0})["number"], 10):
            rows = torch.arange(1000.0, device=self.device) + 1000 * number
            _keep_busy(self.device)
            acts = {site: rows[:, None].repeat(1, width).cos() for site, width in self.widths.items()}
            yield Chunk(acts, torch.full((1000,), number)), {"number": number + 1}


@pytest.mark.parametrize("sites", [("h",), ("h", "in")])
@pytest.mark.parametrize("kind", ["rows", "stream"])
@pytest.mark.parametrize("device", DEVICES)
def test_batches_are_those_of_the_source(
    device: str, kind: str, sites: tuple[str, ...], generator: torch.Generator
) -> None:
    widths = {site: 64 + 8 * number for number, site in enumerate(sites)}
    arrays = {site: torch.randn(4096, 8 * width, generator=generator) for site, width in widths.items()}
    source = ArraySource(arrays) if kind == "rows" else Stream(device, **widths)
    plain, behind = (shuffled(source, 256, seed=0, buffer_tokens=2048) for _ in range(2))
    expected, found = [], []
    with Prefetcher(behind, torch.device(device)) as batches:
        for step in range(40):
            is_checkpoint = step % 10 == 9
            batch = batches.next_batch(ahead=9 - step % 10)
            _keep_busy(device)  # training is late: it reads the batch when the next one is there already
            found.append({site: acts.clone() for site, acts in batch.items()})
            expected.append(plain.next_batch())
            if is_checkpoint:
                (place, tensors), (expected_place, expected_tensors) = behind.state(), plain.state()
                assert place == expected_place
                assert all(torch.equal(tensors[name], tensor) for name, tensor in expected_tensors.items())
    for number, (a, b) in enumerate(zip(found, expected)):
        assert tuple(a) == tuple(b) == sites
        for site in sites:
            assert a[site].device.type == device
            assert torch.equal(a[site].cpu(), b[site].cpu()), (number, site)


@pytest.mark.parametrize("device", DEVICES)
def test_an_error_of_the_source_comes_with_the_batch_that_it_belongs_to(
    device: str, generator: torch.Generator
) -> None:
    x = torch.randn(2048, 8, generator=generator)
    batches = shuffled(IterableSource(iter(x.split(100))), 256, seed=0, buffer_tokens=512)
    with Prefetcher(batches, torch.device(device)) as fetched:
        for _ in range(8):
            fetched.next_batch(ahead=3)
        with pytest.raises(DataError, match="the iterable x ended"):
            fetched.next_batch(ahead=3)


@pytest.mark.gpu
def test_steps_are_captured_while_a_model_runs_in_the_other_thread() -> None:
    held: list[torch.Tensor] = []

    def model() -> Iterator[torch.Tensor]:
        for number in count():
            if number < 400:  # memory and random numbers: neither may be asked for while a step is captured
                held.append(torch.empty(3 << 20, device="cuda"))
            rows = torch.randn(64, 64, device="cuda")
            assert bool(rows.isfinite().all())
            yield rows

    config = TrainConfig(batch_tokens=2048, shuffle_tokens=4096, tokens=2048 * 12, device="cuda", precision="bf16")
    sae = fit(model(), d_sae=512, k=8, config=config, progress=False)
    assert len(held) == 400
    assert bool(sae.W_dec.isfinite().all())
