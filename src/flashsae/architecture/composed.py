"""What an architecture that is made of another one is called, and its settings: those of that one and its own."""

from __future__ import annotations

import inspect
from dataclasses import field, fields, make_dataclass
from textwrap import dedent, indent
from typing import TYPE_CHECKING, Any

from flashsae.architecture.description import OURS, settings_of

if TYPE_CHECKING:
    from flashsae.architecture.description import Architecture


def composed_name(outer: str, base: Architecture, default: str) -> str:
    """Return the name of an architecture that is made of another one: `transcoder`, or `transcoder:jump_relu`."""
    return outer if base.name == default else f"{outer}:{base.name}"


def composed_settings(name: str, base: type, doc: str = "", **added: tuple[Any, Any]) -> type:
    """Return the settings of an architecture that is made of another one: those of that one, and its own behind them.

    Args:
        name: of the architecture, `outer` or `outer:base`.
        base: the settings class of the other one.
        doc: lines about its own settings, as under "Args:".
        added: types and defaults of its own settings, by name.
    """
    outer, _, inner = name.partition(":")
    title = "".join(word.capitalize() for word in outer.split("_"))
    own = [(each, kind, field(default=default)) for each, (kind, default) in added.items()]
    made = make_dataclass(f"{title}{base.__name__ if inner else 'Settings'}", own, bases=(base,), frozen=True)
    made.__module__ = f"{OURS}.{outer}"
    made.__doc__ = f"{inspect.getdoc(base) or 'Settings.'}".rstrip() + f"\n{indent(dedent(doc).strip(), '    ')}\n"

    def reduced(settings: Any) -> tuple[Any, ...]:
        return _settings_again, (name, {each.name: getattr(settings, each.name) for each in fields(settings)})

    made.__reduce__ = reduced  # type: ignore[assignment, method-assign]
    made.composed_name = name  # type: ignore[attr-defined]
    return made


def _settings_again(name: str, values: dict[str, Any]) -> Any:
    return settings_of(name, **values)
