"""Inputs that certified selections are compared with float64 on: random, made to break a bound, and trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flashsae.data.acts import only_site
from flashsae.data.cache import ActivationCache
from flashsae.data.shuffle import RowShuffle
from flashsae.ops.encode.keys import Keys
from flashsae.sae.config import SAEConfig
from flashsae.sae.module import SAE
from flashsae.train import TrainConfig, init_state, train


@dataclass(frozen=True)
class Selected:
    """What is selected from.

    Args:
        x: [B, d_in], centred.
        W: [d_sae, d_in].
        keys: what latents are selected by.
        k: latents a token.
        copies: how often each row of W comes: latents j and j + d_sae / copies are equal.
    """

    x: Tensor
    W: Tensor
    keys: Keys
    k: int
    copies: int = 1


@dataclass(frozen=True)
class Draw:
    """Sizes, a generator, and what is drawn with it."""

    B: int
    d: int
    n: int
    k: int
    generator: torch.Generator

    def normal(self, *shape: int) -> Tensor:
        """Return normal numbers."""
        return torch.randn(*shape, device=self.generator.device, generator=self.generator)

    def sometimes(self, chance: float, *shape: int) -> Tensor:
        """Return what is true that often."""
        return torch.rand(*shape, device=self.generator.device, generator=self.generator) < chance

    def rows(self) -> Tensor:
        """Return unit weight rows."""
        return torch.nn.functional.normalize(self.normal(self.n, self.d), dim=1)

    def random(self) -> Selected:
        """Return normal tokens and unit weight rows."""
        W = self.rows()
        return Selected(self.normal(self.B, self.d), W, Keys(0.1 * self.normal(self.n)), self.k)


def draw(B: int, d: int, n: int, k: int, seed: int, device: torch.device) -> Draw:
    """Return what cases are drawn with."""
    return Draw(B, d, n, k, torch.Generator(device).manual_seed(seed))


def adversarial_cases(of: Draw) -> Iterator[tuple[str, Selected]]:
    """Yield inputs made to break a bound."""
    yield from _of_weights(of)
    yield from _of_tokens(of)
    yield from _of_keys(of)


def _of_weights(of: Draw) -> Iterator[tuple[str, Selected]]:
    x, W, zero = of.normal(of.B, of.d), of.rows(), torch.zeros_like(of.normal(of.n))
    eighth = W[: of.n // 8].repeat(8, 1)
    yield "near ties", Selected(x, eighth * (1 + 1e-7 * of.normal(of.n, 1)), Keys(zero), of.k)
    yield "duplicated latents", Selected(x, eighth, Keys(zero), of.k, copies=8)
    norms = 10.0 ** of.normal(of.n, 1)
    huge = 10.0 ** (8 * of.normal(of.B, 1)).clamp(-15, 15)
    yield "huge and tiny norms", Selected(x * huge, W * norms, Keys(zero), of.k)
    offset = 1000 * of.normal(1, of.d)
    yield "cancellation", Selected(x + offset, W, Keys(-(offset @ W.T)[0]), of.k)
    half = of.d // 2
    twins = torch.cat([x[:, :half], x[:, :half] * (1 + 1e-4 * of.normal(of.B, half))], 1)
    yield "halves that cancel", Selected(twins, torch.cat([W[:, :half], -W[:, :half]], 1), Keys(zero), of.k)
    spikes = torch.where(of.sometimes(0.002, of.n, of.d), 1000.0, 1.0)
    yield "spikes in weights", Selected(x, torch.nn.functional.normalize(W * spikes, dim=1), Keys(zero), of.k)


def _of_tokens(of: Draw) -> Iterator[tuple[str, Selected]]:
    x, W, keys = of.normal(of.B, of.d), of.rows(), Keys(0.1 * of.normal(of.n))
    outliers = torch.where(torch.arange(of.d, device=x.device) % 97 == 13, 1000.0, 1.0)
    yield "outlier dimensions 1000 times the rest", Selected(x * outliers, W, keys, of.k)
    yield "outliers anywhere", Selected(x * torch.where(of.sometimes(0.004, of.B, of.d), 3000.0, 1.0), W, keys, of.k)
    massive = x.clone()
    massive[::128] *= 1000  # the first token of each text
    massive[::128, of.d // 3] = 3000 * massive[::128].abs().mean()
    yield "massive first token", Selected(massive, W, keys, of.k)
    single = torch.zeros_like(x)
    single[:, of.d // 2] = 1 + of.normal(of.B).abs()
    yield "one dimension alone", Selected(single, W, keys, of.k)
    yield "denormals", Selected(x * 1e-40, W, Keys(torch.zeros_like(keys.b_enc)), of.k)
    yield "zeros", Selected(torch.zeros_like(x), W, Keys(torch.zeros_like(keys.b_enc)), of.k, copies=of.n)


def _of_keys(of: Draw) -> Iterator[tuple[str, Selected]]:
    x, W, bias = of.normal(of.B, of.d), of.rows(), of.normal(of.n)
    yield "bias decides", Selected(x * 1e-3, W, Keys(bias), of.k)
    scale = of.normal(of.n).abs() * of.sometimes(0.9, of.n)
    yield "key scales", Selected(x, W, Keys(0.1 * bias, scale), of.k)
    yield "magnitude", Selected(x, W, Keys(0.1 * bias, magnitude=True), of.k)


def trained_case(cache: Path, d_sae: int, device: torch.device, *, steps: int = 600, tokens: int = 16384) -> Selected:
    """Train an SAE on cached activations, and return other tokens with its encoder."""
    source = ActivationCache(cache)
    config = TrainConfig(d_sae=d_sae, k=32, tokens=1024 * steps, batch_tokens=1024).resolve(source.d_in)
    state = init_state(config, RowShuffle(source, 1024, seed=0), device)
    sae: SAE = train(state, config)
    assert isinstance(sae.config, SAEConfig)
    shuffled = RowShuffle(source, 1024, seed=1)
    x = torch.cat([only_site(shuffled.next_batch()) for _ in range(tokens // 1024)]).to(device, torch.float32)
    return Selected(x - sae.b_dec.detach(), sae.W_enc_T.detach(), Keys(sae.b_enc.detach()), config.arch.k)
