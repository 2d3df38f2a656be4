"""Names of hookpoints: `layers.6` is the output of a module, `layers.6:in` its input; patterns stand for several.

A setting names one pattern, or more with commas between them. Which hookpoints then make an SAE is in
`data/arrangement.py`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from flashsae.errors import ConfigError
from flashsae.natural import in_order

INPUT, OUTPUT = ":in", ":out"


def module_of(hookpoint: str) -> str:
    """Return the path of the module that a hookpoint lies at."""
    return hookpoint.partition(":")[0]


def is_input(hookpoint: str) -> bool:
    """Tell whether a hookpoint is the input of its module, and not its output."""
    return hookpoint.endswith(INPUT)


def folder_of(hookpoint: str) -> str:
    """Return what a folder for a hookpoint, or several, is called: not every file system has colons in names."""
    return hookpoint.replace(":", "@").replace(", ", "+")


def in_names_of_now(pattern: str) -> str:
    """Return a pattern as new versions of transformers name layers of vision models: encoder.layer.6 is layers.6."""
    return re.sub(r"(^|\.)encoder\.layers?\.(?=[\d*?{\[])", r"\1layers.", pattern)


def patterns_in(setting: str) -> list[str]:
    """Return the patterns that a setting names: "h.1:in, h.{2,3}" has two.

    Raises:
        ConfigError: there is nothing before, behind or between its commas.
    """
    patterns = [part.strip() for part in re.split(r",(?![^{}]*\})", setting)]
    if not all(patterns):
        raise ConfigError(f"hookpoint: expected a module path on both sides of each comma, got {setting!r}.")
    return patterns


def alternatives(pattern: str) -> list[str]:
    """Return a pattern for each choice that its braces leave: "h.{1,3}.mlp" stands for "h.1.mlp" and "h.3.mlp".

    Raises:
        ConfigError: a brace has no other one.
    """
    before, opening, behind = pattern.partition("{")
    inside, closing, rest = behind.partition("}")
    if not opening and "}" not in pattern:
        return [pattern]
    if not closing or "{" in inside or "}" in before:
        raise ConfigError(f"hookpoint: expected braces in pairs, such as h.{{1,3}}, got {pattern!r}.")
    return [f"{before}{choice.strip()}{end}" for choice in inside.split(",") for end in alternatives(rest)]


TEXT_PATHS = ("language_model", "text_model", "text_encoder", "encoder", "decoder")
"""What the part of a model that reads text is called, where a path may leave that out."""
IMAGE_PATHS = ("vision_model", "vision_tower")
"""The same of images."""
_WRAPPERS = re.compile(r"^((_orig_mod|module|base_model\.model)\.)+")
"""What torch.compile, DataParallel and peft put in front of the paths of what they wrap."""


def without_wrappers(path: str) -> str:
    """Return a module path without what wrappers of a model put in front of it."""
    return _WRAPPERS.sub("", path)


def resolve_hookpoints(model: nn.Module, patterns: Sequence[str], parts: Iterable[str] = ()) -> tuple[str, ...]:
    """Return the hookpoints that the patterns stand for, each once, 2 before 10.

    Args:
        model: the base model.
        patterns: module paths, for the output of the module; with ``:in`` behind, for its input. ``*``, ``?`` and
            ``[...]`` do not match dots; of ``{1,3}`` each has to be there. The name of the base model in its parent
            (``model.``, ``transformer.``) may stand in front, and those of wrappers before it.
        parts: paths that may be left out in front, of what reads text inside the model.
    Raises:
        ConfigError: a pattern matches nothing; names what comes close.
    """
    modules = [name for name, _ in model.named_modules() if name]
    names = [f"{name}{side}" for side in ("", INPUT) for name in modules]
    found: dict[str, None] = {}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for pattern in patterns:
        of_pattern: list[str] = []
        for choice in alternatives(pattern):
            short = without_wrappers(choice).removeprefix(prefix)
            ways = (choice, short, *(f"{part}.{short}" for part in parts))
            matches = next(filter(None, (match_hookpoints(way, names) for way in ways)), [])
            if not matches:
                raise _unknown_hookpoint(module_of(choice), modules)
            of_pattern += matches
        found |= dict.fromkeys(in_order(of_pattern))
    return tuple(found)


def match_hookpoints(pattern: str, names: Sequence[str]) -> list[str]:
    """Return the names of hookpoints that a pattern without braces stands for, 2 before 10; `*` matches no dots.

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
    return in_order(matches)


def _fits(name: list[str], parts: list[str]) -> bool:
    return len(name) == len(parts) and all(map(fnmatchcase, name, parts))


_OF_TRANSFORMER_LENS = re.compile(r"blocks\.(\d+)\.(?:\w+\.)*hook_")


def _unknown_hookpoint(path: str, modules: Sequence[str]) -> ConfigError:
    layers = in_order(name for name in modules if re.fullmatch(r"\D+\.\d+", name))
    span = f" Its layers are {layers[0]} to {layers[-1]}." if layers else ""
    found = _OF_TRANSFORMER_LENS.match(path)
    block = next((layer for layer in layers if found and layer.endswith(f".{found[1]}")), None)
    if block is not None:
        return ConfigError(
            f"hookpoint: expected a module path of the model, got {path!r}, a name of TransformerLens. What block "
            f"{path.split('.')[1]} gives is {block}, and what it is given {block}{INPUT}."
        )
    near = ", ".join(difflib.get_close_matches(path, modules, n=3, cutoff=0.5)) or ", ".join(modules[:3])
    return ConfigError(f"hookpoint: the model has no module {path!r}. Near: {near}.{span}")
