"""The training loop: one step, and many."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from flashsae.data.prefetch import Prefetcher
from flashsae.errors import FlashSAEError
from flashsae.io.checkpoint import save_checkpoint
from flashsae.nn.losses import fvu_weights
from flashsae.nn.sae import SAE
from flashsae.optim import lr_factor
from flashsae.train.callbacks import Callback
from flashsae.train.config import ResolvedConfig
from flashsae.train.dead import auxk_loss
from flashsae.train.records import Records
from flashsae.train.state import TrainState, to_checkpoint


def train_step(state: TrainState, x: Tensor, config: ResolvedConfig, scale: float = 1.0) -> dict[str, Tensor]:
    """Do one step of Adam on one batch.

    Args:
        state: changed in place.
        x: [batch_tokens, d_in], float, on the device of the SAE.
        config: settings.
        scale: what to multiply x by, in float32 or wider, before anything else.
    Returns:
        scalars on the device: loss, fvu, l0, and auxk_loss and grad_norm where they are computed. To be read before
        the next step, which may overwrite them.
    """
    capacity = state.dead.capacity(state.step, len(x)) if config.auxk_alpha else 0
    state.optimizer.param_groups[0]["lr"].fill_(_learning_rate(state.step, config))  # that of all groups

    def compute(x: Tensor) -> dict[str, Tensor]:
        # scaled before it is narrowed: float64 input may be out of the range of float32
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return _compute_step(state, (x if scale == 1.0 else x * scale).float(), config, capacity)

    metrics = state.captured(compute, x, (capacity, scale))
    state.step += 1
    return metrics


def _learning_rate(step: int, config: ResolvedConfig) -> float:
    decay_steps = round(config.decay_fraction * config.steps)
    return config.lr * lr_factor(step, config.steps, config.warmup_steps, decay_steps)


def _compute_step(state: TrainState, x: Tensor, config: ResolvedConfig, capacity: int) -> dict[str, Tensor]:
    """Do the part of a step that the device does: no number of it is known to the host."""
    sae, optimizer = state.sae, state.optimizer
    optimizer.zero_grad()
    code = sae.encode(x)
    loss, _, residual = sae.decode_loss(code, x, weights=fvu_weights(x))
    metrics = {"fvu": loss.detach()}
    if capacity:
        aux = auxk_loss(sae, x, residual, state.dead.rows(capacity), config.k_aux)
        loss = loss + config.auxk_alpha * aux
        metrics["auxk_loss"] = aux.detach()
    metrics["loss"] = loss.detach()
    with torch.autograd.set_multithreading_enabled(False):  # one device: a thread of its own only makes the host wait
        loss.backward()  # type: ignore[no-untyped-call]
    if config.clip_norm is not None:
        metrics["grad_norm"] = optimizer.clip_grad_norm(config.clip_norm)
    optimizer.step()
    optimizer.zero_grad()
    fired = state.dead.update(code.top_acts, code.top_indices)
    metrics["l0"] = fired.sum() / len(x)
    return metrics


def train(
    state: TrainState,
    config: ResolvedConfig,
    *,
    callbacks: Sequence[Callback] = (),
    checkpoints: Path | None = None,
    measure: Callable[[SAE], dict[str, float]] | None = None,
) -> SAE:
    """Train until all steps are done.

    Args:
        state: from `init_state`, or restored from a checkpoint; changed in place.
        config: settings.
        callbacks: hear of every step and every log line.
        checkpoints: folder for checkpoints; None writes none.
        measure: called now and then for figures on held-out tokens.
    Returns:
        the trained SAE, in units of the activations as they come; on the CPU if its weights were split, because the
        state may leave no room for whole ones on the device.
    Raises:
        DataError: activations hold NaN or Inf, or ended; or the loss is not finite. Says which step and source.
        StorageError: a checkpoint or log could not be written. What was written before is intact.
    """
    device = state.sae.W_dec.device
    with ExitStack() as stack:
        for callback in callbacks:
            stack.enter_context(callback)
            callback.on_start(state.step, config.steps)
        clock, records = _Clock(state.step), Records()
        batches = stack.enter_context(Prefetcher(state.batches, device, state.captured.capturing))
        while state.step < config.steps:
            step = state.step + 1
            is_last = step == config.steps
            is_checkpoint = checkpoints is not None and (is_last or step % config.checkpoint_every_steps == 0)
            is_measured = measure is not None and (is_last or step % config.evaluate_every_steps == 0)
            try:
                # nothing is read beyond a checkpoint before it is written: it holds the place in the data
                batch = batches.next_batch(ahead=not (is_last or is_checkpoint))
            except FlashSAEError as error:
                raise type(error)(f"step {state.step}: {error}") from error
            metrics = train_step(state, batch, config, state.scale)
            must_know = is_last or is_checkpoint or is_measured  # whether all is well, before anything is written
            if must_know or step % config.log_every_steps == 0:
                dead_latents = state.dead.mask().sum()
                records.add(_known(state, config, clock), {**metrics, "dead_latents": dead_latents})
            for record in records.ready(wait=must_know):
                if is_measured and measure is not None and record["step"] == step:
                    record |= measure(state.current_sae())
                for callback in callbacks:
                    callback.on_log(record)
            for callback in callbacks:
                callback.on_step(state.step)
            if is_checkpoint and checkpoints is not None:
                save_checkpoint(checkpoints, to_checkpoint(state, config))
            if is_checkpoint or is_measured:
                clock.restart(state.step)
    return state.finished_sae()


class _Clock:
    """Tokens per second of the steps alone, without evaluations and checkpoints."""

    def __init__(self, step: int) -> None:
        self.restart(step)

    def restart(self, step: int) -> None:
        self._step, self._start = step, time.perf_counter()

    def rate(self, step: int, batch_tokens: int) -> float:
        rate = (step - self._step) * batch_tokens / max(time.perf_counter() - self._start, 1e-9)
        self.restart(step)
        return rate


def _known(state: TrainState, config: ResolvedConfig, clock: _Clock) -> dict[str, float]:
    """Return what the host knows of a step without asking the device."""
    return {
        "step": state.step,
        "tokens": state.step * config.batch_tokens,
        "lr": _learning_rate(state.step - 1, config),
        "tokens_per_second": clock.rate(state.step, config.batch_tokens),
    }
