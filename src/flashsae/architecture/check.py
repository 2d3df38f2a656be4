"""What an architecture must be to be registered: checked once, so that a slip is a sentence, not a wrong training."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import TYPE_CHECKING

from flashsae.errors import ConfigError

if TYPE_CHECKING:
    from flashsae.architecture.description import Architecture
    from flashsae.architecture.parts import Parameter

SIZES = ("d_in", "d_out", "d_sae")
UNIT_ROWS = "unit_rows"
_NEEDED = ("W_enc_T", "b_enc", "W_dec", "b_dec")
_NAME = r"\w[\w.-]*(:\w[\w.-]*)*"  # as files of a saved SAE may have it; outer:inner where it is composed


def check_architecture(architecture: Architecture) -> None:
    """Raise ConfigError unless name, settings, parameters and terms are what the library can work with."""
    name = architecture.name
    if not isinstance(name, str) or not re.fullmatch(_NAME, name):
        raise ConfigError(f"name: expected letters, digits and _ . - for an architecture, got {name!r}.")
    _check_settings(name, architecture.settings)
    _check_once(f"parameters of {name}", [row.name for row in architecture.parameters])
    _check_once(f"terms of {name}", [term.name for term in architecture.terms])
    if not architecture.terms:
        raise ConfigError(f"terms of {name}: expected at least one, such as flashsae.architecture.RECONSTRUCTION.")
    names = [each.name for each in fields(architecture.settings)]
    if not architecture.sites and not {"sites", "widths"}.issubset(names):
        raise ConfigError(f"settings of {name}: expected sites and widths among them, since it takes any sites.")
    rows = {row.name: row for row in architecture.parameters}
    missing = [needed for needed in _NEEDED if needed not in rows]
    if missing:
        raise ConfigError(
            f"parameters of {name}: expected {', '.join(_NEEDED)} among them, as in flashsae.architecture.AUTOENCODER, "
            f"and there is no {missing[0]}. Where it has no use, give it trained=False."
        )
    if not any(row.trained for row in architecture.parameters):
        raise ConfigError(f"parameters of {name}: expected at least one that is trained.")
    for row in architecture.parameters:
        _check_parameter(f"parameter {row.name} of {name}", row, rows)


def _check_settings(name: str, settings: type) -> None:
    if not is_dataclass(settings) or not settings.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise ConfigError(f"settings of {name}: expected a frozen dataclass, got {settings!r}.")
    bare = [each.name for each in fields(settings) if each.default is each.default_factory is MISSING]
    if bare:
        raise ConfigError(f"settings of {name}: expected a default for each, but {bare[0]} has none.")


def _check_once(what: str, names: Sequence[str]) -> None:
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise ConfigError(f"{what}: expected each name once, got {repeated[0]} again.")


def _check_parameter(what: str, row: Parameter, rows: dict[str, Parameter]) -> None:
    if not row.name.isidentifier():
        raise ConfigError(f"{what}: expected a name that an attribute can have.")
    if row.trained and not row.saved:
        raise ConfigError(f"{what}: expected trained=False beside saved=False: what is trained is saved.")
    unknown = [size for size in row.shape if size not in SIZES]
    if unknown:
        raise ConfigError(f"{what}: expected a shape of {', '.join(SIZES)}, got {unknown[0]!r} in it.")
    if len(row.shape) != 2 and (row.factored or row.unit_norm or row.initial == UNIT_ROWS):
        raise ConfigError(
            f"{what}: expected two sizes where it is factored, has unit norm or starts as {UNIT_ROWS}, got "
            f"{list(row.shape)}."
        )
    if isinstance(row.initial, str) and row.initial != UNIT_ROWS:
        source = rows.get(row.initial)
        if source is None or (isinstance(source.initial, str) and source.initial != UNIT_ROWS):
            raise ConfigError(
                f"{what}: expected it to start as {UNIT_ROWS}, a number, or equal to a parameter that does, got "
                f"{row.initial!r}."
            )
