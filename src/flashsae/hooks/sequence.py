"""Where in its text a model reads: positions over forwards that follow each other with a cache, as `generate` does."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from flashsae.errors import ConfigError
from flashsae.hooks.at import Window

_CACHES = ("past_key_values", "past_key_value", "cache_params", "mems", "state")
_INPUTS = ("input_ids", "inputs_embeds", "decoder_input_ids", "hidden_states")


def reader_around(model: nn.Module, path: str) -> nn.Module:
    """Return the innermost part of a model around a module that reads a text by itself: half of two, a tower, all."""
    found = model
    parts = path.split(".")
    for length in range(1, len(parts) + 1):
        part = model.get_submodule(".".join(parts[:length]))
        if hasattr(part, "main_input_name"):
            found = part
    return found


class Sequence:
    """The forwards of a reader: where each begins, and whether it goes on with the text of the one before it.

    Args:
        reader: as `reader_around` returns it.
    """

    def __init__(self, reader: nn.Module) -> None:
        self._reader = reader
        self._names = [*inspect.signature(reader.forward).parameters]
        self.is_running = False
        """Whether a forward is going on: modules may also run by themselves, or once more for a backward pass."""
        self.number = 0
        """Of the forward; a new number for each."""
        self.goes_on = False
        """Whether the forward goes on with the text of the one before it."""
        self.has_gone_on = False
        """Whether any did."""
        self.takes_back = False
        """Whether it reads other tokens in the place of some that were read, as assisted generation does."""
        self.longest = 0
        """Positions of the longest text."""
        self.sizes: tuple[int, int] | None = None
        """Sequences and length of what it reads, where these are known."""
        self._first = self._end = self._prompt = 0
        self._cache: Callable[[], Any] = _nothing
        self._texts: tuple[Tensor | None, Tensor | None] = (None, None)  # of this forward and the one before it

    def hook(self, stack: ExitStack) -> None:
        """Watch the reader until a stack is closed."""
        stack.callback(self._reader.register_forward_pre_hook(self._begin, prepend=True, with_kwargs=True).remove)
        stack.callback(self._reader.register_forward_hook(self._finish, always_call=True).remove)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(self._names, args)), **kwargs}
        read = (given.get(name) for name in _INPUTS)
        inputs = next((value for value in read if isinstance(value, Tensor) and value.dim() in (2, 3)), None)
        cache = next((given[name] for name in _CACHES if given.get(name) is not None), None)
        self.number += 1
        self.is_running = True
        self.sizes = None if inputs is None else (inputs.shape[0], inputs.shape[1])
        self._first = self._length_of(cache)
        self.takes_back = 0 < self._first < self._end and self._cache() is cache
        self.goes_on = 0 < self._first == self._end or self.takes_back
        self.has_gone_on |= self.goes_on
        ids = inputs if inputs is not None and inputs.dim() == 2 and self._first == 0 else None
        self._texts = ids, self._texts[0]
        if self.sizes is not None:
            self._reaches(self._first + self.sizes[1])
        try:
            self._cache = _nothing if cache is None else weakref.ref(cache)
        except TypeError:  # tuples, of older versions
            self._cache = _nothing

    def _finish(self, module: nn.Module, args: object, output: object) -> None:
        self.is_running = False

    def _reaches(self, end: int) -> None:
        self._end, self.longest = end, max(self.longest, end)
        if not self.goes_on:
            self._prompt = end

    def _length_of(self, cache: Any) -> int:
        """Return how many positions a cache holds."""
        if cache is None:
            return 0
        if isinstance(cache, tuple | list):
            layer = cache[0] if cache else None
            if not isinstance(layer, tuple | list):
                return self._end  # a state, that of what was read before
            return int(layer[0].shape[-2]) if layer else 0
        try:
            return int(cache.get_seq_length())
        except (AttributeError, NotImplementedError, TypeError, ValueError, IndexError):  # a state of one size
            return self._end if self._cache() is cache else 0

    @property
    def _rereads(self) -> bool:
        """Whether it reads the text of the forward before it again, and more, as `generate` does without a cache."""
        now, before = self._texts
        if now is None or before is None or len(now) != len(before) or before.shape[1] >= now.shape[1]:
            return False
        return bool((now[:, : before.shape[1]] == before.to(now.device)).all())

    def fits(self, length: int) -> bool:
        """Tell whether there are as many positions as the model reads, not the last ones alone, as before a head."""
        return not self.is_running or self.sizes is None or self.sizes[1] == length

    def window(self, sequences: int, length: int, *, of_prompt: bool = False) -> Window:
        """Return the positions of what is there in the forward that runs, or of a module that runs by itself.

        Args:
            sequences: number of texts.
            length: positions of each.
            of_prompt: whether somebody counts from the end of the prompt.
        Raises:
            ConfigError: somebody does, and it cannot be told.
        """
        if not self.is_running and not in_backward():
            return Window(sequences, 0, length, length)
        if of_prompt and self.takes_back:
            raise ConfigError(
                "at: where the prompt ends is not known in assisted generation, which reads it with guesses behind it: "
                "expected positions that do not count from there, such as slice(12, None)."
            )
        if of_prompt and self._rereads:
            raise ConfigError(
                "at: where the prompt ends is known where a key-value cache is used, but a forward read the text of "
                "the one before it again, and more: expected use_cache=True, positions that do not count from the end "
                "of the prompt, or a `with` for each text."
            )
        if self.sizes is None and self.is_running:
            self._reaches(self._first + length)
        return Window(sequences, self._first, self._first + length, self._prompt)


def in_backward() -> bool:
    """Tell whether a backward pass is going on, in which checkpointed modules run once more."""
    return torch._C._current_graph_task_id() != -1


def _nothing() -> None:
    return None


def by_position(x: Tensor, width: int, sizes: tuple[int, int] | None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return activations as [sequences, positions, width], where they are of some such form, and what undoes that.

    Args:
        x: activations; several heads or streams of a token may stand side by side, and positions first.
        width: of a token.
        sizes: sequences and length of what is read; None where these are not known.
    """
    view = x.flatten(2) if x.dim() == 4 and x.shape[-1] != width and x.shape[2] * x.shape[3] == width else x
    if sizes is None or sizes[0] == sizes[1] or view.dim() != 3 or view.shape[:2] != sizes[::-1]:
        return view, lambda changed: changed.reshape(x.shape)
    return view.transpose(0, 1), lambda changed: changed.transpose(0, 1).reshape(x.shape)
