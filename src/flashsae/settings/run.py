"""All settings of a run, to and from its config.toml."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from flashsae.architecture import architecture_of, settings_of
from flashsae.errors import CheckpointError, ConfigError
from flashsae.settings.keywords import settings_by_keyword
from flashsae.settings.kinds import PositiveInt, check_fields
from flashsae.settings.left_open import open_names
from flashsae.settings.reading import ActivationsConfig
from flashsae.settings.sweep import HOOKPOINT, check_entry
from flashsae.settings.toml import is_sealed, read_toml, sealed_toml
from flashsae.settings.training import DEFAULT_ARCH, TrainConfig, check_own_names

CONFIG_FILE = "config.toml"
_LATER = (
    "arch", "d_in", "betas", "eps", "warmup", "warmup_start", "decay_fraction", "auxk", "auxk_alpha",
    "normalize_activations", "apply_b_dec_to_input", "init", "init_from", "sae", "average_tokens", "extended",
    "export",
)  # fmt: skip
"""Settings that were added or opened later than version 0.1, which wrote no checksum."""
_WORKED_OUT = ("model", "hookpoint", "context_length", *open_names(TrainConfig))
"""Settings that may be left out of a run, and that have their values once its training has begun."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run.

    Args:
        activations: what to train on.
        train: the SAE and its training.
        logger: opt-in loggers beside metrics.jsonl: tensorboard, wandb.
        report: whether to end with snippets and report.html.
        sae: of several SAEs, what each has in the place of the settings in `train` and of the hookpoint: tables of
            settings by name, as `flashsae.settings.sweep.common` makes them. None: one SAE for each hookpoint.
        at_once: SAEs that are trained side by side at most, the others after them. None: all.
        export: formats that the trained SAEs are written in too.
    """

    activations: ActivationsConfig = field(default_factory=ActivationsConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    logger: tuple[str, ...] = ()
    report: bool = True
    sae: tuple[Any, ...] = ()
    at_once: PositiveInt | None = None
    export: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        names = [name.strip() for each in self.export for name in each.split(",")]
        object.__setattr__(self, "export", tuple(dict.fromkeys(filter(None, names))))
        object.__setattr__(self, "sae", tuple(check_entry(n, each) for n, each in enumerate(self.sae, 1)))
        self.members()  # which checks their settings
        check_own_names(
            architecture_of(self.train.arch), (f.name for part in (ActivationsConfig, RunConfig) for f in fields(part))
        )

    def to_toml(self) -> str:
        """Return the settings as TOML, one flat table; what is None is left out."""
        several = {"at_once": self.at_once, **({"sae": self.sae} if self.sae else {})}
        several |= {"export": self.export} if self.export else {}
        run = {"logger": self.logger, "report": self.report, **several}
        return sealed_toml({**asdict(self.activations), **self.train.flat(), **run})

    def members(self) -> list[RunConfig]:
        """Return the settings of each SAE of several, as those of a run of its own; of one, or none named, these.

        Raises:
            ConfigError: settings of one do not fit each other, or two are the same.
        """
        if not self.sae:
            return [replace(self, at_once=None)] if self.at_once else [self]
        found: list[RunConfig] = []
        for entry in self.sae:
            hookpoint = {name: value for name, value in entry.items() if name == HOOKPOINT}
            given = {name: value for name, value in entry.items() if name != HOOKPOINT}
            found.append(
                RunConfig(
                    replace(self.activations, **hookpoint),
                    settings_by_keyword(given, self.train),
                    self.logger,
                    self.report,
                    export=self.export,
                )
            )
            if found[-1] in found[:-1]:
                raise ConfigError(
                    f"sae: expected SAEs that differ, got number {len(found)} with the settings of number "
                    f"{found.index(found[-1]) + 1}. Leave one of them out."
                )
        return found

    @classmethod
    def from_toml(cls, path: Path) -> RunConfig:
        """Read what `to_toml` wrote.

        Raises:
            CheckpointError: the file is missing or damaged, has neither its checksum nor all settings, or names an
                architecture that is not registered.
        """
        flat = load_settings(path)
        try:
            arch = settings_of(flat.get("arch", DEFAULT_ARCH))
        except ConfigError as error:
            raise CheckpointError(f"cannot resume {path.parent}: {error}") from error
        if not is_sealed(path):
            _check_all_there(path, flat, arch)
        try:
            activations = {f.name: flat.pop(f.name) for f in fields(ActivationsConfig) if f.name in flat}
            if activations.get("stream"):
                activations.pop("cache_dtype", None)  # which runs of version 0.1 wrote beside it
            train = {
                name: flat.pop(name)
                for name in [each.name for config in (TrainConfig, arch) for each in fields(config)]
                if name in flat
            }
            return cls(ActivationsConfig(**activations), TrainConfig(**train), **flat)
        except (ValueError, TypeError) as error:
            raise CheckpointError(_unread(path, error)) from error


def load_settings(path: Path) -> dict[str, Any]:
    """Return the settings in a run's config.toml, by name, as they stand there.

    Raises:
        CheckpointError: the file is missing or damaged, or its checksum is not that of the settings.
    """
    try:
        settings = read_toml(path)
        is_sealed(path)
    except (OSError, ConfigError) as error:
        raise CheckpointError(_unread(path, error)) from error
    return settings


def _check_all_there(path: Path, settings: Mapping[str, Any], arch: Any) -> None:
    """Raise CheckpointError where settings without a checksum are not all that a run writes: the file was cut."""
    declared = [f for config in (ActivationsConfig, arch, TrainConfig, RunConfig) for f in fields(config)]
    expected = [f.name for f in declared if f.default is not None and f.default_factory is MISSING]
    if (path.parent / "metrics.jsonl").exists():
        expected += _WORKED_OUT
    missing = [name for name in expected if name not in settings and name not in _LATER]
    if missing:
        raise CheckpointError(
            f"{path} is damaged: it has no checksum and lacks the setting {missing[0]}, and a run writes all of them. "
            "Put a copy back, or start a new run."
        )


def _unread(path: Path, error: Exception) -> str:
    reason = str(error).rstrip(".")
    return f"cannot read the settings of the run from {path}: {reason}. Name a folder that flashsae train made."
