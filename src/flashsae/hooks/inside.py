"""An SAE at its place in a model: what it makes of the activations of a forward, and what takes their place."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from flashsae.errors import ConfigError, GradientError, ShapeError
from flashsae.hooks.at import At, Window
from flashsae.hooks.edits import Edited, Edits
from flashsae.hooks.sequence import Sequence, by_position, in_backward
from flashsae.hooks.sites import Place
from flashsae.lm.capture import on_run
from flashsae.lm.hookpoints import module_of
from flashsae.ops.code import SparseCode
from flashsae.sae import SAE

Gradients = Literal["latents", "model"]


@dataclass(frozen=True)
class Way:
    """How a model goes on.

    Args:
        error: whether what an SAE leaves unexplained is kept, or at which positions.
        gradients: through latents, or past them; None: codes are constants where the error is kept.
    """

    error: bool | At
    gradients: Gradients | None


class Seen(NamedTuple):
    """What an SAE saw in a forward.

    Args:
        x: [..., d_in].
        code: of x.
        window: positions of x; None where it is not [sequences, positions, d_in].
    """

    x: Tensor
    code: SparseCode
    window: Window | None


class Inside:
    """An SAE at its place while a model runs.

    Args:
        place: where.
        edits: what is done to its latents.
        way: how the model goes on.
        readings: of the parts of the model that its hookpoints lie in.
    """

    def __init__(self, place: Place, edits: Edits, way: Way, readings: dict[str, Sequence]) -> None:
        self.place, self.edits, self.way = place, edits, way
        self.codes: list[SparseCode] = []
        """Of the forwards over the last text."""
        self.edited: list[SparseCode] = []
        """What was made of them."""
        self.took_back = False
        """Whether a forward read other tokens in the place of some."""
        self.has_run = False
        self.reading = readings[place.writes or place.reads[0]]
        self._readings = readings
        self._numbers: dict[str, int] = {}
        self._read: dict[str, Tensor] = {}
        self._seen: Seen | None = None
        self._constant: dict[torch.device, SAE] = {}

    def hook(self, model: nn.Module, stack: ExitStack) -> None:
        """Put the SAE into a model until a stack is closed."""
        for name in dict.fromkeys((*self.place.reads, self.place.writes or self.place.reads[0])):
            module = model.get_submodule(module_of(name))
            stack.callback(on_run(module, name, partial(self._run, name)).remove)
            _let_models_see_last(module)

    def _run(self, name: str, value: Tensor) -> Tensor | None:
        """See what is at a hookpoint; return what takes its place, or None."""
        reading = self._readings[name]
        if reading.is_running:
            if self._numbers.get(name) == reading.number:
                return None  # the module of a model that runs it once for each layer, of which the first is meant
            self._numbers[name] = reading.number
        with torch.autocast(value.device.type, enabled=False):
            if name in self.place.reads:
                self._reads(name, value, reading)
            return self._writes(value, reading) if name == self.place.writes else None

    def _reads(self, name: str, value: Tensor, reading: Sequence) -> None:
        config, reads = self.place.sae.config, self.place.reads
        widths = [columns.stop - columns.start for columns in config.columns.values()] or [config.d_in]
        if len(widths) != len(reads):
            raise ShapeError(f"{self.place.name}: expected {len(widths)} hookpoints, got {len(reads)}.")
        view, _ = self._by_position(name, value, widths[reads.index(name)], reading)
        self._read[name] = view
        if len(self._read) == len(reads):
            x = view if len(reads) == 1 else torch.cat([self._read[each].to(view.device) for each in reads], dim=-1)
            self._read = {}
            self._seen = self._see(x, reading)

    def _see(self, x: Tensor, reading: Sequence) -> Seen:
        window = None
        if x.dim() == 3 and (not self._have_positions or reading.fits(x.shape[1])):
            window = reading.window(x.shape[0], x.shape[1], of_prompt=self._of_prompt)
        elif self._have_positions:
            raise ShapeError(
                f"at: expected activations of all positions that the model reads, [sequences, positions, d], got "
                f"{list(x.shape)} from {self.place.name}: leave at out."
            )
        sae, gradients = self._sae_on(x.device), self.way.gradients
        has_graph = torch.is_grad_enabled() and gradients != "model" and (gradients or self.way.error is not True)
        with torch.set_grad_enabled(bool(has_graph)):
            code = sae.main_part(sae.encode(x))
        if gradients and torch.is_grad_enabled():
            code = _asking(code)
        self._keep(code, reading)
        return Seen(x, code, window)

    def _keep(self, code: SparseCode, reading: Sequence) -> None:
        """Keep the code of a forward, of a checkpointed module only the first."""
        if in_backward():
            if self.way.gradients and self.codes and code.acts.requires_grad > self.codes[-1].acts.requires_grad:
                raise GradientError(
                    "gradients: latents inside a reentrant checkpoint get none: checkpoint with use_reentrant=False."
                )
            return
        if not (reading.is_running and reading.goes_on):
            self.codes, self.edited, self.took_back = [], [], False
        self.took_back |= reading.is_running and reading.takes_back
        self.codes.append(code)
        self.has_run |= self.place.writes is None

    def _writes(self, value: Tensor, reading: Sequence) -> Tensor | None:
        seen, self._seen = self._seen, None
        if seen is None:
            raise ConfigError(
                f"hookpoint: {self.place.writes} ran before {', '.join(self.place.reads)}, which it is made of; name "
                "them the other way round."
            )
        y, undo = self._by_position(str(self.place.writes), value, self.place.sae.config.d_out, reading)
        if y.shape[:-1] != seen.x.shape[:-1]:
            raise ShapeError(
                f"{self.place.name}: expected as many tokens at both hookpoints, got {list(seen.x.shape[:-1])} and "
                f"{list(y.shape[:-1])}."
            )
        edited = self.edits.apply(seen.code, seen.window)
        if not in_backward():
            self.edited.append(edited.code)
            self.has_run = True
        changed = self._changed(y, seen, edited)
        return None if changed is None else undo(changed.to(value.dtype))

    def _changed(self, y: Tensor, seen: Seen, edited: Edited) -> Tensor | None:
        """Return what takes the place of y; None where that is y itself."""
        error = self.way.error
        if error is True:
            return self._with_error(y, seen, edited) if self.edits or self.way.gradients else None
        x_hat = self._without_error(y, seen, edited)
        if isinstance(error, At) and seen.window is not None:
            kept = error.mask(seen.window, y.device)
            if kept is not None:
                return torch.where(kept[..., None], self._with_error(y, seen, edited), x_hat)
        return x_hat

    def _with_error(self, y: Tensor, seen: Seen, edited: Edited) -> Tensor:
        """Return y + x_hat of the code as it is now − x_hat of the code as it was: y where nothing was changed.

        It is subtracted the other way round, since y − 0 has the sign of y where that is 0, too.
        """
        sae, code, through = self._sae_on(y.device), edited.code, self.way.gradients == "latents"
        is_sum = sae.config.normalize_activations == "none" and not (through and sae.architecture.direct)
        if edited.origin is not None and is_sum:
            less = sae.decode(code.replace(edited.origin - code.acts), bias=False)
        else:
            x = seen.x.detach()
            with torch.no_grad():
                before = sae.decode(seen.code, like=x)
            less = before - sae.decode(code, like=seen.x if through else x)
        return (y.detach() if through else y) - less

    def _without_error(self, y: Tensor, seen: Seen, edited: Edited) -> Tensor:
        past = self.way.gradients == "model"
        x_hat = self._sae_on(y.device).decode(edited.code, like=seen.x.detach() if past else seen.x)
        return x_hat + (y - y.detach()) if past and y.requires_grad else x_hat

    def _by_position(
        self, name: str, value: Tensor, width: int, reading: Sequence
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        view, undo = by_position(value, width, reading.sizes if reading.is_running else None)
        if view.dim() == 0 or view.shape[-1] != width or not view.is_floating_point():
            raise ShapeError(
                f"{name}: expected activations [..., {width}], as the SAE takes them, got {list(value.shape)} of "
                f"{str(value.dtype).removeprefix('torch.')}; name the hookpoint that it was trained on."
            )
        return view, undo

    @property
    def _have_positions(self) -> bool:
        return self.edits.have_positions or isinstance(self.way.error, At)

    @property
    def _of_prompt(self) -> bool:
        return self.edits.of_prompt or (isinstance(self.way.error, At) and self.way.error.of_prompt)

    def _sae_on(self, device: torch.device) -> SAE:
        """Return the SAE where the activations are: itself, or one whose parameters are constants.

        The latter shares them, or where the SAE lies on another device has copies, as long as the model is hooked.
        """
        sae = self.place.sae
        if sae.W_dec.device == device and self.way.gradients is None:
            return sae
        if device not in self._constant:
            with torch.inference_mode(False):
                same = sae.normalizing(sae.config.normalize_activations)
                self._constant[device] = same.requires_grad_(False).to(device)
        return self._constant[device]


def _asking(code: SparseCode) -> SparseCode:
    """Return a code whose values keep the gradient that a backward pass brings."""
    acts = code.acts
    if not acts.requires_grad:
        return replace(code, acts=acts.detach().requires_grad_(), pre_acts=None)
    acts.retain_grad()
    return code


def _let_models_see_last(module: nn.Module) -> None:
    """Put the hooks by which transformers collects hidden states behind ours, whichever were set first."""
    hooks = module._forward_hooks
    for number, function in list(hooks.items()):
        if str(getattr(function, "__module__", "")).startswith("transformers."):
            hooks[number] = hooks.pop(number)
