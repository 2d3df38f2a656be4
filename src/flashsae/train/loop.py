"""The training loop: one SAE, or several that take their steps in turn on one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Lock

from flashsae.data.acts import Batch
from flashsae.data.batches import Batches
from flashsae.data.prefetch import Prefetcher
from flashsae.errors import DataEndedError, FlashSAEError, StorageError
from flashsae.logs.callback import Callback
from flashsae.neutral import neutral
from flashsae.sae.module import SAE
from flashsae.train.config import TrainConfig
from flashsae.train.following import Following, Training
from flashsae.train.place import Place
from flashsae.train.state import TrainState
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
    one = Training(state, config, callbacks, checkpoints, measure, is_told_of_repeats)
    (result,) = train_together([one], state.batches)
    assert isinstance(result, SAE)  # of one alone, errors are raised
    return result


@neutral()
def train_together(
    trainings: Sequence[Training],
    batches: Batches,
    *,
    callbacks: Sequence[Callback] = (),
    place: Place | None = None,
    on_failure: Callable[[int, FlashSAEError], None] | None = None,
) -> list[SAE | FlashSAEError]:
    """Train several SAEs side by side: each batch is read and moved once, and each of them does its step on it.

    An SAE that fails, since its loss is not finite, is left where it is; the others go on.

    Args:
        trainings: of as many tokens in batches of one size, all at the same step, on one device. What those of several
            read is a `View` of `batches`.
        batches: of all of them; of one SAE, those of its state.
        callbacks: hear of the steps of all, beside those of each.
        place: saves the place in the data of several, before their checkpoints.
        on_failure: hears of the number of a training that has failed, and why, as soon as it is known.
    Returns:
        for each the trained SAE, as from `train`, or why there is none.
    Raises:
        DataError, StorageError: as `train`; a loss that is not finite only where there is one SAE.
    """
    if not trainings:
        return []
    following = [Following(each) for each in trainings]
    first, config = trainings[0].state, trainings[0].config
    step, capturing = first.step, Lock()
    saves = any(each.checkpoints is not None for each in trainings)
    with ExitStack() as stack:
        for callback in callbacks:
            stack.enter_context(callback)
            callback.on_start(step, config.steps)
        for each in following:
            each.state.captured.capturing = capturing
            each.start(stack)
        fetched = stack.enter_context(Prefetcher(batches, first.sae.W_dec.device, capturing))
        while step < config.steps and (running := [each for each in following if each.failure is None]):
            for each in running:
                each.warn_of_repeats()
            is_last = step + 1 == config.steps
            is_checkpoint = saves and (is_last or (step + 1) % config.checkpoint_every_steps == 0)
            try:
                # nothing is read beyond a checkpoint before it is written: it holds the place in the data
                until = -(step + 1) % config.checkpoint_every_steps if saves else config.steps
                batch = fetched.next_batch(ahead=min(until, config.steps - step - 1))
            except DataEndedError as error:
                if step == 0:
                    raise
                for each in running:
                    each.end_early(error)
                _save(running, step, place)
                break
            except FlashSAEError as error:
                raise type(error)(f"step {step}: {error}") from error
            step += 1
            is_measured = _do_step(following, batch, on_failure)
            for callback in callbacks:
                callback.on_step(step)
            if is_checkpoint:
                _save([each for each in running if each.failure is None], step, place)
            if is_checkpoint or is_measured:
                for each in running:
                    each.go_on()
        for each in following:
            if each.failure is None:
                each.tell_verdict()
    return [each.failure or each.state.finished_sae() for each in following]


def _do_step(
    following: Sequence[Following], batch: Batch, on_failure: Callable[[int, FlashSAEError], None] | None
) -> bool:
    """Let each do its step on a batch and log it; return whether one of them measured.

    All steps come first, then a line of the log begins for each, then they are read: the speed is that of all.
    """

    def step(one: Following) -> None:
        one.keep(train_step(one.state, one.own(batch), one.config))

    is_measured = False
    for do in (step, Following.note, Following.log):
        for number, each in enumerate(following):
            if each.failure is None:
                with _told(number, each, is_alone=len(following) == 1, on_failure=on_failure):
                    is_measured = bool(do(each)) or is_measured
    return is_measured


def _save(running: Sequence[Following], step: int, place: Place | None) -> None:
    """Write checkpoints of one step: of the place in the data first, where several share it."""
    if any(each.has_stepped for each in running):
        if place is not None:
            place.save(step)
        for each in running:
            each.save()


@contextmanager
def _told(
    number: int, one: Following, *, is_alone: bool, on_failure: Callable[[int, FlashSAEError], None] | None
) -> Iterator[None]:
    """Let an SAE that fails be one that has failed, where there are others; a file system that refuses stops all."""
    try:
        yield
    except StorageError:
        raise
    except FlashSAEError as error:
        if is_alone:
            raise
        one.failure = error
        if on_failure is not None:
            on_failure(number, error)
