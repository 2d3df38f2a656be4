"""What may hear of the progress of a training: one small interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType

from typing_extensions import Self


class Callback:
    """Does nothing; override what you need. Used as a context manager around the training."""

    def on_start(self, step: int, steps: int) -> None:
        """Training begins at `step` of `steps`; `step` > 0 when it is resumed."""

    def on_step(self, step: int) -> None:
        """A step is done; nothing is read from the device for this call."""

    def on_log(self, record: Mapping[str, float]) -> None:
        """A line of the log: step, tokens, loss, fvu, l0, dead_latents, lr, tokens_per_second, ..."""

    def on_warning(self, message: str) -> None:
        """The training goes on, but its result may not be what was meant; a sentence or two that say why."""

    def on_checkpoint(self, step: int) -> None:
        """A checkpoint of this step is about to be written; what was told of must be on the disk by then."""

    def close(self) -> None:
        """Training has ended, or failed."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Warn(Callback):
    """Pass warnings on.

    Args:
        warn: called with each message.
    """

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn

    def on_warning(self, message: str) -> None:
        """Pass on a warning."""
        self._warn(message)


class WarnOfOne(Warn):
    """Pass warnings on of one of several SAEs: what is of the data once for all, and the rest with its name.

    Args:
        warn: called with each message.
        name: of the SAE.
        told: messages that were passed on, of all SAEs.
    """

    def __init__(self, warn: Callable[[str], None], name: str, told: set[str]) -> None:
        super().__init__(warn)
        self._name, self._told, self._has_begun = name, told, False

    def on_step(self, step: int) -> None:
        """Note that what comes from here on is of this SAE."""
        self._has_begun = True

    def on_warning(self, message: str) -> None:
        """Pass on a warning, unless it was."""
        message = f"{self._name}: {message}" if self._has_begun else message
        if message not in self._told:
            self._told.add(message)
            super().on_warning(message)
