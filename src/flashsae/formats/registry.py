"""Which formats there are, and of which one a file or folder is: every file of this room with a FORMAT is one."""

from __future__ import annotations

import functools
import pkgutil
from importlib import import_module
from pathlib import Path

from flashsae.errors import CheckpointError, ConfigError, FlashSAEError
from flashsae.formats.content import Format
from flashsae.natural import did_you_mean

_ROOM = "flashsae.formats"


@functools.cache
def formats() -> dict[str, Format]:
    """Return all formats by name; our own is the first."""
    names = sorted(module.name for module in pkgutil.iter_modules(import_module(_ROOM).__path__))
    found = [getattr(import_module(f"{_ROOM}.{name}"), "FORMAT", None) for name in names]
    by_name = {each.name: each for each in found if isinstance(each, Format)}
    return dict(sorted(by_name.items(), key=lambda item: (item[0] != "flashsae", item[0])))


def format_named(name: str, *, written: bool = False) -> Format:
    """Return a format by name.

    Args:
        name: as in `formats`.
        written: it is to be written; those that are only read are not told of then.
    Raises:
        ConfigError: there is none of this name.
    """
    if name not in formats():
        known = [each for each, form in formats().items() if form.write is not None or not written]
        raise ConfigError(f"format: expected one of {', '.join(known)}, got {name!r}.{did_you_mean(name, known)}")
    return formats()[name]


def recognised(path: Path) -> Format:
    """Return the one format that a file or folder is of.

    What is an SAE itself may have others in folders in it, such as what was exported of it, and so may each of
    several: these do not count.

    Raises:
        CheckpointError: it is of none, or of several.
    """
    claims = _uppermost([form for form in formats().values() if form.detects(path)], path)
    if len(claims) == 1:
        return claims[0]
    if claims:
        names = " and ".join(form.name for form in claims)
        raise CheckpointError(
            f"{path} may be of the formats {names}: say which, with format= or --format {claims[0].name}."
        )
    raise CheckpointError(
        f"{path} holds no SAE of a format that is known ({', '.join(formats())}): found {_found(path)}. Name the "
        "folder that the SAE is in; format= or --format NAME tells what of that format is missing."
    )


def _uppermost(claims: list[Format], path: Path) -> list[Format]:
    """Return the formats whose SAEs do not all lie below those of another one."""
    places = [_places(form, path) for form in claims] if len(claims) > 1 else [[path]]
    return [
        form
        for form, own in zip(claims, places)
        if not any(
            all(any(above in place.parents for above in others) for place in own) for others in places if others != own
        )
    ]


def _places(form: Format, path: Path) -> list[Path]:
    """Return the places of the SAEs that a folder holds in a format; none where a damaged one is to be told of."""
    try:
        return list(form.parts(path).values() if form.parts else ()) or [path]
    except FlashSAEError:
        return []


def _found(path: Path) -> str:
    if not path.exists():
        return "no such file or folder"
    if not path.is_dir():
        return "a file"
    names = sorted(each.name for each in path.iterdir())
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{', '.join(names[:5])}{more}" if names else "nothing in it"
