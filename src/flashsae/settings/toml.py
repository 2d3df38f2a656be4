"""Settings as TOML: one flat table, read here and nowhere else, and the checksum of those that a run wrote."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from flashsae.errors import CheckpointError, ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SEAL = "# remove this line if you change another; their crc32 is "
"""How the first line of a config.toml begins that a run wrote."""


def read_toml(path: Path) -> dict[str, Any]:
    """Return what is in a file, by name.

    Raises:
        ConfigError: the file is missing or is not TOML; says so without naming the file.
    """
    try:
        return tomllib.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise ConfigError(error.strerror or str(error)) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"it is not TOML ({error})") from error


def sealed_toml(settings: Mapping[str, Any]) -> str:
    """Return settings as TOML with their checksum in the first line; what is None is left out."""
    text = tomli_w.dumps({name: _plain(value) for name, value in settings.items() if value is not None})
    return f"{SEAL}{zlib.crc32(text.encode())}\n{text}"


def is_sealed(path: Path) -> bool:
    """Tell whether a file of settings carries its checksum.

    Raises:
        CheckpointError: it carries another one.
    """
    head, _, body = path.read_bytes().replace(b"\r\n", b"\n").partition(b"\n")
    if not head.startswith(SEAL.encode()):
        return False
    if head != f"{SEAL}{zlib.crc32(body)}".encode():
        raise CheckpointError(
            f"{path} is not as the run wrote it: its checksum does not fit. Put a copy back, or remove its first line "
            "if you changed it on purpose."
        )
    return True


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items() if each is not None}
    return str(value) if isinstance(value, Path) else value
