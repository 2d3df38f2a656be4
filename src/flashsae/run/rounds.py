"""The training of the SAEs of a run: of one alone, or of several side by side on one reading of their activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from flashsae.backend import resolve_device
from flashsae.data.acts import Batch
from flashsae.data.shuffle import OnFill, shuffled
from flashsae.data.sources import Source
from flashsae.data.together import Together
from flashsae.errors import FlashSAEError
from flashsae.evaluate import evaluate, held_out_batches
from flashsae.logs.callback import Callback, Warn, WarnOfOne
from flashsae.logs.jsonl import JsonlLog
from flashsae.logs.progress import ProgressBar, filling
from flashsae.logs.trackers import build_logger
from flashsae.run.ending import is_done, save
from flashsae.run.parts import Part
from flashsae.run.start import nothing_held_out
from flashsae.sae.module import SAE
from flashsae.train.following import Training
from flashsae.train.loop import train, train_together
from flashsae.train.place import Place
from flashsae.train.state import TrainState, init_state

MEASURE_TOKENS = 8192


@dataclass(frozen=True)
class Trained:
    """An SAE of a run behind its training, which is saved.

    Args:
        part: what it is.
        sae: it.
        is_dead: [d_sae], bool, at the end of training.
        is_new: whether steps were done in this process.
    """

    part: Part
    sae: SAE
    is_dead: torch.Tensor
    is_new: bool


def train_alone(part: Part, console: Console) -> Trained:
    """Train an SAE from its newest checkpoint on and save it."""
    config, source = part.config.train, part.source
    device = resolve_device(config.device)
    most, tokens = config.shuffle_tokens, config.tokens
    batches = shuffled(source, config.batch_tokens, seed=config.seed, buffer_tokens=most, tokens=tokens)
    held_out = _held_out(source, part)
    with filling(console) as on_fill:
        state = init_state(config, batches, device, part.checkpoints, on_fill)
    begun = state.step
    sae = train(
        state,
        config,
        callbacks=[*_callbacks(part, console, set()), ProgressBar(console)],
        checkpoints=part.checkpoints,
        measure=_measuring(part, held_out),
    )
    is_dead, is_new = state.dead.mask(), state.step > begun
    del state  # its memory may be needed for the whole weights
    return _saved(part, sae.to(device), is_dead, is_new=is_new)


def train_side_by_side(parts: Sequence[Part], place: Path, console: Console) -> list[Trained]:
    """Train SAEs from the newest checkpoints of one step on, and save those that do not fail.

    Args:
        parts: what they are: of as many tokens in batches of one size.
        place: folder for their place in the data.
        console: for progress and warnings.
    """
    first = parts[0].config.train
    device = resolve_device(first.device)
    source = parts[0].activations.of([part.planned.reads for part in parts])
    batches = Together(
        source,
        first.batch_tokens,
        seeds=[part.config.train.seed for part in parts],
        buffer_tokens=first.shuffle_tokens,
        tokens=first.tokens,
    )
    failed = [part.planned.name for part in parts if part.failure() is not None]
    running = [part for part in parts if part.planned.name not in failed]
    saved = Place(place, batches, {part.planned.name: part.checkpoints for part in parts}, failed)
    saved.resume()
    if not running:
        return []
    held_out = _held_out(source, parts[0])
    with filling(console) as on_fill:
        states = [_begun(part, batches, device, on_fill) for part in running]
    begun = states[0].step
    told: set[str] = set()

    def on_failure(number: int, error: FlashSAEError) -> None:
        running[number].fail(error)
        _warn(console, f"{running[number].planned.name} failed, and the others go on: {error}")

    results = train_together(
        [
            Training(
                state, part.config.train, _callbacks(part, console, told), part.checkpoints, _measuring(part, held_out)
            )
            for part, state in zip(running, states)
        ],
        batches,
        callbacks=[ProgressBar(console)],
        place=saved,
        on_failure=on_failure,
    )
    is_dead = [state.dead.mask() for state in states]
    is_new = any(state.step > begun for state in states)
    del states
    trained = []
    for part, dead in zip(running, is_dead):
        result = results.pop(0)
        if isinstance(result, SAE):
            trained.append(_saved(part, result.to(device), dead, is_new=is_new))
    return trained


def _begun(part: Part, batches: Together, device: torch.device, on_fill: OnFill) -> TrainState:
    view = batches.view(part.config.train.seed, part.sites)
    return init_state(part.config.train, view, device, part.checkpoints, on_fill)


def _held_out(source: Source, part: Part) -> list[Batch]:
    held_out = list(held_out_batches(source, MEASURE_TOKENS))
    if not held_out:
        raise nothing_held_out(source, part.config)
    return held_out


def _measuring(part: Part, held_out: list[Batch]) -> Callable[[SAE], dict[str, float]]:
    own = [{site: batch[site] for site in part.sites} for batch in held_out]
    return lambda sae: _measure(sae, own)


def _measure(sae: SAE, held_out: list[Batch]) -> dict[str, float]:
    """Return held-out figures for a line of the log."""
    evaluation = evaluate(sae, held_out)
    without = {"held_out_fvu_without_outliers": evaluation.fvu_without_outliers} if evaluation.outliers else {}
    return {"held_out_fvu": evaluation.fvu, **without}


def _callbacks(part: Part, console: Console, told: set[str]) -> list[Callback]:
    """Return what hears of a training: the log, the loggers that are asked for, and who warns, each time once."""
    is_one_of_several = bool(part.planned.name)
    loggers = [
        build_logger(name, part.folder, part.config.train.flat(), is_one_of_several=is_one_of_several)
        for name in part.config.logger
    ]
    warn = partial(_warn, console)
    warning = WarnOfOne(warn, part.planned.name, told) if is_one_of_several else Warn(warn)
    return [warning, JsonlLog(part.folder), *loggers]


def _warn(console: Console, message: str) -> None:
    console.print(f"[bold yellow]Warning:[/] {escape(message)}", highlight=False, soft_wrap=True)


def _saved(part: Part, sae: SAE, is_dead: torch.Tensor, *, is_new: bool) -> Trained:
    """Save a trained SAE, unless it has been, and more is known of it by now."""
    if is_new or not is_done(part):
        save(part, sae)
    return Trained(part, sae, is_dead, is_new)
