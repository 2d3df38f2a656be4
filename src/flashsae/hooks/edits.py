"""What can be done to latents while a model runs: values that say which latents, how much, and at which positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from flashsae.errors import ConfigError, DtypeError, ShapeError
from flashsae.hooks.at import At, Window
from flashsae.ops.code import SparseCode
from flashsae.ops.entries import check_same_tokens, firsts, slots, widened

Verb = Literal["ablate", "clamp", "scale", "steer"]
Change = Callable[[SparseCode], SparseCode]
"""A function on the code of a forward, [sequences, positions]."""


@dataclass(frozen=True, eq=False)
class Edit:
    """A change of some latents at some positions, as `ablate`, `clamp`, `scale` and `steer` make it.

    Args:
        verb: what is done.
        latents: [L], int64, each once, on the CPU.
        amount: a scalar, or [L], float.
        at: at which positions.
    """

    verb: Verb
    latents: Tensor
    amount: Tensor
    at: At

    def __repr__(self) -> str:
        few = self.latents.tolist() if len(self.latents) <= 6 else f"{len(self.latents)} latents"
        of = f"{few[0]}" if isinstance(few, list) and len(few) == 1 else f"{few}"
        amount = "" if self.verb == "ablate" else f", {_told(self.amount)}"
        return f"{self.verb}({of}{amount}{'' if self.at.given is None else f', at={self.at!r}'})"


def ablate(latents: Any, *, at: Any = None) -> Edit:
    """Set latents to 0.

    Args:
        latents: a number, several, or a mask [d_sae] of bool.
        at: positions: None for all; a position, several, or a slice; "prompt" or "new" of `generate`; or a mask,
            [positions] or [sequences, positions] of bool. They count from 0 at the first token that the model read,
            padding included, and go on over the steps of `generate`; negative ones from the end of the prompt.
    Raises:
        DtypeError, ConfigError, ShapeError: they are no such latents or positions.
    """
    return _edit("ablate", latents, 0.0, at)


def clamp(latents: Any, value: Any, *, at: Any = None) -> Edit:
    """Set latents to a value, whether they are active or not.

    Args:
        latents, at: as of `ablate`.
        value: in the unit of activations: a number, or one for each latent, [L]. May require a gradient.
    """
    return _edit("clamp", latents, value, at)


def scale(latents: Any, factor: Any, *, at: Any = None) -> Edit:
    """Multiply latents where they are active.

    Args:
        latents, at: as of `ablate`.
        factor: a number, or one for each latent, [L]. May require a gradient.
    """
    return _edit("scale", latents, factor, at)


def steer(latents: Any, amount: Any, *, at: Any = None) -> Edit:
    """Add to latents, whether they are active or not: amount · W_dec[latent] is added to what the model goes on with.

    Args:
        latents, at: as of `ablate`.
        amount: in the unit of activations, not relative to how large they get: a number, or one for each latent, [L].
            Rows of W_dec have norm 1 in most SAEs, and then it is the norm of what is added. May be negative; may
            require a gradient.
    """
    return _edit("steer", latents, amount, at)


def _edit(verb: Verb, latents: Any, amount: Any, at: Any) -> Edit:
    chosen = _as_latents(verb, latents)
    if isinstance(amount, bool) or (amounts := _as_numbers(amount)) is None:
        raise DtypeError(f"{verb}: expected a number, or one for each latent, got {type(amount).__name__}.")
    if amounts.dim() > 1 or (amounts.dim() == 1 and len(amounts) != len(chosen)):
        raise ShapeError(
            f"{verb}: expected a number, or one for each of {len(chosen)} latents, got {list(amounts.shape)}."
        )
    if not bool(amounts.detach().isfinite().all()):
        raise ConfigError(f"{verb}: expected finite numbers, got {_told(amounts)}.")
    own = amounts if amounts.requires_grad else amounts.clone()
    return Edit(verb, chosen, own, At(at))


def _as_numbers(amount: Any) -> Tensor | None:
    try:
        numbers = amount if isinstance(amount, Tensor) else torch.as_tensor(amount, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        return None
    return numbers if numbers.is_floating_point() else numbers.double() if numbers.dtype != torch.bool else None


def _as_latents(verb: str, latents: Any) -> Tensor:
    """Return the numbers of latents: [L], int64."""
    try:
        chosen = torch.as_tensor(list(latents) if isinstance(latents, range | set) else latents, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError):
        chosen = torch.zeros(1, dtype=torch.float32, device="cpu")
    if chosen.numel() == 0 and chosen.dim() < 2:
        chosen = chosen.long()
    if chosen.dtype == torch.bool and chosen.dim() == 1:
        chosen = chosen.nonzero()[:, 0]
    if chosen.dim() > 1 or chosen.dtype == torch.bool or chosen.is_floating_point() or chosen.is_complex():
        raise DtypeError(
            f"{verb}: expected the number of a latent, several, or a mask of bool, got {_kind(latents, chosen)}."
        )
    chosen = chosen.reshape(-1).long().clone()
    ascending = chosen.sort().values
    twice = ascending[1:][ascending.diff() == 0]
    if len(twice):
        raise ConfigError(f"{verb}: expected each latent once, got {int(twice[0])} several times.")
    return chosen


def _kind(latents: Any, chosen: Tensor) -> str:
    if isinstance(latents, Tensor):
        return f"{list(chosen.shape)} of {chosen.dtype}"
    first = latents[0] if isinstance(latents, list | tuple) and latents else latents
    return type(first).__name__


def _told(amount: Tensor) -> str:
    return f"{amount.item():g}" if amount.numel() == 1 else f"{amount.numel()} numbers"


@dataclass(frozen=True)
class Edited:
    """A code, and beside it the one that it was made of, of the same pattern.

    Args:
        code: as it is now.
        origin: what the values of its entries were, 0 of those that were added; None where the pattern is another.
    """

    code: SparseCode
    origin: Tensor | None


class Edits:
    """Changes, bound to an SAE and applied in their order.

    Args:
        name: of the hookpoint, for messages.
        edits: `Edit`s and functions.
        d_sae: number of latents.
    Raises:
        ShapeError: a latent is out of range.
        DtypeError: there is something else among them.
    """

    def __init__(self, name: str, edits: tuple[Edit | Change, ...], d_sae: int) -> None:
        self._name, self.edits = name, edits
        self._moved: dict[tuple[int, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        for edit in edits:
            if not isinstance(edit, Edit):
                if not callable(edit):
                    raise DtypeError(
                        f"edits: expected what flashsae.ablate, clamp, scale and steer return, or functions, got "
                        f"{type(edit).__name__}."
                    )
            elif len(edit.latents) and not 0 <= int(edit.latents.min()) <= int(edit.latents.max()) < d_sae:
                wrong = next(latent for latent in edit.latents.tolist() if not 0 <= latent < d_sae)
                raise ShapeError(f"{edit.verb}: expected latents of {name} from 0 to {d_sae - 1}, got {wrong}.")

    def __bool__(self) -> bool:
        return bool(self.edits)

    @property
    def have_positions(self) -> bool:
        """Whether some are for some positions alone."""
        return any(isinstance(edit, Edit) and edit.at.given is not None for edit in self.edits)

    @property
    def of_prompt(self) -> bool:
        """Whether positions count from the end of the prompt."""
        return any(isinstance(edit, Edit) and edit.at.of_prompt for edit in self.edits)

    def apply(self, code: SparseCode, window: Window | None) -> Edited:
        """Return what becomes of a code.

        Args:
            code: of a forward.
            window: its positions; None where nothing depends on them.
        Raises:
            DtypeError, ShapeError, ConfigError: a function returns no code of the same tokens.
        """
        now = Edited(code, code.acts.detach())
        for edit in self.edits:
            now = self._edited(edit, now, window) if isinstance(edit, Edit) else self._changed(edit, now)
        return now

    def _changed(self, change: Change, now: Edited) -> Edited:
        # a function may write to what it is given, which is also what the change is measured against
        code: object = change(now.code.replace(now.code.acts.clone()))
        if not isinstance(code, SparseCode):
            raise DtypeError(f"edits: expected a function that returns a SparseCode, got {type(code).__name__}.")
        check_same_tokens(f"edits: {self._name}", code, now.code)
        return Edited(code, now.origin if code.pattern is now.code.pattern else None)

    def _edited(self, edit: Edit, now: Edited, window: Window | None) -> Edited:
        code, pattern = now.code, now.code.pattern
        latents, amount = self._on(edit, code.acts)
        slot = slots(pattern, latents)
        chosen = self._tokens(edit, code, window)
        hit = slot < len(latents)
        if chosen is not None:
            hit = hit & _of_places(chosen, code)
        if edit.verb == "ablate":
            return replace(now, code=code.replace(code.acts.masked_fill(hit, 0.0)))
        acts, each = code.acts, torch.nn.functional.pad(amount, (0, 1))[slot]
        if edit.verb == "scale":
            return replace(now, code=code.replace(torch.where(hit, acts * each, acts)))
        is_there, is_first = firsts(pattern, slot, len(latents))
        if edit.verb == "clamp":
            acts = torch.where(hit, each * is_first, acts)
        else:
            acts = torch.where(hit & is_first, acts + each, acts)
        if pattern.is_full:
            return replace(now, code=code.replace(acts))
        wanted = ~is_there if chosen is None else ~is_there & chosen[:, None]
        wider = widened(pattern, latents, wanted)
        added = amount * wanted
        origin = None if now.origin is None else wider.acts(now.origin, torch.zeros_like(added))
        return Edited(SparseCode(wider.pattern, wider.acts(acts, added), code.batch_shape), origin)

    def _tokens(self, edit: Edit, code: SparseCode, window: Window | None) -> Tensor | None:
        """Return at which tokens of a code, [B], bool; None: all."""
        if edit.at.given is None or window is None:
            return None
        mask = edit.at.mask(window, code.acts.device)
        return None if mask is None else mask.expand(code.shape).flatten()

    def _on(self, edit: Edit, acts: Tensor) -> tuple[Tensor, Tensor]:
        """Return the latents of an edit and an amount for each, where the code is."""
        if edit.amount.requires_grad:
            return edit.latents.to(acts.device), _for_each(edit, acts)
        key = id(edit), acts.device, acts.dtype
        if key not in self._moved:
            with torch.inference_mode(False), torch.no_grad():
                self._moved[key] = edit.latents.to(acts.device), _for_each(edit, acts)
        return self._moved[key]


def _for_each(edit: Edit, acts: Tensor) -> Tensor:
    return edit.amount.to(acts.device, acts.dtype).expand(len(edit.latents))


def _of_places(chosen: Tensor, code: SparseCode) -> Tensor:
    """Return of tokens, [B], what stands at each place of a code: of the shape of its values."""
    if code.pattern.starts is None:
        return chosen[:, None]
    return torch.nn.functional.pad(chosen, (0, 1))[code.pattern.tokens.long()]
