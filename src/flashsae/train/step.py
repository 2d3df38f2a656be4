"""One step of a training."""

from __future__ import annotations

from collections.abc import Generator, Hashable
from typing import Any

import torch
from torch import Tensor

from flashsae import distributed
from flashsae.backend import crossover
from flashsae.data.acts import Batch
from flashsae.optim import learning_rate
from flashsae.sae.step import Step, join_sites
from flashsae.train.average import average
from flashsae.train.config import TrainConfig
from flashsae.train.graph import Parts
from flashsae.train.resample import resample
from flashsae.train.room import Room, read_number
from flashsae.train.screening import look
from flashsae.train.state import TrainState, progress_at


def train_step(state: TrainState, batch: Batch, config: TrainConfig) -> dict[str, Tensor]:
    """Do one step of Adam on one batch.

    Args:
        state: changed in place.
        batch: [batch_tokens, d] by site, float, on the device of the SAE; the sites in the order in which the
            architecture names them. Scaled as the state says, in float32 or wider, before anything else.
        config: settings.
    Returns:
        scalars on the device: every term of the loss by name, fvu first, Σ‖x − x_hat‖² / (batch_tokens · variance of a
        token of the initial sample), which estimates the FVU of the whole set; loss, their weighted sum; l0;
        grad_norm where it is computed; left_out where codes have a capacity. To be read before the next step, which may
        overwrite them.
    """
    terms = state.sae.architecture.terms
    needs_dead = any(term.of_dead_latents and term.weight_in(config.arch, config) for term in terms)
    tokens = len(next(iter(batch.values())))
    capacity = state.dead.capacity(state.step, tokens) if needs_dead else 0
    state.optimizer.param_groups[0]["lr"].fill_(learning_rate(state.step, config))  # that of all groups
    state.sae.set_progress(progress_at(state.step, config))
    look(state, batch, config)

    def parts(batch: Batch) -> Generator[Any, None, None]:
        return _parts_of_step(state, batch, config, capacity)

    kind = capacity, state.scaling, state.sae.width, state.sae.precision
    if state.room is None:
        metrics = state.captured(lambda batch: _whole(parts(batch)), batch, kind)
    else:
        metrics = _with_room(state, state.room, parts, batch, kind)
    state.step += 1
    resample(state, batch, config)
    average(state, config)
    return metrics


def _with_room(
    state: TrainState, room: Room, parts: Parts, batch: Batch, kind: tuple[Hashable, ...]
) -> dict[str, Tensor]:
    """Do a step whose codes vary in size: look at the count behind the encoder, and encode again if it is too large."""
    sae, tokens = state.sae, len(next(iter(batch.values())))
    dense_from = min(2**31 - 1, int(crossover(sae.W_enc_T) * tokens * sae.config.d_sae))
    count = 0

    def goes_on(wanted: Tensor | None) -> bool:
        nonlocal count
        count = 0 if wanted is None else read_number(wanted)
        return room.fits(count, dense_from)

    metrics = None
    while metrics is None:
        sae.capacity = room.capacity
        metrics = state.captured.in_parts(parts, batch, (*kind, sae.capacity), goes_on)
    room.done(count, dense_from)
    return metrics


def _whole(parts: Generator[Any, None, None]) -> dict[str, Tensor]:
    """Do a step that nobody looks into."""
    next(parts)
    metrics: dict[str, Tensor] = next(parts)
    parts.close()
    return metrics


def _parts_of_step(state: TrainState, batch: Batch, config: TrainConfig, capacity: int) -> Generator[Any, None, None]:
    """Do the part of a step that the device does: no number of it is known to the host.

    Yields how many entries the code has, behind the encoder, which has changed nothing yet; then the metrics.
    """
    sae, optimizer = state.sae, state.optimizer
    optimizer.zero_grad()
    x, target = state.scaling(*join_sites(sae.architecture, batch))
    dead = state.dead.rows(capacity) if capacity else None
    code = sae.encode(x)
    yield code.pattern.count
    step = Step(sae, x, target, code, state.loss_weights(target), dead, config.k_aux, config.auxk)
    loss, metrics = step.total(config)
    metrics["loss"] = loss.detach()
    with torch.autograd.set_multithreading_enabled(False):  # one device: a thread of its own only makes the host wait
        loss.backward()  # type: ignore[no-untyped-call]
    if config.clip_norm is not None:
        metrics["grad_norm"] = optimizer.clip_grad_norm(config.clip_norm)
    optimizer.step()
    optimizer.zero_grad()
    if step.code.pattern.left_out is not None and not sae.architecture.varies:
        metrics["left_out"] = step.code.pattern.left_out
    active_on = state.dead.update(sae.main_part(step.code))
    metrics["l0"] = active_on.sum().float() / distributed.tokens_of(len(x))
    if sae.architecture.after_step is not None:
        with torch.no_grad():
            sae.architecture.after_step(sae, step.code)
    yield metrics
