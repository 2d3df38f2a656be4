"""What `flashsae push` does: makes the folder, and pushes it or leaves it to be looked at."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from flashsae.errors import ConfigError
from flashsae.files import atomic
from flashsae.metrics.numbers import compact
from flashsae.places.hub import SCHEME, Place, place_of
from flashsae.publish.content import Published
from flashsae.publish.folder import Asked, make_folder
from flashsae.publish.push import push
from flashsae.publish.tables import title
from flashsae.settings.kinds import expand

_NO_PLACE = Place("USER/NAME")
"""What a card says where nobody has said where it will stand."""


@dataclass(frozen=True)
class Pushing:
    """What is asked of `flashsae push`, by its names."""

    repo: str | None = None
    private: bool = False
    revision: str | None = None
    format: tuple[str, ...] | None = None
    path_in_repo: str | None = None
    license: str | None = None
    message: str | None = None
    to_folder: Path | None = None

    def place(self) -> Place:
        """Return where it goes.

        Raises:
            ConfigError: it is no place on the hub, or none is named and something is to be pushed.
        """
        if self.repo is None and self.to_folder is None:
            raise ConfigError(
                "repo: expected USER/NAME to push to, or --to-folder DIR to look at what would be pushed."
            )
        path = (self.path_in_repo or "").strip("/")
        if self.repo is None:
            return replace(_NO_PLACE, revision=self.revision, path=path)
        bare = self.repo.removeprefix(SCHEME)
        if bare.count("/") != 1 or "@" in bare:
            raise ConfigError(f"repo: expected USER/NAME on the hub, got {self.repo!r}; --path-in-repo names a folder.")
        return place_of(f"{SCHEME}{bare}/{path}", self.revision)

    def asked(self) -> Asked:
        """Return in which formats it goes."""
        if self.format is None:
            return Asked(None, self.license)
        names = [name.strip() for word in self.format for name in word.split(",")]
        return Asked(tuple(filter(None, names)), self.license)


def push_run(run: Path, pushing: Pushing, console: Console) -> None:
    """Push a run, or write what would be pushed.

    Args:
        run: its folder, or that of an SAE.
        pushing: where to, and how.
        console: to say what came of it.
    Raises:
        FlashSAEError: as `flashsae.publish.folder.make_folder` and `flashsae.publish.push.push`; what was there before
            is as it was.
    """
    place, asked = pushing.place(), pushing.asked()
    if pushing.to_folder is not None:
        folder = expand(pushing.to_folder, "to_folder")
        with atomic.atomic_directory(folder) as aside:
            _tell(*make_folder(run, aside, place, asked), console)
        console.print(f"written: {folder.resolve()}; its README.md is the card", highlight=False, soft_wrap=True)
        return
    with tempfile.TemporaryDirectory(prefix="flashsae-push-") as made, atomic.storage_errors(Path(made)):
        folder = Path(made)
        saes, remarks = make_folder(run, folder, place, asked, _linked)
        _tell(saes, remarks, console)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        console.print(f"pushing {compact(size)}B to {place}", highlight=False, soft_wrap=True)
        done = push(folder, place, pushing.message or f"Push {title(saes)}", private=pushing.private)
    what = "pushed" if done.is_new else "nothing has changed since the last push"
    console.print(f"{what}: {done.url}", highlight=False, soft_wrap=True)


def _linked(source: Path, target: Path) -> None:
    """Let a file be where it is to be, without a copy of it where the system allows that."""
    try:
        os.symlink(source, target)
    except OSError:  # Windows asks for a privilege
        shutil.copyfile(source, target)


def _tell(saes: list[Published], remarks: list[str], console: Console) -> None:
    """Say what others will not see."""
    shortened = dict.fromkeys(name for sae in saes for name in sae.shortened)
    told = [f"only the last part of the path is told of {', '.join(shortened)}"] if shortened else []
    for sentence in [*told, *remarks]:
        console.print(f"note: {sentence}", highlight=False, soft_wrap=True, markup=False)
