"""Whether a training screens pre-activations in 8 bits, by how many latents of some tokens that leaves open.

Where many pre-activations lie close to the k-th, as when an SAE has learnt few tokens by heart, all of them would be
rescored, which takes longer than the product that a screen spares. What is selected is the same either way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flashsae import distributed
from flashsae.architecture import Progress
from flashsae.backend import log_once, use_kernels
from flashsae.data.acts import Batch
from flashsae.ops.encode.keys import Keys
from flashsae.precision import has_screen, is_rounded, operand_of
from flashsae.sae.module import SAE
from flashsae.sae.step import join_sites
from flashsae.train.config import TrainConfig

if TYPE_CHECKING:
    from flashsae.train.state import TrainState

PERIOD = 64
"""Steps from one look to the next. A look waits for the device."""

TOKENS = 256
"""Of the batch, that are looked at."""

MEMORY = [64 << 20, 64 << 20]
"""Bounds of what a look takes: a step has all the rest."""

MOST_IN_BF16, MOST_IN_FLOAT32 = 4.0, 6.0
"""Latents rescored for each that is selected, on average, from which a screen takes longer than it spares."""


def look(state: TrainState, batch: Batch, config: TrainConfig) -> None:
    """Before a step that is due for it, let the SAE compute in the precision of the settings, or without its screen.

    Args:
        state: of a training that is about to do the step.
        batch: as of `train_step`.
        config: settings.
    """
    sae = state.sae
    if not has_screen(config.precision) or state.step % PERIOD or not use_kernels(sae.W_enc_T):
        return
    k = selected(sae)
    if k is None or not _pays(sae, config, k):
        return
    sae.precision = config.precision
    x, _ = state.scaling(*join_sites(sae.architecture, {site: acts[:TOKENS] for site, acts in batch.items()}))
    mean = distributed.averaged(_open_latents(sae, x, k))
    if mean > k * (MOST_IN_BF16 if is_rounded(config.precision) else MOST_IN_FLOAT32):
        sae.precision = operand_of(config.precision)
        log_once(
            f"{config.precision}: where many pre-activations lie close to the smallest that is selected, so that a "
            f"screen leaves most work to be done, steps run in {sae.precision}"
        )


def selected(sae: SAE) -> int | None:
    """Return how many latents are selected for each token at the step that an SAE is at.

    None where no number is: a selection over a batch, or above a threshold, is never screened.
    """
    architecture, arch = sae.architecture, sae.config.arch
    if architecture.most is None:
        return None
    most = max(1, architecture.most(arch))
    if architecture.width is not None and sae.width is not None:
        widest = max(architecture.width(arch, progress) for progress in (Progress(0, 1), Progress.end()))
        most = max(1, most * sae.width // max(1, widest))
    return min(most, sae.config.d_sae)


def _pays(sae: SAE, config: TrainConfig, k: int) -> bool:
    """Tell whether there may be a screen at these sizes, which are the same wherever the training runs."""
    from flashsae.ops.encode import launch, screen

    (n, d), rounds = sae.W_enc_T.shape, is_rounded(config.precision)
    known = launch.screened_k(n, k)
    return screen.pays(config.batch_tokens, n, d, known, rounds=rounds, device=sae.W_enc_T.device)


@torch.no_grad()
def _open_latents(sae: SAE, x: Tensor, k: int) -> float:
    """Return how many latents of a token are rescored behind a screen, on average; all of one that is done anew."""
    from flashsae.ops.encode.launch import count_open

    architecture, b_pre = sae.architecture, sae.b_pre
    scale = None if architecture.selects_by is None else architecture.selects_by(sae)
    keys, x = Keys.marked(sae.b_enc, scale, architecture.signed), sae.read(x)
    centred = x if b_pre is None else x - b_pre
    counts = count_open(centred, sae.W_enc_T, keys, k, str(sae.precision), MEMORY, sae.noise)
    return float(counts.double().mean())
