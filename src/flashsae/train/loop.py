"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from flashsae.data.prefetch import Prefetcher
from flashsae.errors import DataEndedError, FlashSAEError
from flashsae.logs.callback import Callback
from flashsae.logs.records import Records
from flashsae.neutral import neutral
from flashsae.optim import learning_rate
from flashsae.sae.module import SAE
from flashsae.train.checkpoint import save_checkpoint
from flashsae.train.config import TrainConfig
from flashsae.train.plan import repeats_warning
from flashsae.train.state import TrainState, to_checkpoint
from flashsae.train.step import train_step


@neutral()
def train(
    state: TrainState,
    config: TrainConfig,
    *,
    callbacks: Sequence[Callback] = (),
    checkpoints: Path | None = None,
    measure: Callable[[SAE], dict[str, float]] | None = None,
    is_told_of_repeats: bool = False,
) -> SAE:
    """Train until all steps are done, or until data that can be read only once has ended.

    Args:
        state: from `init_state`, or restored from a checkpoint; changed in place.
        config: settings.
        callbacks: hear of every step and every log line.
        checkpoints: folder for checkpoints; None writes none.
        measure: called now and then for figures on held-out tokens.
        is_told_of_repeats: do not warn of tokens that come very often.
    Returns:
        the trained SAE, in units of the activations as they come; on the CPU if its weights were split, because the
        state may leave no room for whole ones on the device.
    Raises:
        DataError: activations hold NaN or Inf, or ended before the first step; or the loss is not finite. Says which
            step and source.
        StorageError: a checkpoint or log could not be written. What was written before is intact.
    """
    device = state.sae.W_dec.device
    with ExitStack() as stack:
        for callback in callbacks:
            stack.enter_context(callback)
            callback.on_start(state.step, config.steps)
        run = _Run(state, config, callbacks, checkpoints, measure, is_told_of_repeats)
        for message in state.warnings:
            run.warn(message)
        batches = stack.enter_context(Prefetcher(state.batches, device, state.captured.capturing))
        while state.step < config.steps:
            run.warn_of_repeats()
            is_checkpoint = run.is_due(config.checkpoint_every_steps) and checkpoints is not None
            is_measured = run.is_due(config.evaluate_every_steps) and measure is not None
            try:
                # nothing is read beyond a checkpoint before it is written: it holds the place in the data
                batch = batches.next_batch(ahead=not (is_checkpoint or state.step + 1 == config.steps))
            except DataEndedError as error:
                if state.step == 0:
                    raise
                run.end_early(error)
                break
            except FlashSAEError as error:
                raise type(error)(f"step {state.step}: {error}") from error
            run.metrics = train_step(state, batch, config)
            run.after_step(is_measured=is_measured, is_checkpoint=is_checkpoint)
        run.tell_verdict()
    return state.finished_sae()


@dataclass
class _Run:
    """What goes on around the steps of a training: log, measurements, checkpoints, warnings."""

    state: TrainState
    config: TrainConfig
    callbacks: Sequence[Callback]
    checkpoints: Path | None
    measure: Callable[[SAE], dict[str, float]] | None
    knows_of_repeats: bool
    knows_of_overflow: bool = False
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Of the last step; empty before the first one of this process."""

    def __post_init__(self) -> None:
        self._clock, self._records = _Clock(self.state.step), Records()
        self._logged_step = 0

    def is_due(self, every: int) -> bool:
        """Tell whether what is done every so many steps, and behind the last one, is due behind the current step."""
        step = self.state.step + 1
        return step == self.config.steps or step % every == 0

    def after_step(self, *, is_measured: bool, is_checkpoint: bool) -> None:
        """Log the step that was done; measure and save if that is due."""
        step, config = self.state.step, self.config
        must_know = step == config.steps or is_checkpoint or is_measured  # if all is well, before anything is written
        if must_know or step % config.log_every_steps == 0:
            self._begin_record()
        self._log(wait=must_know, is_measured=is_measured)
        for callback in self.callbacks:
            callback.on_step(step)
        if is_checkpoint:
            self._save()
        if is_checkpoint or is_measured:
            self._clock.restart(step)

    def end_early(self, reason: DataEndedError) -> None:
        """Finish with the steps that were done, because the data ended."""
        state, config = self.state, self.config
        if self.metrics:  # else a run that had ended so is resumed, and all is written
            is_new = self._logged_step != state.step
            if is_new:
                self._begin_record()
            self._log(wait=True, is_measured=is_new)
            self._save()
        tokens = state.step * config.batch_tokens
        rate = learning_rate(state.step - 1, config) / config.lr
        self.warn(
            f"{reason} The SAE is that of {tokens:,} tokens, not {config.tokens:,}: step {state.step:,} of "
            f"{config.steps:,}, where the learning rate was {rate:.0%} of its peak. With tokens={tokens} it falls to 0 "
            "over what there is."
        )

    def warn(self, message: str) -> None:
        """Tell all callbacks."""
        for callback in self.callbacks:
            callback.on_warning(message)

    def tell_verdict(self) -> None:
        """Warn where the architecture finds that the SAE is not what was asked for."""
        verdict = self.state.sae.architecture.verdict
        message = None if verdict is None else verdict(self.state.sae)
        if message:
            self.warn(message)

    def warn_of_repeats(self) -> None:
        """Warn once, as soon as it is known how many tokens there are, if each comes too often."""
        if self.knows_of_repeats or self.state.batches.epoch_tokens is None:
            return
        self.knows_of_repeats = True
        message = repeats_warning(self.config.tokens, self.state.batches.epoch_tokens)
        if message:
            self.warn(message)

    def _warn_of_overflow(self, record: dict[str, float]) -> None:
        """Warn once if codes have no room for all that is selected."""
        left_out = record.get("left_out", 0.0)
        if left_out and not self.knows_of_overflow:
            self.knows_of_overflow = True
            self.warn(
                f"step {record['step']:.0f}: {left_out:,.0f} entries of the code found no place and were left out. "
                "Give the architecture a larger capacity; left_out in the log says how it goes on."
            )

    def _begin_record(self) -> None:
        state, config = self.state, self.config
        known = {
            "step": state.step,
            "tokens": state.step * config.batch_tokens,
            "lr": learning_rate(state.step - 1, config),
            "tokens_per_second": self._clock.rate(state.step, config.batch_tokens),
        }
        self._records.add(known, {**self.metrics, "dead_latents": state.dead.mask().sum()})
        self._logged_step = state.step

    def _log(self, *, wait: bool, is_measured: bool) -> None:
        for record in self._records.ready(wait=wait):
            self._warn_of_overflow(record)
            if is_measured and self.measure is not None and record["step"] == self.state.step:
                record |= self.measure(self.state.current_sae())
            for callback in self.callbacks:
                callback.on_log(record)

    def _save(self) -> None:
        if self.checkpoints is not None:
            for callback in self.callbacks:
                callback.on_checkpoint(self.state.step)
            save_checkpoint(self.checkpoints, to_checkpoint(self.state, self.config))


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
