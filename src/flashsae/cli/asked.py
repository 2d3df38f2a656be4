"""From what a command was given to the settings of a run: of one SAE, or of several."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from flashsae.architecture import architecture_of
from flashsae.cli.several import Sweep, check_effect, read_sweep
from flashsae.errors import ConfigError
from flashsae.settings.run import RunConfig
from flashsae.settings.sweep import HOOKPOINT, common, grid
from flashsae.settings.training import DEFAULT_ARCH, TrainConfig


@dataclass(frozen=True)
class AskedTraining:
    """What was asked for to be trained.

    Args:
        training: the settings of a training, by name, whether they were given or not.
        given: names of those that were, on the command line or in a file.
        lists: several values of a setting, by its name, of the command line.
        sweep: file with more.
    """

    training: dict[str, Any]
    given: Collection[str]
    lists: dict[str, Any]
    sweep: Path | None

    def config(self, run: RunConfig) -> RunConfig:
        """Return the settings of a run with those of its trainings: several where any setting has several values."""
        if not self.lists and self.sweep is None:
            return replace(run, train=TrainConfig(**self._with_start()))
        file = Sweep() if self.sweep is None else read_sweep(self.sweep)
        given = {name: v for name, v in self.training.items() if name in self.given and name not in self.lists}
        lists = {name: values for name, values in file.lists.items() if name not in self.given} | self.lists
        try:
            check_effect(self._of_words(file.base), file, {**given, **lists}.get("arch", DEFAULT_ARCH))
            asked = grid(given, lists, file.saes)
        except ConfigError as error:
            raise error if self.sweep is None else ConfigError(f"{self.sweep}: {error}") from error
        shared, saes = common([_with_start_of(each) for each in asked])
        return replace(run, train=TrainConfig(**shared), sae=saes)

    def _of_words(self, held: Mapping[str, Any]) -> list[str]:
        """Return the names of the settings of SAEs on the command line, as far as a file does not say the same."""
        found = [name for name in (*self.training, HOOKPOINT) if name in self.given and name not in held]
        found += [name for name in self.training.keys() & held.keys() if str(self.training[name]) != str(held[name])]
        return [*found, *self.lists]

    def _with_start(self) -> dict[str, Any]:
        """Return the settings of a training, those that were not given as they are in the SAE that it goes on from."""
        from flashsae.train.init_from import holds_sae, settings_of_start

        start = self.training.get("init_from")
        if start is None or not holds_sae(start):  # of a run over several hookpoints, or a mistake, told later
            return self.training
        given = {name: value for name, value in self.training.items() if name in self.given}
        known = {each.name for each in fields(TrainConfig)}
        of_training = {name: value for name, value in self.training.items() if name in known}
        return {**of_training, **settings_of_start(start, given)}


def _with_start_of(given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that were given for one of several SAEs, with those of the SAE that it goes on from."""
    from flashsae.train.init_from import holds_sae, settings_of_start

    start = given.get("init_from")
    if start is None or not holds_sae(start):
        return given
    settings = settings_of_start(start, {name: value for name, value in given.items() if name != HOOKPOINT})
    arch = settings.pop("arch")
    own = {"arch": architecture_of(arch).name, **asdict(arch)}
    return {**settings, **own, **{name: value for name, value in given.items() if name == HOOKPOINT}}


def check_starts(config: RunConfig) -> None:
    """Raise ConfigError where an SAE that a training is to go on from does not fit it, before anything is done."""
    from flashsae.train.init_from import check_saved_start

    for member in config.members():
        check_saved_start(member.train)
