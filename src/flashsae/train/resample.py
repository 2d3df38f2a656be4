"""Dead latents that start again as what an SAE explains worst, as Bricken et al. 2023 resample them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashsae.data.acts import Batch
from flashsae.sae.module import SAE
from flashsae.sae.step import join_sites
from flashsae.train.config import TrainConfig

if TYPE_CHECKING:
    from flashsae.train.state import TrainState

EVERY = "resample_every_steps"
"""The setting of an architecture that turns it on: steps between two resamplings, 0 for none."""

SAMPLE_TOKENS = 8192
"""Tokens that latents start again from, at most: those of the last steps before."""

ENCODER_NORM = 0.2
"""Norm of a new encoder row, of the mean norm of those of the living."""

Recent = list[tuple[Tensor, Tensor]]
"""Of some steps, as they come: what goes in and what is reconstructed, the same tensor for an autoencoder."""


def resample(state: TrainState, batch: Batch, config: TrainConfig) -> None:
    """Do what is due behind a step: keep its tokens if a resampling is near, and resample if it is time.

    Latents that were active on no token of the last half of the steps between two resamplings start again:

        W_dec row = t / ‖t‖,  W_enc_T row = 0.2 · mean norm of living rows · u / ‖u‖,  b_enc = 0

    of a token each, u = x − b_dec as the encoder sees it, t = target − b_dec, which are the same for an autoencoder.
    Tokens are drawn with a probability in proportion to their squared loss, (‖target − x_hat‖²)², none twice: two
    latents that start equal would stay equal. Where more latents are dead than there are tokens, the others wait. What
    else a latent has starts again at its initial value; moments of Adam at 0. The last resampling leaves at least as
    many steps behind it as there are between two.

    Args:
        state: behind the step; changed in place, where captured steps read it anew.
        batch: of the step.
        config: settings; of the architecture `resample_every_steps` tells when, and 0 or no such setting never.
    Numerics: the same bits for the same seed and step, killed and resumed in between or not. Waits for the device, at a
        resampling.
    Source: Bricken et al. 2023, "Towards monosemanticity", appendix "Neuron resampling"; they draw from 819,200 tokens,
        with repeats.
    """
    every = getattr(config.arch, EVERY, 0)
    if not every:
        return
    until = -state.step % every
    if state.step + until + every > config.stage(state.step - 1)[1]:
        return
    x, target = join_sites(state.sae.architecture, batch)
    tokens = len(x)
    if until * tokens < SAMPLE_TOKENS:
        kept = x[:SAMPLE_TOKENS].clone()
        state.recent.append((kept, kept if target is x else target[:SAMPLE_TOKENS].clone()))
    if until == 0:
        dead = state.dead.tokens_since_fired >= max(1, every * tokens // 2)
        _restart(state, dead, *_joined(state.recent), config.seed, tokens)
        state.recent.clear()


@torch.no_grad()
def _restart(state: TrainState, dead: Tensor, x: Tensor, target: Tensor, seed: int, at_once: int) -> None:
    """Let dead latents start again from tokens as they come, encoded `at_once`."""
    sae, x_and_target = state.sae, state.scaling(x, target)
    u, t, weights = _directions(sae.rescaled(1.0).eval(), *x_and_target, at_once)
    generator = torch.Generator("cpu").manual_seed((seed * 0x9E3779B1 + state.step) % 2**63)
    noise = torch.rand(len(u), generator=generator, dtype=torch.float64, device="cpu").to(u.device)
    keys = weights.log() - (-noise.log()).log()  # the largest of these are a sample without repeats (Gumbel)
    rows = dead.nonzero()[:, 0][: int((weights > 0).sum())]
    if len(rows) == 0:
        return
    chosen = keys.sort(descending=True, stable=True).indices[: len(rows)]
    norms = torch.linalg.vector_norm(sae.W_enc_T, dim=1, dtype=torch.float32)
    norm = (norms if bool(dead.all()) else norms[~dead]).mean()
    new = {"W_enc_T": ENCODER_NORM * norm * F.normalize(u[chosen], dim=1), "W_dec": F.normalize(t[chosen], dim=1)}
    for parameter in sae.architecture.parameters:
        values = new.get(parameter.name)
        if values is None and parameter.per_latent and not isinstance(parameter.initial, str):
            shape = (len(rows), *getattr(sae, parameter.name).shape[1:])
            values = torch.full(shape, parameter.initial, dtype=torch.float32, device=rows.device)
        if values is not None and parameter.trained:
            state.optimizer.restart_rows(getattr(sae, parameter.name), rows, values)
    state.dead.tokens_since_fired[rows] = 0


def _directions(sae: SAE, x: Tensor, target: Tensor, at_once: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return u and t of each token, [n, d_in] and [n, d_out], and its squared loss; 0 where u or t has no direction."""
    direct = sae.architecture.direct
    u = x if sae.b_pre is None else x - sae.b_pre
    t = target - sae.b_dec if direct is None else target - sae.b_dec - direct(sae, x)
    x_hat = torch.cat([sae(part) for part in torch.split(x, at_once)])
    losses = (target - x_hat).double().square().sum(1)
    has_direction = (u.double().square().sum(1) > 0) & (t.double().square().sum(1) > 0)
    return u, t, losses.square() * has_direction


def _joined(recent: Recent) -> tuple[Tensor, Tensor]:
    x = torch.cat([x for x, _ in recent])
    return x, x if all(x is target for x, target in recent) else torch.cat([target for _, target in recent])


def recent_tensors(recent: Recent) -> dict[str, Tensor]:
    """Return what a checkpoint keeps of the tokens of the last steps, by name."""
    tensors: dict[str, Tensor] = {}
    for number, (x, target) in enumerate(recent):
        tensors |= {f"{number}.x": x} | ({} if target is x else {f"{number}.target": target})
    return tensors


def recent_of(tensors: Mapping[str, Tensor], device: Any) -> Recent:
    """Undo `recent_tensors`."""
    there = {name: tensor.to(device) for name, tensor in tensors.items()}
    steps = range(sum(name.endswith(".x") for name in there))
    return [(there[f"{number}.x"], there.get(f"{number}.target", there[f"{number}.x"])) for number in steps]
