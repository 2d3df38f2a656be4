"""Names of hookpoints: `layers.6` is the output of a module, `layers.6:in` its input; patterns stand for several."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from flashsae.errors import ConfigError

INPUT, OUTPUT = ":in", ":out"


def module_of(hookpoint: str) -> str:
    """Return the path of the module that a hookpoint lies at."""
    return hookpoint.partition(":")[0]


def is_input(hookpoint: str) -> bool:
    """Tell whether a hookpoint is the input of its module, and not its output."""
    return hookpoint.endswith(INPUT)


def folder_of(hookpoint: str) -> str:
    """Return what a folder for a hookpoint is called: a colon is no part of a name on every file system."""
    return hookpoint.replace(":", "@")


def resolve_hookpoints(model: nn.Module, patterns: Sequence[str]) -> tuple[str, ...]:
    """Return the hookpoints that the patterns stand for, each once, 2 before 10.

    Args:
        model: the base model.
        patterns: module paths, for the output of the module; with ``:in`` behind, for its input. ``*``, ``?`` and
            ``[...]`` do not match dots. The name of the base model in its parent (``model.``, ``transformer.``) may
            stand in front.
    Raises:
        ConfigError: a pattern matches nothing; names what comes close.
    """
    modules = [name for name, _ in model.named_modules() if name]
    names = [f"{name}{side}" for side in ("", INPUT) for name in modules]
    found: dict[str, None] = {}
    for pattern in patterns:
        matches = match_hookpoints(pattern, names)
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        if not matches and pattern.startswith(prefix):
            matches = match_hookpoints(pattern.removeprefix(prefix), names)
        if not matches:
            raise _unknown_hookpoint(module_of(pattern), modules)
        found |= dict.fromkeys(matches)
    return tuple(found)


def match_hookpoints(pattern: str, names: Sequence[str]) -> list[str]:
    """Return the names of hookpoints that a pattern stands for, 2 before 10; its wildcards do not match dots.

    Raises:
        ConfigError: behind the module path stands something else than ``:in`` or ``:out``.
    """
    path, colon, side = pattern.partition(":")
    if colon + side not in ("", INPUT, OUTPUT):
        raise ConfigError(
            f"hookpoint: expected a module path, for its output, or {path}{INPUT}, for its input, got {pattern!r}."
        )
    parts = path.split(".")
    matches = [
        name for name in names if is_input(name) == is_input(pattern) and _fits(module_of(name).split("."), parts)
    ]
    return sorted(matches, key=_natural)


def _fits(name: list[str], parts: list[str]) -> bool:
    return len(name) == len(parts) and all(map(fnmatchcase, name, parts))


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _unknown_hookpoint(path: str, modules: Sequence[str]) -> ConfigError:
    layers = sorted((name for name in modules if re.fullmatch(r"\D+\.\d+", name)), key=_natural)
    span = f" Its layers are {layers[0]} to {layers[-1]}." if layers else ""
    near = ", ".join(difflib.get_close_matches(path, modules, n=3, cutoff=0.5)) or ", ".join(modules[:3])
    return ConfigError(f"hookpoint: the model has no module {path!r}. Near: {near}.{span}")
