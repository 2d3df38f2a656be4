"""At which positions of a text something is done, where its forwards may be one, or many that follow each other."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashsae.errors import ConfigError, DtypeError, ShapeError

PROMPT, NEW = "prompt", "new"


@dataclass(frozen=True)
class Window:
    """The positions that a forward computes.

    Args:
        sequences: number of texts.
        first: position of the first one.
        end: position behind the last one.
        prompt: position behind the last one of the prompt.
    """

    sequences: int
    first: int
    end: int
    prompt: int


@dataclass(frozen=True, eq=False)
class At:
    """Positions, as people say them.

    Args:
        given: None for all; a position, or several; a slice; "prompt" or "new"; or a mask, [positions] or
            [sequences, positions] of bool, behind whose end there are none. They count from 0 at the first token that
            the model read, padding included, and go on over the steps of `generate`; negative ones from the end of the
            prompt, which is what the first forward reads.
    Raises:
        DtypeError, ConfigError, ShapeError: it is none of these.
    """

    given: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "given", _checked(self.given))

    def __repr__(self) -> str:
        given = self.given
        if isinstance(given, Tensor):
            return f"a mask {list(given.shape)}"
        return repr(list(given)) if isinstance(given, tuple) else repr(given)

    @property
    def of_prompt(self) -> bool:
        """Whether it counts from the end of the prompt."""
        given = self.given
        if isinstance(given, slice):
            return any(bound is not None and bound < 0 for bound in (given.start, given.stop))
        return isinstance(given, str) or (isinstance(given, tuple) and any(place < 0 for place in given))

    def mask(self, window: Window, device: torch.device) -> Tensor | None:
        """Return which positions of a forward these are: [positions] or [sequences, positions], bool; None: all.

        Raises:
            ShapeError: a mask is of another number of sequences, or a position lies before the first.
        """
        given = self.given
        if given is None:
            return None
        if isinstance(given, Tensor):
            return self._of_mask(given, window, device)
        places = range(window.first, window.end)
        if isinstance(given, str):
            chosen = [(place < window.prompt) == (given == PROMPT) for place in places]
        elif isinstance(given, slice):
            start, stop = (_absolute(bound, window.prompt) for bound in (given.start, given.stop))
            chosen_places = range(start or 0, window.end if stop is None else stop, given.step or 1)
            chosen = [place in chosen_places for place in places]
        else:
            wanted = {place if place >= 0 else window.prompt + place for place in given}
            if min(wanted, default=0) < 0:
                raise ShapeError(f"at: the prompt has {window.prompt} positions, and none is {min(given)}.")
            chosen = [place in wanted for place in places]
        return torch.tensor(chosen, dtype=torch.bool, device=device)

    def _of_mask(self, mask: Tensor, window: Window, device: torch.device) -> Tensor:
        if mask.dim() == 2 and len(mask) not in (1, window.sequences):
            raise ShapeError(
                f"at: expected a mask of {window.sequences} sequences, as many as the model reads at once, got "
                f"{len(mask)}: repeat its rows where `generate` makes several texts of each."
            )
        part = mask[..., window.first : window.end]
        behind = window.end - window.first - part.shape[-1]
        return torch.nn.functional.pad(part, (0, behind)).to(device)

    def beyond(self, length: int) -> int | None:
        """Return a position that is meant and that a text of so many does not have; None if there is none."""
        given = self.given
        if isinstance(given, Tensor):
            meant = given.flatten(0, -2).any(0).nonzero().flatten().tolist()
        else:
            meant = list(given) if isinstance(given, tuple) else []
        return max((place for place in meant if place >= length), default=None)


def _absolute(place: int | None, prompt: int) -> int | None:
    return place if place is None or place >= 0 else max(0, prompt + place)


def _checked(given: Any) -> Any:
    """Return positions in one of few forms: None, a word, a slice of ints, a tuple of ints, a mask on the CPU."""
    if given is None:
        return None
    if isinstance(given, str):
        if given not in (PROMPT, NEW):
            raise ConfigError(f'at: expected "{PROMPT}", "{NEW}" or positions, got {given!r}.')
        return given
    if isinstance(given, slice):
        bounds = [None if bound is None else _place(bound) for bound in (given.start, given.stop, given.step)]
        if bounds[2] is not None and bounds[2] < 1:
            raise ConfigError(f"at: expected a slice whose step is 1 or more, got {bounds[2]}.")
        return slice(*bounds)
    if _is_mask(given):
        mask = torch.as_tensor(given).detach().cpu().clone()
        if mask.dtype != torch.bool or mask.dim() > 2:
            raise ShapeError(
                f"at: expected a mask [positions] or [sequences, positions] of bool, got {list(mask.shape)} of "
                f"{str(mask.dtype).removeprefix('torch.')}."
            )
        return mask
    if isinstance(given, Sequence) or (hasattr(given, "tolist") and getattr(given, "ndim", 0) == 1):
        listed = given.tolist() if hasattr(given, "tolist") else given
        return tuple(_place(place) for place in listed)
    return (_place(given),)


def _is_mask(given: Any) -> bool:
    dtype = str(getattr(given, "dtype", ""))
    if dtype in ("bool", "torch.bool"):
        return getattr(given, "ndim", 0) > 0
    return isinstance(given, list | tuple) and bool(given) and isinstance(given[0], bool | list | tuple)


def _place(value: Any) -> int:
    if not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
    got = f"{list(value.shape)} of {value.dtype}" if hasattr(value, "shape") else type(value).__name__
    raise DtypeError(
        f'at: expected positions: an int, several, a slice, a mask of bool, "{PROMPT}" or "{NEW}", got {got}.'
    )
