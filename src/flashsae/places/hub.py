"""Places on the Hugging Face hub, hf://REPO[@REVISION][/PATH]: what lies there, fetched into the hub's own cache.

Tokens, private repositories, the endpoint, the cache and work without a network are those of huggingface_hub: HF_TOKEN
or `hf auth login`, HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE. Nothing older is taken instead of what cannot be reached.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from flashsae.errors import CheckpointError, ConfigError, FlashSAEError, StorageError, first_line, require
from flashsae.places.hub_files import is_inside, wanted_files

SCHEME = "hf://"
_EXPECTED = "expected hf://USER/NAME, then @REVISION and /PATH if need be, such as hf://me/my-saes@v1.0/h.6"
_REPO = re.compile(r"(?!.*(?:--|\.\.|\.git$))[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?<![.-])", re.ASCII)
_REVISION = re.compile(r"(?!.*\.\.)[^\s\\~^:?*\[/.-][^\s\\~^:?*\[]*(?<![/.])")
_OF_THE_HUB = re.compile(r"refs/(?:convert/[\w.-]+|pr/\d+)")
"""Revisions with a slash that the hub itself makes, which need no %2F."""
_KINDS = ("datasets", "spaces", "kernels", "buckets")
_COMMIT = re.compile(r"\w+", re.ASCII)
"""It becomes the name of a folder in the cache."""
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


@dataclass(frozen=True)
class Place:
    """A place on the hub.

    Args:
        repo: USER/NAME of a repository of models.
        revision: a branch, tag or commit; None: the main branch.
        path: of a folder or file in it; "" is all of it.
    """

    repo: str
    revision: str | None = None
    path: str = ""

    def __str__(self) -> str:
        revision = self.revision or ""
        if not _OF_THE_HUB.fullmatch(revision):
            revision = revision.replace("%", "%25").replace("/", "%2F")
        return SCHEME + self.repo + (f"@{revision}" if revision else "") + (f"/{self.path}" if self.path else "")


def fetched(uri: str, revision: str | None = None, token: str | None = None, *, several: bool = False) -> Path:
    """Fetch an SAE from the hub into its cache, and return where it lies there.

    Only the files of the SAE are fetched, and the config files of the folders that it lies in.

    Args:
        uri: hf://REPO[@REVISION][/PATH], a folder or a file; a slash in a revision is written %2F.
        revision: a branch, tag or commit, where the uri names none.
        token: of an account that may read the repository; None: that of HF_TOKEN or of `hf auth login`.
        several: fetch all SAEs under the path, where it holds several.
    Raises:
        ConfigError: the uri is none, or says another revision than the argument.
        CheckpointError: there is no such repository, revision or path, it cannot be read without a token that is
            allowed to, several SAEs lie there and only one is asked for, the hub cannot be reached, or nothing was
            fetched before and HF_HUB_OFFLINE is set.
        MissingExtraError: huggingface_hub is not installed.
        StorageError: the cache cannot be written.
    """
    place = place_of(uri, revision)
    hub = require("huggingface_hub", "hf")
    if require("huggingface_hub.constants", "hf").HF_HUB_OFFLINE:
        return _fetched_before(hub, place, several=several)
    with hub_errors(place, token):
        api = hub.HfApi(token=token)
        info = api.model_info(place.repo, revision=place.revision)
        names = names_of(api, place, info)
    if not _COMMIT.fullmatch(info.sha or "") or not all(map(is_inside, names)):
        raise CheckpointError(f"{place}: the hub names files outside of the repository, so nothing was fetched.")
    found, wanted = wanted_files(names, place.path, str(place), several=several)
    patterns = [glob.escape(name) for name in wanted]
    with hub_errors(place, token):
        folder = Path(hub.snapshot_download(place.repo, revision=place.revision, token=token, allow_patterns=patterns))
    missing = next((name for name in wanted if not (folder / name).is_file()), None)
    if missing is not None:
        raise CheckpointError(f"{place}: {missing} did not come along, since the repository has changed. Try again.")
    return folder / found


def names_of(api: Any, place: Place, info: Any) -> list[str]:
    """Return the files of a repository: those that came along with what the hub tells of it, or as they are listed."""
    if info.siblings is None:
        return list(api.list_repo_files(place.repo, revision=info.sha))
    return [each.rfilename for each in info.siblings]


def _fetched_before(hub: Any, place: Place, *, several: bool) -> Path:
    """Return where something lies that was fetched before."""
    advice = "HF_HUB_OFFLINE is set, and it was not fetched before: unset that, or name a folder here."
    try:
        folder = Path(hub.snapshot_download(place.repo, revision=place.revision, local_files_only=True))
    except Exception as error:  # of a snapshot that is not whole, too
        told = getattr(error, "snapshot_path", None)
        if told is None:
            raise CheckpointError(f"{place}: {advice}") from error
        folder = Path(told)
    names = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.is_file()]
    try:
        found, _ = wanted_files(names, place.path, str(place), several=several)
    except CheckpointError as error:
        raise CheckpointError(f"{error} HF_HUB_OFFLINE is set, so only what was fetched before counts.") from error
    return folder / found


def place_of(uri: str, revision: str | None = None) -> Place:
    """Take what a place on the hub is called apart.

    Args:
        uri: hf://REPO[@REVISION][/PATH].
        revision: as in the uri, or where that names none.
    Raises:
        ConfigError: it is none, leads out of its repository, or names two revisions.
    """
    body = uri.removeprefix(SCHEME).removeprefix("models/").rstrip("/")
    user, _, rest = body.partition("/")
    if user in _KINDS:
        raise ConfigError(
            f"{uri}: SAEs are read from repositories of models, got one of {user}. Download it with `hf download`, and "
            "load the folder."
        )
    name, told, path = _split(rest)
    if not uri.startswith(SCHEME) or not _REPO.fullmatch(f"{user}/{name}"):
        raise ConfigError(f"{uri!r} is no place on the Hugging Face hub: {_EXPECTED}.")
    if told is not None and revision is not None and told != revision:
        raise ConfigError(f"revision: expected that of {uri}, or none in one of both, got {revision!r}.")
    check_revision(told if revision is None else revision)
    if path and not is_inside(path):
        raise ConfigError(f"{uri}: its path leads out of the repository. Name a folder or file inside.")
    return Place(f"{user}/{name}", told if revision is None else revision, path)


def check_revision(revision: str | None) -> None:
    """Raise ConfigError where a revision cannot be one: it becomes the name of a file in the cache."""
    if revision is not None and not _REVISION.fullmatch(revision):
        raise ConfigError(f"revision: expected the name of a branch or tag, or a commit, got {revision!r}.")


def _split(rest: str) -> tuple[str, str | None, str]:
    """Return name, revision and path of NAME[@REVISION][/PATH]."""
    name, at, behind = rest.partition("@")
    if not at or "/" in name:  # a path may have an @
        name, _, path = rest.partition("/")
        return name, None, path
    of_the_hub = _OF_THE_HUB.match(behind)
    if of_the_hub:
        return name, of_the_hub[0], behind[of_the_hub.end() :].removeprefix("/")
    revision, _, path = behind.partition("/")
    return name, unquote(revision), path


@contextmanager
def hub_errors(place: Place, token: str | None, what: str = "read") -> Iterator[None]:
    """Turn what the hub, the network and the cache refuse into one sentence that says what to do.

    Args:
        place: of the repository.
        token: that was given; None where it is the one that huggingface_hub finds.
        what: that was to be done with the repository, for messages.
    """
    try:
        yield
    except FlashSAEError:
        raise
    except Exception as error:  # of the library, of the one that it speaks HTTP with, of the system: no common base
        raise _told(place, _answer_behind(error), has_token=bool(token) or has_own_token(), what=what) from error


def _answer_behind(error: BaseException) -> BaseException:
    """Return the error that holds an answer of the hub, where another one that says less was made of it."""
    if isinstance(error, ValueError):  # of what was given, with all that the hub has against it
        return error
    behind: BaseException | None = error
    while behind is not None and getattr(behind, "response", None) is None:
        behind = behind.__cause__
    return behind or error


def has_own_token() -> bool:
    """Tell whether huggingface_hub finds a token: in HF_TOKEN, or where `hf auth login` left it."""
    try:
        return bool(require("huggingface_hub", "hf").get_token())
    except Exception:  # of the ways to get one that ask a network
        return False


def _told(place: Place, error: BaseException, *, has_token: bool, what: str) -> FlashSAEError:
    """Return the error to raise for one of somebody else's."""
    errors, constants = (require(f"huggingface_hub.{name}", "hf") for name in ("errors", "constants"))
    status = getattr(getattr(error, "response", None), "status_code", None)
    seen = "with this token" if has_token else "without a token"
    if isinstance(error, errors.GatedRepoError):
        told = f"its owner grants access on {constants.ENDPOINT}/{place.repo}: ask there, then {LOG_IN}."
    elif isinstance(error, errors.RevisionNotFoundError):
        told = f"there is no revision {place.revision!r}. Name a branch, tag or commit of it."
    elif status == 401 and "invalid credentials" in str(error).lower():
        told = f"the hub does not know the token. Make a new one in the settings of your account, then {LOG_IN}."
    elif isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        told = f"there is no such repository that can be seen {seen}. Check the name; if it is private, {LOG_IN}."
    elif status == 403:
        told = f"it cannot be {what} {seen} ({first_line(error)}) Use a token that may, or ask its owner."
    elif status is None and isinstance(error, ValueError):  # of the library itself, on what it was given
        told = f"it cannot be {what}: {' '.join(str(error).split())}"
    elif status == 409:
        told = f"there is a repository of this name that cannot be seen {seen}. Use a token that may, or another name."
    elif status == 412:
        told = "it was changed meanwhile, so nothing was pushed. Push again."
    elif status is not None:
        told = f"the hub answers with status {status} ({first_line(error)}) Try again later."
    elif isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
        where = constants.HF_HUB_CACHE
        return StorageError(f"could not write {where}: {error.strerror}. Free some space, or set HF_HOME to a folder.")
    else:
        told = (
            f"the hub cannot be reached ({first_line(error)}) Check the connection, or set HF_HUB_OFFLINE=1 to use "
            "what was fetched before."
        )
    return CheckpointError(f"{place}: {told}")
