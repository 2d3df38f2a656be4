"""Which files a path stands for: those of text in a folder or a pattern, and those of a split."""

from __future__ import annotations

import functools
import glob
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

from flashsae.errors import ConfigError, DataError
from flashsae.natural import did_you_mean
from flashsae.settings.run import CONFIG_FILE
from flashsae.settings.toml import SEAL
from flashsae.text.readers import KINDS
from flashsae.text.streams import COMPRESSIONS, is_compressed, kind_of
from flashsae.text.token_files import TOKEN_KINDS


def find_files(path: Path, *, tokens: bool = False) -> list[Path]:
    """Return the files of text that a file, a folder or a glob pattern stands for, in the order of their names.

    Runs, caches and saved SAEs in folders below are left out: they are no text, and come and go.

    Args:
        path: of what is looked for.
        tokens: take the files of token ids of a folder that has both; else those of text are taken.
    Raises:
        DataError: there is no such file, or none that can be read.
    """
    if path.is_file():
        kind = kind_of(path)
        if kind not in ALL_KINDS:
            raise DataError(f"{path}: cannot read a '{path.suffix}' file as text; expected one of {_known()}.")
        return _checked([path])
    found = _visible(path) if path.is_dir() else _matches(path)
    root = next(folder for folder in (path, *path.parents) if not glob.has_magic(str(folder)))
    is_ours = functools.cache(_is_ours)
    visible = [
        file
        for file in found
        if "__MACOSX" not in file.parts  # what that system adds to archives
        and kind_of(file) in ALL_KINDS
        and file.is_file()
        and not any(is_ours(folder) for folder in file.parents if root in folder.parents)
    ]
    left_out = _Beside()
    of_text = _once(sorted(file for file in visible if kind_of(file) in KINDS and not left_out.has(file)))
    of_tokens = sorted(file for file in visible if kind_of(file) in TOKEN_KINDS)
    files = (of_tokens or of_text) if tokens else (of_text or of_tokens)
    if not files:
        what = f"it holds no file ending in {_known()}" if path.is_dir() else "no such file, folder or match"
        near = near_path(path)
        raise DataError(f"text {str(path)!r}: {what}. Check the path (relative paths start at {Path.cwd()}).{near}")
    return _checked(files)


def near_path(path: str | Path) -> str:
    """Return the sentence that asks for what lies in the same folder under nearly the same name; "" for none."""
    path = Path(path)
    with suppress(OSError, ValueError):
        beside = [each.name for each in islice(path.parent.iterdir(), _LOOKED_AT) if not each.name.startswith(".")]
        return did_you_mean(path.name, [name for name in beside if name != path.name])
    return ""


_LOOKED_AT = 10_000  # names in a folder


def _once(files: list[Path]) -> list[Path]:
    """Return files without the compressed copies of those that lie there as they are, in order."""
    copies: dict[Path, Path] = {}
    for file in files:
        copies.setdefault(file.with_suffix("") if is_compressed(file) else file, file)
    return list(copies.values())


ALL_KINDS = (*KINDS, *TOKEN_KINDS)


def _known() -> str:
    return f"{', '.join(ALL_KINDS)} (texts and tables also with {' or '.join(COMPRESSIONS)})"


def _checked(files: list[Path]) -> list[Path]:
    """Return files of which none is only a stand-in of git, or compressed in a way that it cannot be read in."""
    for file in files:
        kind = kind_of(file)
        packed = KINDS[kind].packed if kind in KINDS else ()
        if is_compressed(file) and file.suffix.lower() not in packed:
            raise DataError(f"{file}: a {kind} file cannot be read while it is compressed; unpack it first.")
        if _beginning(file).startswith(_LFS_POINTER):
            raise DataError(
                f"{file} is a pointer of git LFS, not the data: run git lfs pull in the folder of the repository."
            )
    return files


_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def _visible(folder: Path) -> Iterator[Path]:
    """Yield what lies in a folder and no editor, notebook or system has hidden there: .git, .ipynb_checkpoints, ._x."""
    for file in folder.rglob("*"):
        if not any(part.startswith(".") for part in file.relative_to(folder).parts):
            yield file


def _matches(pattern: Path) -> Iterator[Path]:
    """Yield what a glob pattern matches; ** goes into no folder by a link, which may lead in a circle."""
    root = next(folder for folder in (pattern, *pattern.parents) if not glob.has_magic(str(folder)))
    wanted = pattern.relative_to(root)
    if wanted == Path():
        return
    if wanted.name == "**":  # of which pathlib thinks that only folders are meant
        wanted = wanted / "*"
    names_hidden = any(part.startswith(".") for part in wanted.parts)
    for file in root.glob(str(wanted)):
        if names_hidden or not any(part.startswith(".") for part in file.relative_to(root).parts):
            yield file


class _Beside:
    """Knows which files of a data set stand beside its data."""

    def __init__(self) -> None:
        self._in_state = functools.cache(_in_state)
        self._is_clone = functools.cache(_is_clone)

    def has(self, file: Path) -> bool:
        """Tell whether a file only tells of a data set, or is none of those that its folder says it has."""
        if file.name in _METADATA or (self._in_state(file.parent) or {file.name}).isdisjoint({file.name}):
            return True
        return Path(file.stem).stem.lower() in _ABOUT and self._is_clone(file.parent)


_METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json"}
_ABOUT = {"readme", "license", "licence", "notice", "citation", "requirements", "changelog"}
"""What people write about the contents of a repository."""


def _in_state(folder: Path) -> set[str] | None:
    """Return the files of a data set that datasets.save_to_disk wrote; None where there is no such."""
    try:
        state = json.loads((folder / "state.json").read_bytes())
        return {str(each["filename"]) for each in state["_data_files"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _is_clone(folder: Path) -> bool:
    return (folder / ".gitattributes").is_file() or (folder / ".git").exists()


def _is_ours(folder: Path) -> bool:
    """Tell whether a folder is a run, a cache of activations or a saved SAE, by the files that each of them has."""
    if (folder / "flashsae.json").is_file():
        return True
    log, settings, checkpoints = (folder / name for name in ("metrics.jsonl", CONFIG_FILE, "checkpoints"))
    if log.is_file() and (settings.is_file() or checkpoints.is_dir()):
        return True
    return _SETTINGS_BEGIN in _beginning(settings) or _INDEX_BEGINS in _beginning(folder / "index.json")


_SETTINGS_BEGIN, _INDEX_BEGINS = SEAL.encode(), b'"flashsae.activations"'


def _beginning(file: Path) -> bytes:
    try:
        with open(file, "rb") as stream:
            return stream.read(200)
    except OSError:
        return b""


_SPLITS = (
    frozenset({"train", "training"}),
    frozenset({"validation", "valid", "val", "dev"}),
    frozenset({"test", "testing", "eval", "evaluation"}),
)
"""Words that name the same split."""


def files_of_split(path: Path, files: list[Path], split: str | None) -> tuple[list[Path], str]:
    """Return those files that belong to a split by their names or folders, such as test-00000.parquet, and a remark.

    Args:
        path: what the files were found under.
        files: in order.
        split: None: that of training where several splits are named so, else all files.
    Raises:
        ConfigError: a split is asked for and no file is named after it.
    """
    names = {file: _words(file if file == path or not path.is_dir() else file.relative_to(path)) for file in files}
    asked = (split or "train").lower()
    wanted = next((words for words in _SPLITS if asked in words), frozenset({asked}))
    chosen = [file for file in files if names[file] & wanted]
    if split is None:
        others = frozenset().union(*_SPLITS) - wanted
        if not path.is_dir() or not chosen or not any(names[file] & others for file in files):
            return files, ""
    if not chosen:
        raise ConfigError(
            f"text_split: no file of {path} is named after the split {split!r}. Name the files or folder of that split "
            "as the text, or leave the setting out."
        )
    return chosen, f" of split {split or 'train'!r}"


def _words(path: Path) -> set[str]:
    """Return the words in the name of a file and of its folders."""
    own = path.parts if not path.is_absolute() else path.parts[-1:]
    return {word for part in own for word in re.split(r"[^a-z]+", part.lower()) if word}
