"""How many tokens the demo trains on: its usual ones, or as many as a slow machine gets through in the same minutes."""

from __future__ import annotations

import time
from dataclasses import replace
from statistics import median

import torch

from flashsae.backend import resolve_device
from flashsae.data.shuffle import shuffled
from flashsae.data.sources import ArraySource
from flashsae.settings.run import RunConfig
from flashsae.train.config import TrainConfig
from flashsae.train.state import init_state
from flashsae.train.step import train_step

SECONDS = 210.0
"""What the demo may take once everything is installed: with the installation, about four minutes."""

LEAST_TOKENS = 300_000
"""With fewer the report has little to show."""

_D_IN = 384  # of the model that the demo reads
_WARM_UP_STEPS, _TIMED_STEPS = 2, 8
_OTHER_SECONDS = 20.0  # start and report
_OTHER_TOKENS = 1_250_000  # reading the text takes as long as training on so many tokens, wherever it was measured


def paced(config: RunConfig) -> tuple[RunConfig, str]:
    """Choose the tokens of the demo by a measurement of about a second; a GPU needs none.

    Args:
        config: the settings of the demo.
    Returns:
        the settings to run with, and one sentence on why they have fewer tokens; "" where they have not.
    """
    if resolve_device(config.train.device).type != "cpu":
        return config, ""
    rate = training_rate(config.train, _D_IN)
    tokens = affordable_tokens(rate, config.train.tokens)
    if tokens == config.train.tokens:
        return config, ""
    why = (
        f"Training on {tokens:,} tokens instead of {config.train.tokens:,}, to end within a few minutes: this machine "
        f"trains on {rate:,.0f} tokens a second. --tokens {config.train.tokens} trains on all."
    )
    return replace(config, train=replace(config.train, tokens=tokens)), why


def affordable_tokens(rate: float, most: int) -> int:
    """Return how many tokens to train on, in whole hundred thousands unless it is `most`.

    Args:
        rate: tokens a second of training alone.
        most: where there is time enough.
    """
    tokens = int(rate * (SECONDS - _OTHER_SECONDS)) - _OTHER_TOKENS
    return min(most, max(LEAST_TOKENS, tokens // 100_000 * 100_000))


def training_rate(config: TrainConfig, d_in: int) -> float:
    """Measure the tokens a second of some steps of training, on activations at random.

    Args:
        config: the settings.
        d_in: width of the activations.
    """
    settings = config.resolve(d_in)
    x = torch.randn(
        4 * settings.batch_tokens, d_in, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu"
    )
    batches = shuffled(ArraySource(x), settings.batch_tokens, seed=0, buffer_tokens=len(x))
    state = init_state(settings, batches, resolve_device(settings.device))
    seconds = []
    for _ in range(_WARM_UP_STEPS + _TIMED_STEPS):
        begin = time.perf_counter()
        train_step(state, batches.next_batch(), settings)
        seconds.append(time.perf_counter() - begin)
    return settings.batch_tokens / median(seconds[_WARM_UP_STEPS:])
