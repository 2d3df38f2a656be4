"""What several SAEs side by side cost beside one: `python -m benchmarks.many`, with `--tiny` on any device.

Trains one SAE and several of the same size on the same activations, as `flashsae train` does: one shuffled batch for
all, and a step with a CUDA graph of its own for each. The time is that of a step of all SAEs, in the second half of a
training, and the ratio that of several to one; medians of a few trainings in turn. Appends one JSON line.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import cyclopts
import torch
from rich.console import Console

from benchmarks.session import RESULTS, provenance
from flashsae.backend import resolve_device
from flashsae.data.sources import ArraySource
from flashsae.data.together import Together
from flashsae.logs.callback import Callback
from flashsae.train.config import TrainConfig
from flashsae.train.following import Training
from flashsae.train.loop import train_together
from flashsae.train.state import init_state


@dataclass(frozen=True)
class SizesOfMany:
    """Of each SAE and its training; the default is S, in bf16.

    Args:
        d_in, d_sae, k, batch_tokens: as of a training.
        steps: of each training; the second half is timed.
        rows: of activations, on the device.
        saes: side by side.
        rounds: trainings of one, and of several, in turn.
        precision: of products.
    """

    d_in: int = 768
    d_sae: int = 24576
    k: int = 32
    batch_tokens: int = 4096
    steps: int = 400
    rows: int = 131072
    saes: int = 4
    rounds: int = 5
    precision: str = "bf16"


TINY = SizesOfMany(d_in=16, d_sae=64, k=4, batch_tokens=32, steps=8, rows=256, rounds=2)


class _Timer(Callback):
    """Times the second half of a training."""

    def __init__(self, device: torch.device, steps: int) -> None:
        self._device, self._steps = device, steps
        self.seconds_a_step, self._begin = 0.0, 0.0

    def on_step(self, step: int) -> None:
        if step in (self._steps // 2, self._steps):
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            now = time.perf_counter()
            if step == self._steps:
                self.seconds_a_step = (now - self._begin) / (self._steps - self._steps // 2)
            self._begin = now


def seconds_a_step(count: int, x: torch.Tensor, sizes: SizesOfMany) -> float:
    """Return the time of a step of so many SAEs, which differ in their learning rate."""
    device = x.device
    batches = Together(ArraySource(x), sizes.batch_tokens, seeds=[0], buffer_tokens=sizes.rows)
    trainings = []
    for number in range(count):
        settings: dict[str, Any] = {"precision": sizes.precision, "device": str(device)}
        config = TrainConfig(
            d_sae=sizes.d_sae, k=sizes.k, batch_tokens=sizes.batch_tokens, tokens=sizes.batch_tokens * sizes.steps,
            lr=1e-4 * (1 + number), dead_after_tokens=10_000_000, **settings,
        ).resolve(sizes.d_in)  # fmt: skip
        state = init_state(config, batches.view(0, ["x"]), device)
        trainings.append(Training(state, config, is_told_of_repeats=True))
    timer = _Timer(device, sizes.steps)
    train_together(trainings, batches, callbacks=[timer])
    return timer.seconds_a_step


def main(
    *,
    sizes: Annotated[SizesOfMany, cyclopts.Parameter(name="*")] = SizesOfMany(),
    tiny: bool = False,
    device: str = "auto",
    out: Path = RESULTS / "many.jsonl",
) -> None:
    """Time a step of several SAEs side by side, and of one.

    Args:
        tiny: toy sizes, to try it.
        device: auto, cpu, cuda ...
        out: file to append a JSON line to.
    """
    place = resolve_device(device)
    sizes = TINY if tiny else sizes
    x = torch.randn(sizes.rows, sizes.d_in, generator=torch.Generator().manual_seed(0)).to(place, torch.bfloat16)
    times: dict[int, list[float]] = {1: [], sizes.saes: []}
    for _ in range(sizes.rounds):
        for count, found in times.items():
            found.append(seconds_a_step(count, x, sizes))
    one, several = (median(found) for found in times.values())
    record = {
        "group": "many", "sizes": asdict(sizes), "seconds_a_step": {str(n): found for n, found in times.items()},
        "ratio": several / one,
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a") as file:
        file.write(json.dumps(record | provenance(place)) + "\n")
    Console().print(
        f"one SAE: {1e3 * one:.3f} ms a step; {sizes.saes} side by side: {1e3 * several:.3f} ms, {several / one:.2f} "
        "times as much"
    )


if __name__ == "__main__":
    cyclopts.run(main)
