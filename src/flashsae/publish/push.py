"""Push a folder to the Hugging Face hub as one commit, or none where nothing has changed."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from flashsae.errors import CheckpointError, ConfigError, require
from flashsae.places.hub import LOG_IN, Place, has_own_token, hub_errors, names_of
from flashsae.publish.content import EVALUATION_FILE, SAE_FILE, WEIGHTS_FILE
from flashsae.publish.folder import CARD_FILE, PICTURES
from flashsae.publish.ways import LIBRARIES
from flashsae.settings.run import CONFIG_FILE

_COMMIT = re.compile(r"[0-9a-f]{40}")
_OURS = frozenset({SAE_FILE, WEIGHTS_FILE, EVALUATION_FILE, CONFIG_FILE, CARD_FILE})


@dataclass(frozen=True)
class Pushed:
    """What came of it.

    Args:
        url: of what stands there now.
        is_new: whether a commit was made.
    """

    url: str
    is_new: bool


def push(folder: Path, place: Place, message: str, *, private: bool = False, token: str | None = None) -> Pushed:
    """Make what is in a folder the content of a place on the hub, by one commit.

    What an earlier push of ours left there goes: SAEs in formats that are not pushed any more, and their pictures.
    Everything else stays.

    Args:
        folder: as `flashsae.publish.folder.make_folder` fills it.
        place: where to; a repository or branch that is not there is made.
        message: of the commit.
        private: make a repository that only its owner sees.
        token: None: that of HF_TOKEN or of `hf auth login`.
    Raises:
        CheckpointError: the hub does not allow it, cannot be reached, or the place changed meanwhile; it is as it was.
        ConfigError: a private repository is asked for, and there is a public one; or the revision is no branch.
        MissingExtraError: huggingface_hub is not installed.
    """
    hub = require("huggingface_hub", "hf")
    _check(place, token)
    api = hub.HfApi(token=token)
    with hub_errors(place, token, "written"):
        info = _made(api, place, private=private)
        if private and info.private is False:
            raise ConfigError(
                f"private: expected a repository that is private, or none yet, and {place.repo} is public. Make it "
                "private in its settings, or name another one."
            )
        files = {_in_repo(place, path, folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
        there = names_of(api, place, info)
        operations: list[Any] = [hub.CommitOperationAdd(name, str(path)) for name, path in files.items()]
        operations += [hub.CommitOperationDelete(name) for name in outdated(there, files, place.path)]
        done = api.create_commit(
            place.repo, operations, commit_message=message, revision=place.revision, parent_commit=info.sha or None
        )
    tree = f"{done.commit_url.partition('/commit/')[0]}/tree/{place.revision or 'main'}"
    return Pushed(f"{tree}/{place.path}".rstrip("/"), done.oid != info.sha)


def _check(place: Place, token: str | None) -> None:
    if require("huggingface_hub.constants", "hf").HF_HUB_OFFLINE:
        raise CheckpointError(f"{place}: HF_HUB_OFFLINE is set. Unset it to push, or give --to-folder to push nothing.")
    if place.revision is not None and (_COMMIT.fullmatch(place.revision) or place.revision.startswith("refs/")):
        raise ConfigError(f"revision: expected the name of a branch to push to, got {place.revision!r}.")
    if token is None and not has_own_token():
        raise CheckpointError(f"{place}: to push needs a token of an account that may write there: {LOG_IN}.")


def _made(api: Any, place: Place, *, private: bool) -> Any:
    """Return what the hub tells of a place; a repository or branch that is not there is made."""
    errors = require("huggingface_hub.errors", "hf")
    try:
        info = api.model_info(place.repo)
    except errors.RepositoryNotFoundError:
        api.create_repo(place.repo, private=private or None)
        info = api.model_info(place.repo)
    if place.revision is None or (private and info.private is False):
        return info
    try:
        return api.model_info(place.repo, revision=place.revision)
    except errors.RevisionNotFoundError:
        api.create_branch(place.repo, branch=place.revision, exist_ok=True)
        return api.model_info(place.repo, revision=place.revision)


def _in_repo(place: Place, path: Path, folder: Path) -> str:
    return (PurePosixPath(place.path) / path.relative_to(folder).as_posix()).as_posix()


def outdated(there: Sequence[str], new: Collection[str], base: str) -> list[str]:
    """Return the files of a repository that an earlier push of ours left, and that are not pushed any more.

    What was pushed to a folder of its own, with a card there, is something else.

    Args:
        there: all files of the repository.
        new: those that are pushed.
        base: the folder that is pushed to; "" is the root.
    """
    start = f"{base}/" if base else ""
    below = {name.removeprefix(start): name for name in there if name.startswith(start)}
    folders = [name.partition("/")[0] for name in below if name.count("/") == 1 and name.endswith(f"/{SAE_FILE}")]
    parts = [f"{folder}/" for folder in folders if f"{folder}/{CARD_FILE}" not in below]
    homes = [*([""] if parts or SAE_FILE in below else []), *parts]
    return [
        whole
        for name, whole in below.items()
        if whole not in new and any(name.startswith(home) and _is_ours(name.removeprefix(home)) for home in homes)
    ]


def _is_ours(name: str) -> bool:
    folder, _, inside = name.partition("/")
    return folder in {PICTURES, *LIBRARIES} if inside else name in _OURS
