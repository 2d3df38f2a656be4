"""A command that takes the settings of an architecture beside its own, and shows them with their defaults."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import MISSING, field, fields, is_dataclass, make_dataclass
from typing import Annotated, Any, get_type_hints

from cyclopts import Group, Parameter

from flashsae.architecture import Architecture, architecture_names
from flashsae.settings.kinds import declared_types, unwrap
from flashsae.settings.training import TrainConfig, check_own_names

_HIDDEN = ("extended",)
"""Settings that a run writes into its config.toml, and nobody gives."""


def declared_by(command: Callable[..., Any]) -> dict[str, Any]:
    """Return the declared type of each setting of a command; those of its dataclasses are its own."""
    declared: dict[str, Any] = {}
    for name, annotation in get_type_hints(command, include_extras=True).items():
        kind: Any = unwrap(annotation)[0]
        if is_dataclass(kind):
            declared |= declared_types(unwrap(annotation)[0])
        else:
            declared[name] = annotation
    return declared


def taking_settings_of(
    architecture: Architecture,
    command: Callable[..., None],
    name: str,
    *,
    also: Sequence[Architecture] = (),
    **beside: Any,
) -> Callable[..., None]:
    """Return a command that takes the settings of an architecture beside those of the training, and shows them.

    Args:
        architecture: any.
        command: takes the settings of a training, all by name, in one parameter.
        name: of this parameter.
        also: others, where SAEs of several are trained.
        beside: what the command is given by name that is no option of it.
    Raises:
        ConfigError: a setting of the architecture is called as another one of the command.
    """
    hints = get_type_hints(command, include_extras=True)
    others = declared_by(command).keys() - {name}
    for each in (architecture, *also):
        check_own_names(each, [*declared_types(TrainConfig), *sorted(others), "config", "help", "version"])
    settings, shown = _flat_settings(architecture, also), Parameter(name="*", group=Group("Training", sort_key=2))

    @functools.wraps(command)
    def taking(*positional: Any, **given: Any) -> None:
        command(*positional, **beside, **given)

    taking.__annotations__ = hints | {name: Annotated[settings, shown]}
    return taking


def _flat_settings(architecture: Architecture, also: Sequence[Architecture]) -> type:
    """Return a dataclass with the settings of architectures behind their name, and those of the training."""
    names = ", ".join(architecture_names(installed=False))
    told = f"Architecture of the SAE: {names}, or one of a package. --arch NAME --help shows its own settings."
    made: list[tuple[str, Any, Any]] = []
    for each in fields(TrainConfig):
        if each.name == "arch":
            made.append(("arch", str, field(default=each.default, kw_only=True, metadata={"help": told})))
            own = [setting for one in (architecture, *also) for setting in _copies(one.settings)]
            made += [*{setting[0]: setting for setting in reversed(own)}.values()][::-1]  # each name once
        else:
            made += _copies(TrainConfig, each.name)
    flat = make_dataclass("TrainConfig", made, frozen=True)
    flat.__module__ = __name__  # not "types", which cyclopts takes for built in
    flat.__doc__ = f"TrainConfig.\n\nArgs:\n{_with_defaults(_help(TrainConfig), architecture)}\n" + "\n".join(
        _help(each.settings) for each in (architecture, *also)
    )
    return flat


def _copies(settings: type, *names: str) -> list[tuple[str, Any, Any]]:
    """Return the fields of a dataclass, or some of them, to make another one with."""
    kinds, copies = declared_types(settings), []
    for each in fields(settings):
        if each.name in (names or kinds):
            has_factory = each.default_factory is not MISSING
            default: Any = {"default_factory": each.default_factory} if has_factory else {"default": each.default}
            kind = Annotated[kinds[each.name], Parameter(show=False)] if each.name in _HIDDEN else kinds[each.name]
            copies.append((each.name, kind, field(kw_only=True, **default)))
    return copies


def _help(settings: type) -> str:
    """Return the lines on the arguments in the docstring of a dataclass."""
    found = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", inspect.getdoc(settings) or "", re.DOTALL | re.MULTILINE)
    return found[1].rstrip() if found else ""


def _with_defaults(lines: str, architecture: Architecture) -> str:
    """Return lines on the settings of a training with the defaults that an architecture has of its own."""
    blocks = dict(re.findall(r"^    (\w+): (.*?)(?=^    \w|\Z)", lines, re.DOTALL | re.MULTILINE))
    for name, default in architecture.defaults.items():
        if name not in blocks:
            continue  # a slip of whoever made the architecture, which is told where settings are filled
        text = re.sub(r" Default: .*", "", " ".join(blocks[name].split()))
        blocks[name] = f"{text} Default: {_said(default)}."
    return "\n".join(f"    {name}: {text.rstrip()}" for name, text in blocks.items())


def _said(default: Any) -> str:
    if callable(default):
        words = (inspect.getdoc(default) or "Worked out from other settings.").partition("\n")[0].rstrip(".")
        return words[:1].lower() + words[1:]
    if isinstance(default, tuple):
        return " and ".join(map(_said, default))
    return f"{default:g}" if isinstance(default, float) else str(default)
