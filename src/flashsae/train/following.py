"""What goes on around the steps of a training: log, measurements, checkpoints, warnings."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from flashsae.data.acts import Batch
from flashsae.data.together import View
from flashsae.errors import DataEndedError, FlashSAEError
from flashsae.logs.callback import Callback
from flashsae.logs.records import Records
from flashsae.optim import learning_rate
from flashsae.sae.module import SAE
from flashsae.train.checkpoint import save_checkpoint
from flashsae.train.config import TrainConfig
from flashsae.train.plan import repeats_warning
from flashsae.train.state import TrainState, to_checkpoint

LEAST_STEPS = 50
"""A shorter training is a trial, of which nothing is said in the end."""


@dataclass(frozen=True)
class Training:
    """One SAE in training, alone or beside others.

    Args:
        state: from `init_state`, or restored from a checkpoint; changed in place.
        config: settings.
        callbacks: hear of every step and every log line.
        checkpoints: folder for checkpoints; None writes none.
        measure: called now and then for figures on held-out tokens.
        is_told_of_repeats: do not warn of tokens that come very often.
    """

    state: TrainState
    config: TrainConfig
    callbacks: Sequence[Callback] = ()
    checkpoints: Path | None = None
    measure: Callable[[SAE], dict[str, float]] | None = None
    is_told_of_repeats: bool = False


class Following:
    """Does the steps of a training, and what goes on around them."""

    def __init__(self, training: Training) -> None:
        self.state, self.config, self.callbacks = training.state, training.config, training.callbacks
        self.checkpoints, self.measure = training.checkpoints, training.measure
        self.failure: FlashSAEError | None = None
        """Why it does not go on, where others may."""
        self._knows_of_repeats, self._knows_of_overflow = training.is_told_of_repeats, False
        self._metrics: dict[str, Tensor] = {}  # of the last step; empty before the first one of this process
        self._clock, self._records = _Clock(self.state.step), Records()
        self._logged_step = 0
        self._l0: float | None = None  # of the batch of the last line

    def start(self, stack: ExitStack) -> None:
        """Let the callbacks begin, and end with the stack; tell what is known of the data."""
        for callback in self.callbacks:
            stack.enter_context(callback)
            callback.on_start(self.state.step, self.config.steps)
        for message in self.state.warnings:
            self.warn(message)

    @property
    def has_stepped(self) -> bool:
        """Whether a step was done in this process, so that there is something to save."""
        return bool(self._metrics)

    def own(self, batch: Batch) -> Batch:
        """Return what it reads of a batch: its own sites, where others read it too."""
        batches = self.state.batches
        return batches.of(batch) if isinstance(batches, View) else batch

    def keep(self, metrics: dict[str, Tensor]) -> None:
        """Keep what `train_step` returned of the step that was done."""
        self._metrics = metrics

    def note(self) -> None:
        """Begin a line of the log on the step that was done, if one is due."""
        if self._must_know() or self.state.step % self.config.log_every_steps == 0:
            self._begin_record()

    def log(self) -> bool:
        """Log what is known of the steps so far, and measure if that is due; return whether it was."""
        is_measured = self._is_measured()
        self._log(wait=self._must_know(), is_measured=is_measured)
        for callback in self.callbacks:
            callback.on_step(self.state.step)
        return is_measured

    def go_on(self) -> None:
        """Measure the speed from here on, behind measurements and checkpoints."""
        self._clock.restart(self.state.step)

    def _must_know(self) -> bool:
        """Tell whether it has to be known if all is well, before anything is written."""
        is_saved = self._was_due(self.config.checkpoint_every_steps) and self.checkpoints is not None
        return self.state.step == self.config.steps or is_saved or self._is_measured()

    def _is_measured(self) -> bool:
        return self._was_due(self.config.evaluate_every_steps) and self.measure is not None

    def _was_due(self, every: int) -> bool:
        """Tell whether what is done every so many steps, and behind the last one, is due now."""
        return self.state.step == self.config.steps or self.state.step % every == 0

    def end_early(self, reason: DataEndedError) -> None:
        """Finish with the steps that were done, because the data ended."""
        state, config = self.state, self.config
        if self.has_stepped:  # else a run that had ended so is resumed, and all is written
            is_new = self._logged_step != state.step
            if is_new:
                self._begin_record()
            self._log(wait=True, is_measured=is_new)
        tokens = state.step * config.batch_tokens
        rate = learning_rate(state.step - 1, config) / config.lr
        lacks_average = config.average_tokens and not state.average
        last = " Its weights are those of that step: average_tokens counts from the end." if lacks_average else ""
        self.warn(
            f"{reason} The SAE is that of {tokens:,} tokens, not {config.tokens:,}: step {state.step:,} of "
            f"{config.steps:,}, where the learning rate was {rate:.0%} of its peak. With tokens={tokens} it falls to 0 "
            f"over what there is.{last}"
        )

    def warn(self, message: str) -> None:
        """Tell all callbacks."""
        for callback in self.callbacks:
            callback.on_warning(message)

    def tell_verdict(self) -> None:
        """Warn where the architecture finds that the SAE is not what was asked for."""
        verdict = self.state.sae.architecture.verdict
        message = None if verdict is None else verdict(self.state.sae)
        if message or (message := self._without_latents()):
            self.warn(message)

    def _without_latents(self) -> str | None:
        """Return a sentence where no latent is active at the end of a training that was more than a trial."""
        if self._l0 != 0.0 or self.config.steps < LEAST_STEPS:
            return None
        sees_mean = not self.state.sae.architecture.subtracts_b_dec and not hasattr(self.state.sae, "x_mean")
        mean = ", or subtract the mean of the activations before if it is long beside their deviation"
        return (
            "the training ends without an active latent, so that every token is reconstructed as b_dec: lower lr, or "
            f"the weight of a penalty of active latents{mean if sees_mean else ''}."
        )

    def warn_of_repeats(self) -> None:
        """Warn once, as soon as it is known how many tokens there are, if each comes too often."""
        if self._knows_of_repeats or self.state.batches.epoch_tokens is None:
            return
        self._knows_of_repeats = True
        message = repeats_warning(self.config.tokens, self.state.batches.epoch_tokens)
        if message:
            self.warn(message)

    def _warn_of_overflow(self, record: dict[str, float]) -> None:
        """Warn once if codes have no room for all that is selected."""
        left_out = record.get("left_out", 0.0)
        if left_out and not self._knows_of_overflow:
            self._knows_of_overflow = True
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
        self._records.add(known, {**self._metrics, "dead_latents": state.dead.mask().sum()})
        self._logged_step = state.step

    def _log(self, *, wait: bool, is_measured: bool) -> None:
        for record in self._records.ready(wait=wait):
            self._warn_of_overflow(record)
            self._l0 = record.get("l0")
            if is_measured and self.measure is not None and record["step"] == self.state.step:
                record |= self.measure(self.state.current_sae())
            for callback in self.callbacks:
                callback.on_log(record)

    def save(self) -> None:
        """Write a checkpoint, where there is a folder for it."""
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
