"""A language model that runs no further than its hookpoints."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from copy import copy
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from flashsae.errors import ConfigError
from flashsae.lm.capture import captured, inference
from flashsae.lm.hookpoints import module_of
from flashsae.lm.parts import device_of, is_of_two, path_of, text_reader


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
        # as tensors name it, for which "cuda" is one of several
        self.device = torch.empty(0, dtype=torch.float32, device=device or self._takes_ids).device
        taken = inspect.signature(self._called.forward).parameters
        self._options: dict[str, Any] = {"use_cache": False} if "use_cache" in taken else {}
        # where it is [length, sequences, d], or [streams, sequences, length, d]; of as many, nobody could tell later
        self._length_first: set[str] = set()
        self._streams_first: set[str] = set()

    @property
    def is_plain(self) -> bool:
        """Whether a forward is nothing but kernels on one device: no half of two, no hooks of others, no offloading."""
        devices = {tensor.device for tensor in (*self.model.parameters(), *self.model.buffers())}
        hooked = any(
            module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook")
            for module in self.model.modules()
        )
        return not self._is_decoder and devices == {self.device} and not hooked

    @property
    def takes_positions(self) -> bool:
        """Whether the model can be told where each token stands."""
        return not self._is_decoder and "position_ids" in inspect.signature(self._called.forward).parameters

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
        position_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return what is at each hookpoint; a module that runs twice gives the first.

        Args:
            input_ids: [sequences, length], int64, on any device.
            attention_mask: [sequences, length], int64, on any device; 0 is padding.
            pick: called with a hookpoint and what is there, returns what to keep of it: a copy, since a later layer may
                add to the tensor in place.
            position_ids: [sequences, length], int64; a model whose attention goes by positions sees no further back
                than to the last 0, and is given no mask. None: each sequence is one text.
        Returns:
            by hookpoint, the first tensor of the output, or of the input (`hidden_states`, where that is given by its
            name), [sequences, length, d] for most modules: several streams or heads of a token stand side by side.
            Or what `pick` made of it.
        Raises:
            ConfigError: a module did not run, or gives or takes no tensor.
        """
        with inference(self.model):
            there = (each.to(self._takes_ids, non_blocking=True) for each in (input_ids, attention_mask))
            inputs = self._inputs(*there)
            if position_ids is not None:
                del inputs["attention_mask"]
                inputs["position_ids"] = position_ids.to(self._takes_ids, non_blocking=True)
            seen = captured(
                self.model,
                self.hookpoints,
                lambda name, output: pick(name, self._by_sequence(name, output, input_ids)),
                lambda: self._called(**inputs, **self._options),
                self.reader,  # an encoder may share a module with the decoder that is read
            )
            return {name: acts.to(self.device) for name, acts in seen.items()}

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
        if len(output) != sequences and output.dim() == 4 and output.shape[1:3] == (sequences, length):
            self._streams_first.add(name)
        if name in self._length_first and output.dim() > 2:
            output = output.transpose(0, 1)
        if name in self._streams_first and output.dim() == 4:
            output = output.permute(1, 2, 0, 3)
        if output.shape[:2] == (sequences, length):
            output = (output.flatten(2) if output.dim() > 3 else output)[:, int(self._is_decoder) :]
        return output
