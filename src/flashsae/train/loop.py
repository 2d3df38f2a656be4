"""The training loop: one step, many steps, and the state that makes them resume bit for bit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flashsae.data.prefetch import Prefetcher
from flashsae.data.shuffle import Batches
from flashsae.errors import CheckpointError, ConfigError, FlashSAEError
from flashsae.io.checkpoint import Checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
from flashsae.nn.losses import fvu_weights
from flashsae.nn.sae import SAE, SAEConfig
from flashsae.optim import FactoredAdam, lr_factor
from flashsae.train.callbacks import Callback
from flashsae.train.config import ResolvedConfig
from flashsae.train.dead import DeadLatents, auxk_loss
from flashsae.train.graph import CapturedSteps
from flashsae.train.records import Records

INIT_TOKENS = 8192


@dataclass
class TrainState:
    """Everything that changes while training."""

    sae: SAE
    optimizer: FactoredAdam
    dead: DeadLatents
    batches: Batches
    scale: float = 1.0
    """What activations are multiplied by, so that one learning rate fits the biases whatever the unit of x."""
    step: int = 0
    captured: CapturedSteps = field(default_factory=CapturedSteps)

    def current_sae(self) -> SAE:
        """Return the SAE for activations as they come, without the scale; shares weights with the one in training."""
        return self.sae.rescaled(self.scale)

    def finished_sae(self) -> SAE:
        """Return the SAE for activations as they come. Where weights are split, with whole ones, on the CPU."""
        sae = self.current_sae()
        for name in ("W_enc_T", "W_dec"):
            whole = self.optimizer.float32_weights(getattr(self.sae, name))
            setattr(sae, name, nn.Parameter(whole))
        sae.precision = None
        return sae.to(sae.W_dec.device)


def init_state(
    config: ResolvedConfig, batches: Batches, device: torch.device, checkpoints: Path | None = None
) -> TrainState:
    """Return the state to start from.

    Args:
        config: settings.
        batches: of activations.
        device: for the SAE.
        checkpoints: folder whose newest checkpoint is gone on from, if it holds one. Otherwise, and for None, the
            start: random unit directions, b_dec at the mean of some tokens.
    Raises:
        ConfigError: k_aux is larger than a GPU can select.
        CheckpointError: the newest checkpoint is damaged or foreign. It is not passed over silently.
    """
    if device.type == "cuda" and config.auxk_alpha and config.k_aux > 1024:
        raise ConfigError(f"k_aux: expected at most 1024 on a GPU, got {config.k_aux}.")
    found = [] if checkpoints is None else list_checkpoints(checkpoints)
    sae = SAE(SAEConfig(config.d_in, config.d_sae, config.k), seed=config.seed).to(device)
    sae.precision = config.precision
    scale = 1.0
    if not found:
        sample = batches.sample(INIT_TOKENS).to(device, torch.float64)
        scale = _unit_scale(sample)
        sae.initialize_from((sample * scale).float())
    dead = DeadLatents(config.d_sae, config.dead_after_tokens, device)
    state = TrainState(sae, build_optimizer(sae, config), dead, batches, scale)
    if found:
        checkpoint = load_checkpoint(found[-1])
        check_settings(config, checkpoint)
        restore(state, checkpoint)
    return state


def build_optimizer(sae: SAE, config: ResolvedConfig) -> FactoredAdam:
    """Return the optimiser of a training; with bf16 products it splits the weights of `sae`."""
    groups: list[dict[str, Any]] = [
        {"params": [sae.W_dec], "unit_norm": True},
        {"params": [sae.W_enc_T, sae.b_enc, sae.b_dec]},
    ]
    optimizer = FactoredAdam(
        groups,
        config.lr,
        split_weights=config.precision == "bf16",
        state_dtype=torch.bfloat16 if config.moments == "bf16" else torch.float32,
    )
    for group in optimizer.param_groups:
        group["lr"] = optimizer.param_groups[0]["lr"]  # one tensor, so one launch sets it
    return optimizer


def _unit_scale(x: Tensor) -> float:
    """Return the power of two that brings the standard deviation of a coordinate next to 1/4; 1 where x does not vary.

    Weights have no unit, since decoder rows have norm 1; biases have that of x, and Adam moves them by about lr a step.
    Multiplying by a power of two rounds nothing, so the finished SAE is exactly the one that was trained.
    """
    variance = (x - x.mean(0)).square().sum(1).mean().item()
    if not 0.0 < variance < math.inf:
        return 1.0
    return 2.0 ** round(math.log2(x.shape[1] / variance) / 2 - 2)


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
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return _compute_step(state, (wide if scale == 1.0 else wide * scale).float(), config, capacity)

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


def to_checkpoint(state: TrainState, config: ResolvedConfig) -> Checkpoint:
    """Return everything of the state that must survive a kill."""
    place, data = state.batches.state()
    tensors = {f"sae.{name}": tensor for name, tensor in state.sae.state_dict().items()}
    for number, moments in state.optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{number}.{name}": tensor for name, tensor in moments.items()}
    state.dead.finish_reading()
    tensors["dead.tokens_since_fired"] = state.dead.tokens_since_fired
    tensors["rng.torch"] = torch.get_rng_state()
    tensors |= {f"data.{name}": tensor for name, tensor in data.items()}
    return Checkpoint(
        state.step,
        {"data": place, "scale": state.scale, "config": asdict(config), "dead_bounds": state.dead.bounds},
        tensors,
    )


FREE_TO_CHANGE = ("device", "log_every_steps", "evaluate_every_steps", "checkpoint_every_steps")
"""Settings that decide no byte of the result."""


def check_settings(config: ResolvedConfig, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError if a checkpoint was written with other settings; names each with both values."""
    saved = checkpoint.state.get("config", {})
    differences = [
        f"{name} was {saved.get(name)!r} and is {value!r} now"
        for name, value in asdict(config).items()
        if name not in FREE_TO_CHANGE and saved.get(name) != value
    ]
    if differences:
        raise CheckpointError(
            f"the checkpoint of step {checkpoint.step} does not fit these settings: {'; '.join(differences)}. Resume "
            "with the settings of the run, or start a new one."
        )


def restore(state: TrainState, checkpoint: Checkpoint) -> None:
    """Put a fresh state where the checkpoint was taken.

    Raises:
        CheckpointError: the checkpoint is of other sizes or of other data.
    """
    tensors = checkpoint.tensors
    for name, parameter in state.sae.state_dict().items():
        saved = tensors.get(f"sae.{name}")
        if saved is None or saved.shape != parameter.shape:
            got = "nothing" if saved is None else list(saved.shape)
            raise CheckpointError(
                f"the checkpoint of step {checkpoint.step} does not fit these settings: expected {name} of the shape "
                f"{list(parameter.shape)}, got {got}. Resume with the settings of the run, or start a new one."
            )
        parameter.copy_(saved)
    for number, moments in state.optimizer.state_dict()["state"].items():
        for name, tensor in moments.items():
            tensor.copy_(tensors[f"adam.{number}.{name}"])
    for group in state.optimizer.param_groups:
        group["step"].fill_(checkpoint.step)
    state.dead.tokens_since_fired.copy_(tensors["dead.tokens_since_fired"])
    state.dead.bounds = list(checkpoint.state["dead_bounds"])
    torch.set_rng_state(tensors["rng.torch"])
    prefix = "data."
    data = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    state.batches.restore((checkpoint.state["data"], data))
    state.scale = checkpoint.state["scale"]
    state.step = checkpoint.step
