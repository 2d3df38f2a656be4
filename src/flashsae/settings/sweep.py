"""Several SAEs in one run: the settings of each, from settings with several values, and what each is called."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import Any

from flashsae.architecture import architecture_named, architecture_of
from flashsae.errors import ConfigError
from flashsae.settings.kinds import as_json, check, declared_types
from flashsae.settings.training import DEFAULT_ARCH, TrainConfig, check_known

HOOKPOINT = "hookpoint"
"""The setting of reading in which the SAEs of a run may differ: the model gives all of its sites at once."""
SHARED = ("device", "checkpoint_every_steps", "d_in", "d_out")
"""Settings of a training that are those of all SAEs of a run."""
_LONGEST_NAME = 120

Settings = dict[str, Any]


def grid(
    base: Mapping[str, Any], lists: Mapping[str, Sequence[Any]], saes: Iterable[Mapping[str, Any]] = ()
) -> list[Settings]:
    """Return the settings of every SAE, by name: of each combination of values that is possible.

    A setting that an architecture has not is left out for it, where another one that is asked for has it.

    Args:
        base: settings of all.
        lists: values by the name of their setting: every combination makes an SAE.
        saes: settings of some SAEs, in the place of `base` and `lists` where they have the same; they may be `Several`,
            of which every combination makes an SAE.
    Raises:
        ConfigError: there is none, two are the same, or no architecture that is asked for has a setting.
    """
    single = list(saes)
    for name, values in [*lists.items(), *(item for sae in single for item in sae.items())]:
        if name in lists or isinstance(values, Several):
            _check_values(name, values)
    found: list[Settings] = []
    for sae in single or [{}]:
        several = {name: tuple(values) for name, values in lists.items() if name not in sae}
        several |= {name: tuple(values) for name, values in sae.items() if isinstance(values, Several)}
        fixed = {**base, **{name: value for name, value in sae.items() if not isinstance(value, Several)}}
        made = [{**fixed, **dict(zip(several, values))} for values in product(*several.values())]
        fitting = [_fitting(settings) for settings in made]
        found += [settings for n, settings in enumerate(fitting) if settings not in fitting[:n]]
    _check_known(found, dict.fromkeys((*base, *lists, *(name for sae in single for name in sae))))
    _check_different(found)
    return found


class Several(tuple[Any, ...]):
    """Values of a setting, each of which makes an SAE."""


def _check_values(name: str, values: Sequence[Any]) -> None:
    if not values:
        raise ConfigError(f"{name}: expected one value or several, got an empty list.")
    for n, value in enumerate(values):
        if value in values[:n]:
            raise ConfigError(f"{name}: expected different values, got {value} twice.")


def _fitting(settings: Settings) -> Settings:
    """Return settings without those that the architecture has not."""
    arch = settings.get("arch", DEFAULT_ARCH)
    known = {*declared_types(TrainConfig), HOOKPOINT, *(each.name for each in fields(_settings_of(arch)))}
    return {name: value for name, value in settings.items() if name in known}


def _settings_of(arch: Any) -> Any:
    return architecture_named(arch).settings if isinstance(arch, str) else type(arch)


def _check_known(saes: Sequence[Settings], names: Iterable[str]) -> None:
    """Raise ConfigError where a setting is that of none of the SAEs; says so of the first of their architectures."""
    missing = [name for name in names if not any(name in settings for settings in saes)]
    if missing:
        arch = saes[0].get("arch", DEFAULT_ARCH)
        check_known(missing, architecture_named(arch) if isinstance(arch, str) else architecture_of(arch))


def _check_different(saes: Sequence[Settings]) -> None:
    for n, settings in enumerate(saes):
        if settings in saes[:n]:
            told = ", ".join(f"{name} {_said(value)}" for name, value in settings.items())
            raise ConfigError(
                f"sae: expected SAEs that differ, got two with {told or 'the defaults'}. Leave one of them out."
            )


def common(saes: Sequence[Settings]) -> tuple[Settings, tuple[Settings, ...]]:
    """Return what all SAEs share, of a training, and what each has beside it: those of its architecture, and more."""
    of_training = declared_types(TrainConfig).keys() - {"arch"}
    first = saes[0]
    shared = {
        name: value
        for name, value in first.items()
        if name in of_training and all(name in each and each[name] == value for each in saes)
    }
    return shared, tuple(as_json({n: v for n, v in each.items() if n not in shared}) for each in saes)


def check_entry(number: int, entry: Any) -> Settings:
    """Return the settings of one SAE of several, in which it differs, checked as far as they need no others.

    Raises:
        ConfigError: it is no table, or has a setting that is that of all.
    """
    if not isinstance(entry, dict):
        raise ConfigError(f"sae: expected tables of settings, got {type(entry).__name__} as number {number}.")
    for name in entry:
        if name in SHARED:
            raise ConfigError(f"{name}: expected one value for all SAEs of a run, got one in [[sae]] number {number}.")
    hookpoint = entry.get(HOOKPOINT)
    return entry if hookpoint is None else {**entry, HOOKPOINT: check(HOOKPOINT, hookpoint, str)}


def names_of(configs: Sequence[tuple[str, TrainConfig]]) -> list[str]:
    """Return what to call each SAE of several, after what differs: `layers.6-topk-k32`; fit for a folder, and unique.

    Args:
        configs: where each reads, as a part of a name, and its settings.
    """
    flat = [{"arch": config.flat()["arch"], **config.flat()} for _, config in configs]
    seen = {name: [each[name] for each in flat if name in each] for each in flat for name in each}
    differ = [name for name, values in seen.items() if any(value != values[0] for value in values)]
    places = [place for place, _ in configs]
    names: list[str] = []
    for place, settings in zip(places, flat):
        parts = [place] if len(set(places)) > 1 else []
        parts += [_part(name, settings[name]) for name in differ if settings.get(name) is not None]
        name = _short(re.sub(r"[^\w.,@+=-]+", "_", "-".join(parts)) or "sae")
        while name.lower() in map(str.lower, names):
            name = _short(f"{name}-{1 + sum(other.startswith(name) for other in names)}")
        names.append(name)
    return names


def _short(name: str) -> str:
    if len(name) <= _LONGEST_NAME:
        return name
    return f"{name[: _LONGEST_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _part(name: str, value: Any) -> str:
    said = value.name if isinstance(value, Path) else _said(value)
    return said if name == "arch" else f"{name}{'=' if name[-1].isdigit() or isinstance(value, bool) else ''}{said}"


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e6:
        return str(int(value))
    return ",".join(map(_said, value)) if isinstance(value, (tuple, list)) else str(value)
