"""Which SAE stands where in a model: hookpoints of keys as people write them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from flashsae.errors import ConfigError, DtypeError
from flashsae.lm.hookpoints import (
    IMAGE_PATHS,
    INPUT,
    TEXT_PATHS,
    in_names_of_now,
    patterns_in,
    resolve_hookpoints,
)
from flashsae.sae import SAE


@dataclass(frozen=True)
class Place:
    """An SAE at its place in a model.

    Args:
        name: its hookpoints, with commas between them.
        key: that it was given under.
        reads: hookpoints whose activations it encodes.
        writes: the hookpoint of what it reconstructs; None where they are several.
        sae: the SAE.
    """

    name: str
    key: Any
    reads: tuple[str, ...]
    writes: str | None
    sae: SAE


def places_of(model: nn.Module, whole: nn.Module, saes: Mapping[Any, SAE]) -> tuple[nn.Module, list[Place]]:
    """Return the places of some SAEs, and the part of a model that their hookpoints are names in.

    Args:
        model: the base model, in which they are looked for first.
        whole: the model with its head.
        saes: by module path or pattern; of a transcoder also by a pair of these, or both with a comma between them, of
            a crosscoder by all of them.
    Raises:
        ConfigError: no such hookpoint, not as many as the SAE has sites, or two SAEs for one.
        DtypeError: something else than SAEs.
    """
    if not isinstance(saes, Mapping):
        raise DtypeError(f"saes: expected a dict, {{hookpoint: sae}}, got {type(saes).__name__}.")
    if not saes:
        raise ConfigError("saes: expected at least one, {hookpoint: sae}, got none.")
    for key, sae in saes.items():
        if not isinstance(sae, SAE):
            raise DtypeError(
                f"saes: expected an SAE at {key!r}, as flashsae.load and flashsae.fit return it, got "
                f"{type(sae).__name__}."
            )
    try:
        return model, _placed(model, saes)
    except ConfigError:
        if whole is model:
            raise
        try:
            return whole, _placed(whole, saes)  # such as the head
        except ConfigError:
            pass
        raise


def _placed(model: nn.Module, saes: Mapping[Any, SAE]) -> list[Place]:
    found: dict[str, Place] = {}
    for key, sae in saes.items():
        for place in _places(model, key, sae):
            if place.name in found:
                raise ConfigError(
                    f"saes: expected one SAE for {place.name}, got two ({found[place.name].key!r} and {key!r}); "
                    "another one goes into a second flashsae.hook inside the first."
                )
            found[place.name] = place
    return list(found.values())


def _places(model: nn.Module, key: Any, sae: SAE) -> list[Place]:
    patterns = _patterns(key)
    architecture = sae.architecture
    reads, writes = architecture.reads, architecture.writes
    if len(architecture.sites) == 1:
        names = [name for pattern in patterns for name in _resolved(model, pattern)]
        return [Place(name, key, (name,), name, sae) for name in dict.fromkeys(names)]
    if len(architecture.sites) == 2 and len(patterns) == 1 and ":" not in patterns[0]:
        patterns = [f"{patterns[0]}{INPUT}", patterns[0]]
    each = [_resolved(model, pattern) for pattern in patterns]
    if not architecture.sites:
        group = tuple(dict.fromkeys(name for names in each for name in names))
        return [Place(", ".join(group), key, group, None, sae)]
    if len(each) != len(architecture.sites):
        raise ConfigError(
            f"saes: expected {len(architecture.sites)} hookpoints for a {architecture.title}, of "
            f"{' and '.join(architecture.sites)} in this order, or a module, for its input and output, got {key!r}."
        )
    if len({len(names) for names in each}) > 1:
        told = " and ".join(str(len(names)) for names in each)
        raise ConfigError(f"saes: expected patterns that stand for equally many hookpoints, got {told} for {key!r}.")
    return [_pair(dict(zip(architecture.sites, group)), reads, writes, key, sae) for group in zip(*each)]


def _pair(names: dict[str, str], reads: tuple[str, ...], writes: tuple[str, ...], key: Any, sae: SAE) -> Place:
    written = names[writes[0]] if len(writes) == len(reads) == 1 else None
    return Place(", ".join(names.values()), key, tuple(names[site] for site in reads), written, sae)


def _patterns(key: Any) -> list[str]:
    listed = [key] if isinstance(key, str) else key
    if not isinstance(listed, list | tuple) or not all(isinstance(each, str) for each in listed) or not listed:
        raise DtypeError(f"saes: expected module paths as keys, such as 'h.6', got {key!r}.")
    return [pattern for each in listed for pattern in patterns_in(each)]


def _resolved(model: nn.Module, pattern: str) -> tuple[str, ...]:
    parts = [part for part in (*TEXT_PATHS, *IMAGE_PATHS) if isinstance(getattr(model, part, None), nn.Module)]
    try:
        return resolve_hookpoints(model, [pattern], parts)
    except ConfigError:
        other = in_names_of_now(pattern)
        if other != pattern:
            try:
                return resolve_hookpoints(model, [other], parts)
            except ConfigError:
                pass
        raise
