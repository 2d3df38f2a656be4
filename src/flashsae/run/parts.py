"""The SAEs of a run: which there are, what each is called, where it goes, and which train side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from flashsae.architecture import architecture_of
from flashsae.data.prepared import Activations, AskedSites, Prepared
from flashsae.data.sources import Source
from flashsae.errors import ConfigError, FlashSAEError
from flashsae.files import atomic
from flashsae.lm.hookpoints import folder_of
from flashsae.natural import in_order
from flashsae.settings.run import CONFIG_FILE, RunConfig
from flashsae.settings.sweep import HOOKPOINT, names_of
from flashsae.train.checkpoint import list_checkpoints
from flashsae.train.config import TrainConfig
from flashsae.train.failure import failure_in, write_failure
from flashsae.train.init_from import holds_sae

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Planned:
    """One SAE of a run, before there are activations.

    Args:
        name: of its folder in that of the run; "" where it is the only one.
        reads: the name of its activations.
        config: its settings, every value worked out: running them again does the same.
    """

    name: str
    reads: str
    config: RunConfig

    @property
    def train(self) -> TrainConfig:
        """The settings of its training."""
        return self.config.train


@dataclass(frozen=True)
class Part:
    """One SAE of a run.

    Args:
        planned: what it is.
        folder: where it goes: the folder of the run, or one in it where the run has several.
        activations: those of all SAEs of the run.
    """

    planned: Planned
    folder: Path
    activations: Activations

    @property
    def config(self) -> RunConfig:
        """Its settings."""
        return self.planned.config

    @property
    def source(self) -> Source:
        """Its activations."""
        return self.activations.sources[self.planned.reads]

    @property
    def sites(self) -> list[str]:
        """The sites of its activations, in its order."""
        return list(self.source.widths)

    @property
    def checkpoints(self) -> Path:
        """The folder of its checkpoints."""
        return self.folder / CHECKPOINTS

    def failure(self) -> str | None:
        """Return why it does not go on; None if nothing is known against it."""
        return failure_in(self.folder)

    def fail(self, error: FlashSAEError) -> None:
        """Write down why it does not go on."""
        write_failure(self.folder, str(error))


def asked_of(config: RunConfig) -> list[AskedSites]:
    """Return what the SAEs of a run are to read."""
    return [
        AskedSites(member.activations.hookpoint, architecture_of(member.train.arch).sites)
        for member in config.members()
    ]


def settled(config: RunConfig, prepared: Prepared) -> RunConfig:
    """Return the settings of a run of several SAEs as they are resumed: with all that was left open of its reading."""
    if not config.sae:
        return replace(config, activations=prepared.config)
    reading = replace(prepared.config, hookpoint=config.activations.hookpoint)
    is_named = reading.hookpoint is not None
    entries = tuple(
        entry if is_named or HOOKPOINT in entry or asked.hookpoint is None else {**entry, HOOKPOINT: asked.hookpoint}
        for entry, asked in zip(config.sae, prepared.asked, strict=True)
    )
    return replace(config, activations=reading, sae=entries)


def planned_saes(config: RunConfig, prepared: Prepared) -> list[Planned]:
    """Return the SAEs of a run.

    Raises:
        ConfigError: settings do not fit the activations, or two SAEs would be the same.
    """
    reading = prepared.config
    found = [(name, member) for member, names in zip(config.members(), prepared.names, strict=True) for name in names]
    is_alone = len(found) == 1
    names = [""] if is_alone else names_of([(folder_of(reads), member.train) for reads, member in found])
    planned: list[Planned] = []
    for name, (reads, member) in zip(names, found):
        train = member.train.resolve(prepared.widths[reads])
        if train.init_from is not None and not is_alone and not holds_sae(train.init_from):
            train = replace(train, init_from=train.init_from / folder_of(reads))
        own = replace(member, activations=replace(reading, hookpoint=reads), train=train)
        if any(other.config == own for other in planned):
            raise ConfigError(
                f"sae: expected SAEs that differ, got two at {reads} of the same settings. Leave one out."
            )
        planned.append(Planned(name, reads, own))
    return planned


def rounds_of(planned: Sequence[Planned], at_once: int | None, *, is_streamed: bool) -> list[list[Planned]]:
    """Return which SAEs train side by side: those of as many tokens in batches of one size, `at_once` at most.

    Raises:
        ConfigError: a stream, which is read once, would have to be read several times.
    """

    def size(one: Planned) -> tuple[int, int, int]:
        return one.train.batch_tokens, one.train.tokens, one.train.shuffle_tokens

    groups = [list(group) for _, group in groupby(sorted(planned, key=size), size)] if planned else []
    most = at_once or len(planned)
    rounds = [group[start : start + most] for group in groups for start in range(0, len(group), most)]
    if is_streamed and len(rounds) > 1:
        name = next((n for n, values in zip(_SIZES, zip(*map(size, planned))) if len(set(values)) > 1), "at_once")
        raise ConfigError(
            f"{name}: expected all SAEs side by side where the model streams, since it reads the text once, got "
            f"{len(rounds)} rounds. Cache the activations: --activations FOLDER or --no-stream."
        )
    return rounds


_SIZES = ("batch_tokens", "tokens", "shuffle_tokens")


def most_tokens(config: RunConfig) -> int:
    """Return the tokens of the longest training of a run."""
    return max(member.train.tokens for member in config.members())


def part_folders(run: Path) -> list[Path]:
    """Return the folders of the SAEs of a run that has several, by name; none of a run of one."""
    return [run / name for name in in_order(path.parent.name for path in run.glob(f"*/{CONFIG_FILE}"))]


def begun_apart(run: Path, planned: Sequence[Planned]) -> bool:
    """Tell whether each SAE of a run has a place in the data of its own, as of a version that trained them in turn."""
    has_own = any(list_checkpoints(run / one.name / CHECKPOINTS) for one in planned)
    return len(planned) > 1 and has_own and not any((run / CHECKPOINTS).glob("**/step-*"))


def write_parts(run: Path, planned: Sequence[Planned], activations: Activations) -> list[Part]:
    """Return the SAEs of a run, each with its folder and its settings written."""
    parts = []
    for one in planned:
        folder = run / one.name if one.name else run
        if not folder.exists():
            with atomic.atomic_directory(folder) as made:
                (made / CONFIG_FILE).write_text(one.config.to_toml(), "utf-8")
        elif not (folder / CONFIG_FILE).exists() or (folder / CONFIG_FILE).read_text("utf-8") != one.config.to_toml():
            atomic.write_atomic(folder / CONFIG_FILE, one.config.to_toml())
        parts.append(Part(one, folder, activations))
    return parts
