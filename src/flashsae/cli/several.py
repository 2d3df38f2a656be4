"""Settings with several values, of a command line and of a file: what makes a run one of several SAEs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from flashsae.architecture import architecture_named, architecture_names
from flashsae.errors import ConfigError
from flashsae.settings.kinds import check, declared_types, expand, parse, unwrap
from flashsae.settings.reading import TABLES, ActivationsConfig
from flashsae.settings.run import RunConfig
from flashsae.settings.sweep import HOOKPOINT, SHARED, Several
from flashsae.settings.toml import read_toml
from flashsae.settings.training import DEFAULT_ARCH, TrainConfig

WEIGHTED = re.compile(r"^(?!-).+@(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$")
"""A text with its weight in a mixture, such as A@0.7."""
_SAES = "sae"


@dataclass(frozen=True)
class Sweep:
    """Settings of several SAEs, checked each for itself.

    Args:
        base: those of all, by name.
        lists: several values of a setting, by its name.
        saes: those of some SAEs alone; what is a list there is `Several`.
    """

    base: Mapping[str, Any] = field(default_factory=dict)
    lists: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    saes: Sequence[Mapping[str, Any]] = ()


def read_sweep(file: str | Path) -> Sweep:
    """Read a file of settings, some of which have several values, with or without tables [[sae]].

    Raises:
        ConfigError: it cannot be read, makes no more than one SAE, or lets SAEs differ in what all of a run share.
    """
    path = expand(file, "sweep")
    try:
        held = {key.replace("-", "_"): value for key, value in read_toml(path).items()}
    except ConfigError as error:
        raise ConfigError(f"sweep: cannot read {path}: {error}.") from error
    try:
        return _sweep_of(held)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _sweep_of(held: dict[str, Any]) -> Sweep:
    tables = held.pop(_SAES, None)
    if tables is not None and not (isinstance(tables, list) and all(isinstance(table, dict) for table in tables)):
        raise ConfigError("sae: expected tables [[sae]], each with settings of an SAE.")
    if tables == []:
        raise ConfigError("sae: expected at least one table [[sae]], got an empty list.")
    sections = [name for name, value in held.items() if isinstance(value, dict) and name not in TABLES]
    if sections:
        raise ConfigError(f"expected settings and tables [[sae]], got the section [{sections[0]}].")
    others = [name for name, value in held.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if others:
        raise ConfigError(f"expected tables [[sae]], got tables [[{others[0]}]].")
    tables = [{key.replace("-", "_"): value for key, value in table.items()} for table in tables or ()]
    kinds = kinds_of(_names_in(held, tables))
    base, lists = dict[str, Any](), dict[str, Any]()
    for name, value in held.items():
        meant = _several(name, value, kinds)
        (lists if isinstance(meant, Several) else base)[name] = meant
    saes = [{name: _of_one(name, value, kinds) for name, value in table.items()} for table in tables]
    if not lists and not saes:
        raise ConfigError(
            "expected a setting with several values, such as k = [16, 32], or tables [[sae]], got settings of one SAE. "
            "Give it with --config, or add what should differ."
        )
    return Sweep(base, lists, saes)


def _names_in(held: Mapping[str, Any], tables: Iterable[Mapping[str, Any]]) -> list[Any]:
    """Return the names of the architectures that a file speaks of."""
    tables = list(tables) or [{}]
    found = [table.get("arch", held.get("arch", DEFAULT_ARCH)) for table in tables]
    return [name for value in found for name in (value if isinstance(value, list) else [value])]


def kinds_of(architectures: Iterable[Any]) -> dict[str, Any]:
    """Return the declared type of each setting that may differ, of a training and of some architectures by name.

    Raises:
        ConfigError: there is no such architecture.
    """
    kinds = {name: kind for name, kind in declared_types(TrainConfig).items() if name not in SHARED}
    for name in architectures:
        kinds |= declared_types(architecture_named(check("arch", name, str)).settings)
    return {**kinds, "arch": str, HOOKPOINT: str}


def _several(name: str, value: Any, kinds: Mapping[str, Any]) -> Any:
    """Return a value, or `Several` where it is a list that makes several SAEs."""
    kind = kinds.get(name)
    is_tuple = kind is not None and get_origin(unwrap(kind)[0]) is tuple
    if not isinstance(value, list) or (is_tuple and not any(isinstance(each, list) for each in value)):
        return value
    if kind is None:
        of_text = name == "dataset" and all(isinstance(each, str) for each in value)
        if _is_shared(name) and not (of_text and all(map(WEIGHTED.search, value))):
            hint = ' A mixture has weights: ["A@0.7", "B@0.3"].' if of_text else ""
            raise ConfigError(f"{name}: expected one value, since all SAEs of a run share it, got {len(value)}.{hint}")
        return value
    if not value:
        raise ConfigError(f"{name}: expected one value or several, got an empty list.")
    return Several(check(name, each, kind) for each in value)


def _of_one(name: str, value: Any, kinds: Mapping[str, Any]) -> Any:
    """Return the value of a setting in a table [[sae]]."""
    if name not in kinds and _is_shared(name):
        raise ConfigError(f"{name}: expected it above the tables [[sae]], since all SAEs of a run share it.")
    meant = _several(name, value, kinds)
    return meant if isinstance(meant, Several) or name not in kinds else check(name, meant, kinds[name])


def _is_shared(name: str) -> bool:
    """Tell whether a setting is one that all SAEs of a run share."""
    of_reading = [each.name for config in (ActivationsConfig, RunConfig) for each in fields(config)]
    is_tuple = name in of_reading and get_origin(unwrap(declared_types(ActivationsConfig).get(name, str))[0]) is tuple
    return name in SHARED or (name in of_reading and not is_tuple and name not in ("logger", "export"))


def several_in(words: Sequence[str], kinds: Mapping[str, Any]) -> tuple[list[str], dict[str, Several]]:
    """Take the options with several values out of a command line: `--k 16 32`, `--k 16,32`, or `--k` repeated.

    Args:
        words: of the command line.
        kinds: the declared types of the settings that may have several.
    Returns:
        the other words, and the values by the name of their setting.
    Raises:
        ConfigError: a value is not what its setting declares.
    """
    found: dict[str, list[str]] = {}
    pieces: list[tuple[str, list[str]]] = []  # the name of a setting, or "", and the words
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            pieces.append(("", [word, *rest]))
            break
        option, equals, value = word.partition("=")
        name = option.removeprefix("--").replace("-", "_") if option.startswith("--") else ""
        kind = kinds.get(name)
        if kind is None or name == HOOKPOINT or not _may_be_listed(kind) or not (equals or rest):
            pieces.append(("", [word]))
            continue
        piece = [word] if equals else [word, rest.pop(0)]
        given = _values(name, value if equals else piece[1], kind) or [value if equals else piece[1]]
        while not equals and rest and (more := _values(name, rest[0], kind)):
            given += more
            piece.append(rest.pop(0))
        found.setdefault(name, []).extend(given)
        pieces.append((name, piece))
    several = {name: values for name, values in found.items() if len(values) > 1}
    others = [word for name, piece in pieces if name not in several for word in piece]
    return others, {n: Several(check(n, parse(v, kinds[n]), kinds[n]) for v in values) for n, values in several.items()}


def _may_be_listed(kind: Any) -> bool:
    bare = unwrap(kind)[0]
    return bare in (int, float, str) or get_origin(bare) is Literal


def _values(name: str, word: str, kind: Any) -> list[str]:
    """Return the values in a word, between commas; none if it holds something else."""
    parts = [part.strip() for part in word.strip("[]() ").split(",") if part.strip()]
    bare = unwrap(kind)[0]
    if name == "arch":
        known = architecture_names()
        return parts if all(part.partition(":")[0] in known for part in parts) else []
    if get_origin(bare) is Literal:
        return parts if all(part in get_args(bare) for part in parts) else []
    return parts if bare in (int, float) and all(isinstance(parse(part, float), int | float) for part in parts) else []


def architectures_in(sweep: Sweep) -> list[str]:
    """Return the names of the architectures that a file speaks of."""
    given = {**sweep.base, **sweep.lists}
    return _architectures(sweep.saes or [{}], given.get("arch", DEFAULT_ARCH))


def _architectures(tables: Iterable[Mapping[str, Any]], default: Any) -> list[str]:
    found = [table.get("arch", default) for table in tables]
    return [name for value in found for name in (value if isinstance(value, Several) else [value])]


def check_effect(names: Iterable[str], sweep: Sweep, arch: Any) -> None:
    """Raise ConfigError where a setting of the command line changes no SAE, since tables [[sae]] go before it.

    Args:
        names: of those settings.
        sweep: the file.
        arch: of tables that name none.
    """
    kinds = [kinds_of(_architectures([table], arch)) for table in sweep.saes]
    for name in names:
        if sweep.saes and all(name in table or name not in known for table, known in zip(sweep.saes, kinds)):
            raise ConfigError(
                f"{name}: expected no such option, since each table [[sae]] that could take it has its own. Change it "
                "in the file."
            )


def values_of(words: Sequence[str], name: str) -> list[str]:
    """Return all values of the option of a setting in a command line."""
    found: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            break
        option, equals, value = word.partition("=")
        if option == f"--{name}" and (equals or rest):
            first = value if equals else rest.pop(0)
            found += _values(name, first, str) or [first]
            while not equals and rest and _values(name, rest[0], str):
                found += _values(name, rest.pop(0), str)
    return found
