"""SAEs in a model while it runs: their codes are read, and what the model goes on with is changed by them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, get_args

import torch
from torch import nn

from flashsae.errors import ConfigError, DtypeError, ShapeError
from flashsae.hooks.at import At
from flashsae.hooks.edits import Change, Edit, Edits
from flashsae.hooks.inside import Gradients, Inside, Way
from flashsae.hooks.sequence import Sequence as Reading
from flashsae.hooks.sequence import reader_around
from flashsae.hooks.sites import Place, places_of
from flashsae.lm.capture import DidNotRunError
from flashsae.lm.hookpoints import module_of
from flashsae.lm.parts import bare, unwrapped
from flashsae.ops.code import SparseCode
from flashsae.ops.entries import joined
from flashsae.sae import SAE

Wanted = Edit | Change | Sequence[Edit | Change]
"""What is done to the latents of an SAE: changes, in their order."""


def hook(
    model: nn.Module,
    saes: Mapping[Any, SAE],
    edits: Wanted | Mapping[Any, Wanted] = (),
    *,
    error: Any = True,
    gradients: Gradients | None = None,
) -> Hooked:
    """Put SAEs into a model while a `with` lasts: read their codes, change latents, replace activations.

        with flashsae.hook(model, {"h.6": sae}) as codes:
            model(**inputs)
        codes["h.6"]  # SparseCode, [sequences, positions]

        with flashsae.hook(model, {"h.6": sae}, flashsae.steer(31, 8.0, at="new")):
            model.generate(**inputs)

    Without edits, and with the error, the model computes what it does without the SAE, bit for bit. With edits it goes
    on with x + Σ (change of a latent) · W_dec[latent]: the error is kept, and what is not changed need not be decoded.
    Without the error it goes on with the reconstruction of the code, in the dtype of the model.

    Args:
        model: a Hugging Face model, with or without its head, or any module. Its modes, its parameters and hooks of
            others stay as they are; while the `with` lasts it runs uncompiled.
        saes: by hookpoint: a module path or pattern in the base model, as everywhere; ``:in`` behind is the input of
            the module. One SAE can stand at all that a pattern stands for. Of a transcoder a module stands for its
            input and output, and a pair for two places. A crosscoder, given by all its hookpoints, is read alone. An
            SAE runs in its own mode, dtype and precision; where the activations are on another device, copies do.
        edits: what `ablate`, `clamp`, `scale` and `steer` return, or functions of a SparseCode that return one; one,
            or several, which follow each other. By hookpoint, where there are several.
        error: whether what the SAE does not explain is kept; or at which positions, as `at` of `ablate`: ``error=0``
            replaces all but the first token.
        gradients: what a backward pass sees, and whether the codes keep theirs (`codes["h.6"].acts.grad`); parameters
            of SAEs get none then. "latents": x_hat + (x − x_hat), the latter a constant: through latents alone, from
            one SAE to the one before it. "model": latents get the gradient of what they add, and x that which it has
            without an SAE (straight through). None: with the error latents are constants; without it the SAE is
            differentiated as any module.
    Returns:
        a context manager and, by hookpoint, the codes of what the model read last.
    Raises:
        ConfigError: no such hookpoint, setting or edit; when leaving, a hookpoint has not run although the model has.
        DtypeError: something is of another kind.
        ShapeError: a latent is out of range; when the model runs, activations are not as wide as the SAE takes them;
            when leaving, no text had a position that was named.
    Numerics: with the error x − decode(old − new values), which is x where none changed; computed in the wider dtype of
        both, rounded once to that of the model. Deterministic.
    Cost: one `encode` a forward, and with edits or without the error one `decode` of the code; no [tokens, d_sae].
    Source: ours; "latents" and "model": Marks et al. 2024, Sparse feature circuits, section 3.1.
    """
    if not isinstance(model, nn.Module):
        raise DtypeError(f"model: expected a module, got {type(model).__name__}. Load it: AutoModel.from_pretrained.")
    if type(model).__name__ == "DataParallel":
        raise ConfigError("model: DataParallel runs copies of a model, which hooks do not see: expected model.module.")
    if gradients is not None and gradients not in get_args(Gradients):
        raise ConfigError(f'gradients: expected "latents", "model" or None, got {gradients!r}.')
    within, places = places_of(bare(model), unwrapped(model), saes)
    kept = error if isinstance(error, bool) else True if error is None else At(error)
    way = Way(kept, gradients)
    wanted = _by_place(edits, places, saes)
    for place in places:
        if place.writes is None and (wanted[place.name] or way != Way(True, None)):
            raise ConfigError(
                f"{place.name}: a {place.sae.architecture.title} reconstructs several hookpoints when all have run: "
                "its codes can be read, but nothing be changed; leave out edits, error and gradients."
            )
    return Hooked(within, places, wanted, way)


class Codes(Mapping[str, SparseCode]):
    """Codes by hookpoint, of what a model read last: a forward, and all that went on with it, as `generate` does."""

    def __init__(self, insides: Mapping[str, Inside], *, edited: bool = False) -> None:
        self._insides, self._edited = insides, edited

    def __getitem__(self, hookpoint: Any) -> SparseCode:
        """Return the code of a hookpoint: [sequences, positions], over all forwards on the last text.

        Values keep gradients where there was one forward.

        Raises:
            ConfigError: there is no SAE, it has not run, or the model took back some of what it had read.
            ShapeError: activations have no positions, or the number of sequences has changed.
        """
        codes, inside = self.forwards(hookpoint), self._inside(hookpoint)
        if inside.took_back:
            raise ConfigError(
                f"{inside.place.name}: the model took back some tokens that it had read, as assisted generation does: "
                "read the codes of each forward, or run it once more on the text."
            )
        return joined(codes)

    def forwards(self, hookpoint: Any) -> list[SparseCode]:
        """Return the code of each forward on the last text.

        Raises:
            ConfigError: there is no SAE, or it has not run.
        """
        inside = self._inside(hookpoint)
        codes = inside.edited if self._edited and inside.place.writes else inside.codes
        if not codes and inside.reading.number:
            raise DidNotRunError([inside.place.name], what="its inputs")
        if not codes:
            raise ConfigError(f"{inside.place.name}: no code is there before the model has run inside of the `with`.")
        return codes

    def _inside(self, hookpoint: Any) -> Inside:
        named = _named(hookpoint, [inside.place for inside in self._insides.values()])
        if len(named) != 1:
            raise ConfigError(
                f"hookpoint: expected one of {', '.join(self._insides)}, got {hookpoint!r}"
                f"{', which stands for several' if named else ''}."
            )
        return self._insides[named[0]]

    def __contains__(self, hookpoint: object) -> bool:
        return len(_named(hookpoint, [inside.place for inside in self._insides.values()])) == 1

    def __iter__(self) -> Iterator[str]:
        return iter(self._insides)

    def __len__(self) -> int:
        return len(self._insides)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self._insides)})"


class Hooked(Codes):
    """What `hook` returns: a context manager, and the codes by hookpoint.

    Args:
        model: that the hookpoints are names in.
        places: of the SAEs.
        edits: by the name of the place.
        way: how the model goes on.
    """

    edited: Codes
    """The codes as the edits left them."""

    def __init__(
        self, model: nn.Module, places: list[Place], edits: Mapping[str, tuple[Edit | Change, ...]], way: Way
    ) -> None:
        self._model, self._open, self._is_open = model, ExitStack(), False
        readers: dict[nn.Module, Reading] = {}
        insides: dict[str, Inside] = {}
        for place in places:
            readings = {}
            for name in (*place.reads, *([place.writes] if place.writes else [])):
                reader = reader_around(model, module_of(name))
                readings[name] = readers.setdefault(reader, Reading(reader))
            bound = Edits(place.name, edits[place.name], place.sae.config.d_sae)
            insides[place.name] = Inside(place, bound, way, readings)
        self._readings, self._way = list(readers.values()), way
        super().__init__(insides)
        self.edited = Codes(insides, edited=True)

    def __enter__(self) -> Hooked:
        """Put the SAEs in."""
        if self._is_open:
            raise ConfigError("hook: it is in use: make another one, flashsae.hook(...), for a second `with` inside.")
        with ExitStack() as stack:
            # hooks that come after a compilation are not seen by what was compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            for reading in self._readings:
                reading.hook(stack)
            for inside in self._insides.values():
                inside.hook(self._model, stack)
            self._open = stack.pop_all()
        self._is_open = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the SAEs out."""
        self._is_open = False
        self._open.close()
        if kind is None:
            for inside in self._insides.values():
                _check_done(inside)


def _check_done(inside: Inside) -> None:
    """Raise ConfigError where an SAE has not run although the model did, ShapeError where a text was too short."""
    reading = inside.reading
    if reading.number and not inside.has_run:
        raise DidNotRunError([inside.place.name], what="its inputs")
    if not reading.longest or reading.has_gone_on:
        return
    positions = [("error", inside.way.error), *((repr(edit), getattr(edit, "at", None)) for edit in inside.edits.edits)]
    for what, at in positions:
        place = at.beyond(reading.longest) if isinstance(at, At) else None
        if place is not None:
            raise ShapeError(
                f"{inside.place.name}: {what}: no text had a position {place}; the longest had {reading.longest}."
            )


def _named(hookpoint: object, places: Sequence[Place]) -> list[str]:
    """Return the names of the places that somebody means: by name, by the key of an SAE, or by what it reconstructs."""
    ways = ([place.name for place in places if getattr(place, way) == hookpoint] for way in ("name", "key", "writes"))
    return next(filter(None, ways), [])


def _by_place(edits: Any, places: Sequence[Place], saes: Mapping[Any, SAE]) -> dict[str, tuple[Edit | Change, ...]]:
    """Return what is done at each place."""
    wanted: dict[str, tuple[Edit | Change, ...]] = {place.name: () for place in places}
    if not isinstance(edits, Mapping):
        listed = _listed(edits)
        if listed and len(saes) > 1:
            raise ConfigError(
                f"edits: expected a dict, {{hookpoint: edits}}, beside several SAEs ({', '.join(wanted)}), got "
                f"{type(edits).__name__}."
            )
        return dict.fromkeys(wanted, listed)
    for key, given in edits.items():
        named = _named(key, places)
        if not named:
            raise ConfigError(f"edits: expected one of {', '.join(wanted)}, where there are SAEs, got {key!r}.")
        for name in named:
            wanted[name] += _listed(given)
    return wanted


def _listed(edits: Any) -> tuple[Edit | Change, ...]:
    if isinstance(edits, Edit) or callable(edits):
        return (edits,)
    if isinstance(edits, str) or not isinstance(edits, Sequence):
        raise DtypeError(
            f"edits: expected what flashsae.ablate, clamp, scale and steer return, functions, or a list of these, got "
            f"{type(edits).__name__}."
        )
    return tuple(edits)
