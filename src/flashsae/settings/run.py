"""All settings of a run, to and from TOML."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import tomli_w

from flashsae.errors import CheckpointError, ConfigError
from flashsae.settings.kinds import check_fields
from flashsae.settings.reading import ActivationsConfig
from flashsae.settings.training import TrainConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CONFIG_FILE = "config.toml"
SEAL = "# remove this line if you change another; their crc32 is "
"""How the first line of a config.toml begins that a run wrote."""
_WORKED_OUT = (
    *("model", "hookpoint", "context_length"),
    *("d_sae", "lr", "warmup_steps", "k_aux", "dead_after_tokens", "evaluate_every_steps"),
)
"""Settings that may be left out of a run, and that have their values once its training has begun."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run.

    Args:
        activations: what to train on.
        train: the SAE and its training.
        logger: opt-in loggers beside metrics.jsonl: tensorboard, wandb.
        report: whether to end with snippets and report.html.
    """

    activations: ActivationsConfig = field(default_factory=ActivationsConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    logger: tuple[str, ...] = ()
    report: bool = True

    def __post_init__(self) -> None:
        check_fields(self)

    def to_toml(self) -> str:
        """Return the settings as TOML, one flat table; what is None is left out."""
        flat = {**asdict(self.activations), **asdict(self.train), "logger": self.logger, "report": self.report}
        text = tomli_w.dumps({name: _plain(value) for name, value in flat.items() if value is not None})
        return f"{SEAL}{zlib.crc32(text.encode())}\n{text}"

    @classmethod
    def from_toml(cls, path: Path) -> RunConfig:
        """Read what `to_toml` wrote.

        Raises:
            CheckpointError: the file is missing or damaged, or has neither its checksum nor all settings.
        """
        flat, is_sealed = _load(path)
        if not is_sealed:
            _check_all_there(path, flat)
        try:
            activations = {f.name: flat.pop(f.name) for f in fields(ActivationsConfig) if f.name in flat}
            if activations.get("stream"):
                activations.pop("cache_dtype", None)  # which runs of version 0.1 wrote beside it
            settings = {f.name: flat.pop(f.name) for f in fields(TrainConfig) if f.name in flat}
            return cls(ActivationsConfig(**activations), TrainConfig(**settings), **flat)
        except (ValueError, TypeError) as error:
            raise CheckpointError(_unread(path, error)) from error


def load_settings(path: Path) -> dict[str, Any]:
    """Return the settings in a run's config.toml, by name, as they stand there.

    Raises:
        CheckpointError: the file is missing or damaged, or its checksum is not that of the settings.
    """
    return _load(path)[0]


def _load(path: Path) -> tuple[dict[str, Any], bool]:
    """Return the settings, as `load_settings` does, and whether they carry their checksum."""
    try:
        settings = _parse_toml(path)
        head, _, body = path.read_bytes().replace(b"\r\n", b"\n").partition(b"\n")
    except (OSError, ConfigError) as error:
        raise CheckpointError(_unread(path, error)) from error
    is_sealed = head.startswith(SEAL.encode())
    if is_sealed and head != f"{SEAL}{zlib.crc32(body)}".encode():
        raise CheckpointError(
            f"{path} is not as the run wrote it: its checksum does not fit. Put a copy back, or remove its first line "
            "if you changed it on purpose."
        )
    return settings, is_sealed


def _check_all_there(path: Path, settings: Mapping[str, Any]) -> None:
    """Raise CheckpointError where settings without a checksum are not all that a run writes: the file was cut."""
    declared = [f for config in (ActivationsConfig, TrainConfig, RunConfig) for f in fields(config)]
    expected = [f.name for f in declared if f.default is not None and f.default_factory is MISSING]
    if (path.parent / "metrics.jsonl").exists():
        expected += _WORKED_OUT
    missing = [name for name in expected if name not in settings]
    if missing:
        raise CheckpointError(
            f"{path} is damaged: it has no checksum and lacks the setting {missing[0]}, and a run writes all of them. "
            "Put a copy back, or start a new run."
        )


def _unread(path: Path, error: Exception) -> str:
    reason = str(error).rstrip(".")
    return f"cannot read the settings of the run from {path}: {reason}. Name a folder that flashsae train made."


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def read_toml(path: Path) -> dict[str, Any]:
    """Return the settings in a file.

    Raises:
        ConfigError: the file is missing, is not TOML, or has sections; says so without naming the file.
    """
    settings = _parse_toml(path)
    sections = [name for name, value in settings.items() if isinstance(value, dict)]
    if sections:
        raise ConfigError(f"expected settings without sections, got the section [{sections[0]}]")
    return settings


def _parse_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise ConfigError(error.strerror or str(error)) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"it is not TOML ({error})") from error
