"""A language model that runs no further than its hookpoints."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from flashsae.errors import ConfigError
from flashsae.lm.hookpoints import is_input, module_of
from flashsae.lm.parts import as_it_is_used, device_of, is_of_two, path_of, text_reader


@contextmanager
def _no_cudnn_attention() -> Iterator[None]:
    """Leave cuDNN's attention out: it prepares for every new shape for about 60 ms, and texts have many lengths."""
    was_enabled = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was_enabled)


class _AllSeen(Exception):  # noqa: N818 - not an error: it ends a forward whose rest nobody needs
    pass


class HookedModel:
    """A base model, run only as far as its last hookpoint.

    It runs as for inference, without gradients; its parameters, its modes and the hooks of others stay as they are.

    Args:
        model: stays on its device, or on its several.
        hookpoints: as `resolve_hookpoints` returns them.
        side: which half of a model with an encoder and a decoder reads the text; None is the encoder.
        device: of what is returned; None is where the model takes its inputs.
    Raises:
        ConfigError: the model does not read text, a hookpoint lies in a part of it that does not, or some of its
            weights have no numbers.
    """

    def __init__(
        self,
        model: nn.Module,
        hookpoints: tuple[str, ...],
        side: str | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.model = model
        self.hookpoints = hookpoints
        self.reader = text_reader(model, side)
        self._is_decoder = side == "decoder"
        inside = {id(module) for module in self.reader.modules()}
        outside = [name for name in hookpoints if id(self.module_at(name)) not in inside]
        if outside:
            raise ConfigError(self._not_of_text(outside[0]))
        self._takes_ids = device_of(model, type(model).__name__)
        self.device = device or self._takes_ids
        taken = inspect.signature(self._called.forward).parameters
        self._options: dict[str, Any] = {"use_cache": False} if "use_cache" in taken else {}
        self._length_first: set[str] = set()  # where it is [length, sequences, d]; of as many, nobody could tell later

    @property
    def _called(self) -> nn.Module:
        return self.model if self._is_decoder else self.reader

    def _not_of_text(self, hookpoint: str) -> str:
        here = path_of(self.reader, self.model) or "the model"
        other = "encoder" if self._is_decoder else "decoder"
        is_other = is_of_two(self.model) and id(self.module_at(hookpoint)) in {
            id(module) for module in getattr(self.model, f"get_{other}")().modules()
        }
        advice = f", or give --side {other}" if is_other else ""
        return (
            f"hookpoint: {hookpoint} does not read text alone in {type(self.model).__name__}; choose a module of "
            f"{here}, which does{advice}."
        )

    def at(self, *hookpoints: str) -> HookedModel:
        """Return the same model at some of its hookpoints alone."""
        part = copy(self)
        part.hookpoints = hookpoints
        return part

    def module_at(self, hookpoint: str) -> nn.Module:
        """Return the module that a hookpoint lies at."""
        return self.model.get_submodule(module_of(hookpoint))

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pick: Callable[[str, Tensor], Tensor] = lambda name, output: output.clone(),
    ) -> dict[str, Tensor]:
        """Return what is at each hookpoint; a module that runs twice gives the first.

        Args:
            input_ids: [sequences, length], int64, on any device.
            attention_mask: [sequences, length], int64, on any device; 0 is padding.
            pick: called with a hookpoint and what is there, returns what to keep of it: a copy, since a later layer may
                add to the tensor in place.
        Returns:
            by hookpoint, the first tensor of the output, or of the input (`hidden_states`, where that is given by its
            name), [sequences, length, d] for most modules: several streams or heads of a token stand side by side.
            Or what `pick` made of it.
        Raises:
            ConfigError: a module did not run, or gives or takes no tensor.
        """
        seen: dict[str, Tensor] = {}
        begun: list[nn.Module] = []

        def keep(name: str, find: Callable[..., Tensor], *values: object) -> None:
            if not begun:
                return  # an encoder may share a module with the decoder that is read
            if name not in seen:
                seen[name] = pick(name, self._by_sequence(name, find(name, *values), input_ids))
            if len(seen) == len(self.hookpoints):
                raise _AllSeen

        with as_it_is_used(self.model), torch.no_grad(), _no_cudnn_attention():
            there = (each.to(self._takes_ids, non_blocking=True) for each in (input_ids, attention_mask))
            inputs = self._inputs(*there)
            begins = self.reader.register_forward_pre_hook(lambda module, args: begun.append(module))
            hooks = [begins, *(self._hook(name, keep) for name in self.hookpoints)]
            try:
                self._called(**inputs, **self._options)
            except _AllSeen:
                return {name: seen[name].to(self.device) for name in self.hookpoints}
            finally:
                for hook in hooks:
                    hook.remove()
        raise DidNotRunError([name for name in self.hookpoints if name not in seen])

    def _inputs(self, ids: Tensor, attention: Tensor) -> dict[str, Any]:
        """Return what a forward takes: a decoder has its start token before the text, and an encoder beside it."""
        if not self._is_decoder:
            return {"input_ids": ids, "attention_mask": attention}
        start, end = (ids.new_full((len(ids), 1), token) for token in (self._start_token, self._end_token))
        return {
            "input_ids": end,
            "attention_mask": torch.ones_like(end),
            "decoder_input_ids": torch.cat([start, ids], dim=1),
            "decoder_attention_mask": torch.cat([torch.ones_like(start), attention], dim=1),
        }

    @cached_property
    def _start_token(self) -> int:
        return self._token("decoder_start", "bos", "pad")

    @cached_property
    def _end_token(self) -> int:
        return self._token("eos", "pad")

    def _token(self, *names: str) -> int:
        """Return the first of some tokens that a config names."""
        for name in names:
            number = getattr(self.model.config, f"{name}_token_id", None)
            if isinstance(number, list):
                number = number[0] if number else None
            if number is not None:
                return int(number)
        raise ConfigError(
            f"side: the config of {type(self.model).__name__} names no {names[0]}_token_id, which its decoder needs; "
            "put it into config.json, or read the encoder."
        )

    def _by_sequence(self, name: str, output: Tensor, ids: Tensor) -> Tensor:
        """Return an output with sequences first and one vector for each token, where it is of some such form."""
        sequences, length = len(ids), ids.shape[1] + self._is_decoder
        if sequences != length and output.shape[:2] == (length, sequences):
            self._length_first.add(name)
        if name in self._length_first and output.dim() > 2:
            output = output.transpose(0, 1)
        if output.shape[:2] == (sequences, length):
            output = (output.flatten(2) if output.dim() > 3 else output)[:, int(self._is_decoder) :]
        return output

    def _hook(self, name: str, keep: Callable[..., None]) -> RemovableHandle:
        module = self.module_at(name)
        if is_input(name):
            return module.register_forward_pre_hook(
                lambda module, args, kwargs: keep(name, _input_tensor, args, kwargs), with_kwargs=True
            )
        return module.register_forward_hook(lambda module, args, output: keep(name, _first_tensor, output))


class DidNotRunError(ConfigError):
    """Modules did not run when the model read text.

    Args:
        hookpoints: at which they lie.
        advice: what to choose instead.
    """

    def __init__(self, hookpoints: Iterable[str], advice: str = "another module") -> None:
        self.hookpoints = tuple(hookpoints)
        names = ", ".join(self.hookpoints)
        super().__init__(f"hookpoint: {names} did not run when the model read text; choose {advice}.")


def _input_tensor(name: str, args: tuple[object, ...], kwargs: dict[str, object]) -> Tensor:
    for value in (kwargs.get("hidden_states"), *args):
        if isinstance(value, Tensor):
            return value
    raise ConfigError(
        f"hookpoint: expected a module that is given a tensor in its place, or as hidden_states, got {module_of(name)} "
        f"with {', '.join([*(type(value).__name__ for value in args), *kwargs]) or 'nothing'}; choose another module."
    )


def _first_tensor(name: str, output: object) -> Tensor:
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output
    for value in values if isinstance(values, Iterable) else ():
        if isinstance(value, Tensor):
            return value
    raise ConfigError(f"hookpoint: {name} gives no tensor but {type(output).__name__}; choose another module.")
