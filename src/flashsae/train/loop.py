"""The training loop: one step, many steps, and the state that makes them resume bit for bit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashsae.data.shuffle import Batches
from flashsae.errors import CheckpointError, DataError, FlashSAEError
from flashsae.io.checkpoint import Checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
from flashsae.nn.losses import auxk_loss, fvu_loss
from flashsae.nn.sae import SAE, SAEConfig
from flashsae.optim import build_adam, lr_factor
from flashsae.train.callbacks import Callback
from flashsae.train.config import ResolvedConfig
from flashsae.train.dead import DeadLatents

INIT_TOKENS = 8192


@dataclass
class TrainState:
    """Everything that changes while training."""

    sae: SAE
    optimizer: torch.optim.Adam
    dead: DeadLatents
    batches: Batches
    scale: float = 1.0
    """What activations are multiplied by, so that one learning rate fits the biases whatever the unit of x."""
    step: int = 0

    def finished_sae(self) -> SAE:
        """Return the SAE for activations as they come, without the scale; shares weights with the one in training."""
        return self.sae.rescaled(self.scale)


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
        CheckpointError: the newest checkpoint is damaged or foreign. It is not passed over silently.
    """
    found = [] if checkpoints is None else list_checkpoints(checkpoints)
    sae = SAE(SAEConfig(config.d_in, config.d_sae, config.k), seed=config.seed).to(device)
    dead = DeadLatents(config.d_sae, config.dead_after_tokens, device)
    state = TrainState(sae, build_adam(sae, config.lr), dead, batches)
    if found:
        checkpoint = load_checkpoint(found[-1])
        check_settings(config, checkpoint)
        restore(state, checkpoint)
    else:
        sample = batches.sample(INIT_TOKENS).to(device, torch.float64)
        state.scale = _unit_scale(sample)
        sae.initialize_from((sample * state.scale).float())
    return state


def _unit_scale(x: Tensor) -> float:
    """Return the power of two that brings the standard deviation of a coordinate next to 1/4; 1 where x does not vary.

    Weights have no unit, since decoder rows have norm 1; biases have that of x, and Adam moves them by about lr a step.
    Multiplying by a power of two rounds nothing, so the finished SAE is exactly the one that was trained.
    """
    variance = (x - x.mean(0)).square().sum(1).mean().item()
    if not 0.0 < variance < math.inf:
        return 1.0
    return 2.0 ** round(math.log2(x.shape[1] / variance) / 2 - 2)


def train_step(state: TrainState, x: Tensor, config: ResolvedConfig) -> dict[str, Tensor]:
    """Do one step of Adam on one batch.

    Args:
        state: changed in place.
        x: [batch_tokens, d_in], float32, on the device of the SAE, already multiplied by `state.scale`.
        config: settings.
    Returns:
        scalars on the device: loss, fvu, l0, and auxk_loss and grad_norm where they are computed.
    """
    sae = state.sae
    dead = state.dead.mask()
    k_aux = min(config.k_aux, int(dead.sum())) if config.auxk_alpha else 0
    code, aux_code = sae.encode_aux(x, dead, k_aux) if k_aux else (sae.encode(x), None)
    x_hat = sae.decode(code)
    loss = fvu = fvu_loss(x, x_hat)
    metrics = {"fvu": fvu.detach(), "l0": (code.top_acts > 0).sum() / len(x)}
    if aux_code is not None:
        aux = auxk_loss(x - x_hat, sae.decode(aux_code, bias=False))
        loss = loss + config.auxk_alpha * aux
        metrics["auxk_loss"] = aux.detach()
    metrics["loss"] = loss.detach()

    state.optimizer.zero_grad()
    with torch.autograd.set_multithreading_enabled(False):  # one device: a thread of its own only makes the host wait
        loss.backward()  # type: ignore[no-untyped-call]
    sae.project_decoder_grad()
    if config.clip_norm is not None:
        metrics["grad_norm"] = torch.nn.utils.clip_grad_norm_(sae.parameters(), config.clip_norm)
    for group in state.optimizer.param_groups:
        decay_steps = round(config.decay_fraction * config.steps)
        group["lr"] = config.lr * lr_factor(state.step, config.steps, config.warmup_steps, decay_steps)
    state.optimizer.step()
    sae.normalize_decoder()
    state.dead.update(code.top_acts, code.top_indices)
    state.step += 1
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
        the trained SAE, in units of the activations as they come.
    Raises:
        DataError: activations hold NaN or Inf, or ended; or the loss is not finite. Says which step and source.
        StorageError: a checkpoint or log could not be written. What was written before is intact.
    """
    device = state.sae.W_dec.device
    with ExitStack() as stack:
        for callback in callbacks:
            stack.enter_context(callback)
            callback.on_start(state.step, config.steps)
        clock = _Clock(state.step)
        while state.step < config.steps:
            try:
                batch = state.batches.next_batch()
            except FlashSAEError as error:
                raise type(error)(f"step {state.step}: {error}") from error
            # scaled before it is narrowed: float64 input may be out of the range of float32
            x = (batch.to(device, torch.promote_types(batch.dtype, torch.float32)) * state.scale).float()
            metrics = train_step(state, x, config)
            is_last = state.step == config.steps
            is_checkpoint = checkpoints is not None and (is_last or state.step % config.checkpoint_every_steps == 0)
            is_measured = measure is not None and (is_last or state.step % config.evaluate_every_steps == 0)
            if is_last or is_checkpoint or is_measured or state.step % config.log_every_steps == 0:
                record = _record(state, config, metrics)  # looks for NaN, so before any checkpoint
                record["tokens_per_second"] = clock.rate(state.step, config.batch_tokens)
                if is_measured and measure is not None:
                    record |= measure(state.finished_sae())
                    clock.restart(state.step)
                for callback in callbacks:
                    callback.on_log(record)
            for callback in callbacks:
                callback.on_step(state.step)
            if is_checkpoint and checkpoints is not None:
                save_checkpoint(checkpoints, to_checkpoint(state, config))
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


def _record(state: TrainState, config: ResolvedConfig, metrics: dict[str, Tensor]) -> dict[str, float]:
    """Return the log line of a step. Raises DataError if the loss is not finite."""
    values = {name: float(value) for name, value in metrics.items()}
    if not all(torch.isfinite(torch.tensor(list(values.values())))):
        raise DataError(
            f"step {state.step}: the loss is {values['loss']}, although the activations are finite: training diverged. "
            "Lower lr, raise warmup_steps, or set clip_norm; checkpoints are intact."
        )
    return {
        "step": state.step,
        "tokens": state.step * config.batch_tokens,
        **values,
        "dead_latents": float(state.dead.mask().sum()),
        "lr": state.optimizer.param_groups[0]["lr"],
    }


def to_checkpoint(state: TrainState, config: ResolvedConfig) -> Checkpoint:
    """Return everything of the state that must survive a kill."""
    place, data = state.batches.state()
    tensors = {f"sae.{name}": tensor for name, tensor in state.sae.state_dict().items()}
    for number, moments in state.optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{number}.{name}": tensor for name, tensor in moments.items()}
    tensors["dead.tokens_since_fired"] = state.dead.tokens_since_fired
    tensors["rng.torch"] = torch.get_rng_state()
    tensors |= {f"data.{name}": tensor for name, tensor in data.items()}
    return Checkpoint(state.step, {"data": place, "scale": state.scale, "config": asdict(config)}, tensors)


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
    moments: dict[int, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        if key.startswith("adam."):
            _, number, name = key.split(".")
            moments.setdefault(int(number), {})[name] = tensor
    state.optimizer.load_state_dict({**state.optimizer.state_dict(), "state": moments})
    state.dead.tokens_since_fired.copy_(tensors["dead.tokens_since_fired"])
    torch.set_rng_state(tensors["rng.torch"])
    prefix = "data."
    data = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    state.batches.restore((checkpoint.state["data"], data))
    state.scale = checkpoint.state["scale"]
    state.step = checkpoint.step
