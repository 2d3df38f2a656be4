"""Settings that may be left open: the default stands at the field, perhaps as a function of other settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, field, fields, replace
from typing import Any, TypeVar

from flashsae.errors import ConfigError
from flashsae.settings.kinds import AtMost, declared_types, metadata_of

_DEFAULT = "default"

Settings = TypeVar("Settings")


def left_open(default: Any = None, *, kw_only: bool = True) -> Any:
    """Declare a field of the type `LeftOpen`.

    Args:
        default: what `fill` puts: a value, or a function of the settings that are filled so far.
        kw_only: as of `dataclasses.field`.
    """
    return field(default=None, kw_only=kw_only, metadata={_DEFAULT: default})


def open_names(settings: Any) -> list[str]:
    """Return the settings of a dataclass that may be left open and have a default."""
    return [each.name for each in fields(settings) if each.metadata.get(_DEFAULT) is not None]


def given(settings: Any) -> dict[str, Any]:
    """Return the settings that are not left open, by name."""
    values = {each.name: getattr(settings, each.name) for each in fields(settings)}
    return {name: value for name, value in values.items() if value is not None}


def told(settings: Any) -> dict[str, Any]:
    """Return the settings of a dataclass that are worth telling: the first, and all others not at their default."""
    first, *others = fields(settings)
    return {
        each.name: getattr(settings, each.name)
        for each in (first, *others)
        if each is first or getattr(settings, each.name) != each.default
    }


def default_values(settings: Any) -> dict[str, Any]:
    """Return the defaults of a dataclass that are values, not functions of other settings, by name."""
    defaults = {each.name: each.metadata.get(_DEFAULT, each.default) for each in fields(settings)}
    return {name: value for name, value in defaults.items() if value is not MISSING and not callable(value)}


def fill(settings: Settings, *, but: Iterable[str] = (), before: Mapping[str, Any] | None = None) -> Settings:
    """Return settings with every one that was left open at its default, in the order of the fields, all bounds checked.

    Args:
        settings: a frozen dataclass.
        but: names that stay open.
        before: defaults by name that go before those at the fields: values, or functions of the settings.
    Raises:
        ConfigError: a setting is above its bound, or `before` has a name that cannot be left open.
    """
    for name in before or ():
        if not any(each.name == name and _DEFAULT in each.metadata for each in fields(settings)):  # type: ignore[arg-type]
            raise ConfigError(f"{name}: expected defaults of settings that may be left open, and this is none.")
    for each in fields(settings):  # type: ignore[arg-type]
        default = (before or {}).get(each.name, each.metadata.get(_DEFAULT))
        if getattr(settings, each.name) is None and default is not None and each.name not in but:
            value = default(settings) if callable(default) else default
            settings = replace(settings, **{each.name: value})  # type: ignore[type-var]
    check_bounds(settings)
    return settings


def check_bounds(settings: Any, *others: Any) -> None:
    """Check every setting against the setting that it is at most.

    Args:
        settings: a dataclass, its fields annotated with `AtMost` where need be.
        others: what else has the settings that are bounds.
    Raises:
        ConfigError: a setting is above its bound; where either is open, nothing is.
    """
    for name, annotation in declared_types(settings.__class__).items():
        value = getattr(settings, name)
        for bound in metadata_of(annotation, AtMost):
            most = next((getattr(each, bound.name) for each in (settings, *others) if hasattr(each, bound.name)), None)
            if value is not None and most is not None and value > most:
                raise ConfigError(f"{name}: expected {name} <= {bound.words or bound.name} = {most}, got {value}.")
