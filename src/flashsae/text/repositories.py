"""Copies of repositories of the Hugging Face hub: clones, snapshots in its cache, and what their cards say of files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from flashsae.errors import ConfigError, DataError, first_line, require
from flashsae.text.text_files import files_of_split, find_files

_CARD = "README.md"
_FENCE = "---"
_LARGEST_CARD = 1 << 22
"""Bytes."""


def snapshot_of(folder: Path) -> Path:
    """Return the snapshot to read where a folder is a repository in the cache of the hub, else the folder.

    Raises:
        DataError: there are several and nothing says which, or none.
    """
    snapshots = folder / "snapshots"
    if not (snapshots.is_dir() and (folder / "blobs").is_dir()):
        return folder
    there = sorted(each for each in snapshots.iterdir() if each.is_dir())
    main = folder / "refs" / "main"
    named = main.read_text("utf-8").strip() if main.is_file() else ""
    if len(there) == 1 or any(each.name == named for each in there):
        return there[0] if len(there) == 1 else snapshots / named
    what = ", ".join(each.name for each in there) or "none"
    raise DataError(f"{folder}: expected one snapshot, got {what}: name one, such as {snapshots / 'REVISION'}.")


def files_in_card(folder: Path, subset: str | None, split: str | None) -> tuple[list[Path], str] | None:
    """Return the files that the card of a repository lists for a subset and split, and a remark; None if it lists none.

    Args:
        folder: with a README.md whose head has `configs`.
        subset: None: the only one, or that which is the default.
        split: None: train, or the only one.
    Raises:
        ConfigError: there is no such subset or split, or several and none is asked for.
        DataError: the card cannot be read, or names files elsewhere or none that are there.
    """
    card = folder / _CARD
    configs = _configs(card) if card.is_file() else None
    if not configs:
        return None
    config = _chosen(card, configs, subset)
    base = _inside(card, str(config.get("data_dir") or "."))
    of_subset = f" of subset {str(config['config_name'])!r}" if len(configs) > 1 else ""
    if not config.get("data_files"):
        files, of_split = files_of_split(folder / base, find_files(folder / base), split)
        return files, of_subset + of_split
    patterns = _patterns(card, config["data_files"])
    wanted = split or ("train" if "train" in patterns or len(patterns) != 1 else next(iter(patterns)))
    if wanted not in patterns:
        raise ConfigError(f"text_split: {card} has the splits {', '.join(patterns)}, got {wanted!r}. Name one of them.")
    found = [file for pattern in patterns[wanted] for file in find_files(folder / base / _inside(card, pattern))]
    return list(dict.fromkeys(found)), f"{of_subset} of split {wanted!r}"


def _configs(card: Path) -> list[Mapping[str, Any]]:
    """Return what the head of a card lists as `configs`."""
    with open(card, "rb") as stream:
        text = stream.read(_LARGEST_CARD).decode("utf-8-sig", "replace")
    lines = text.splitlines()
    if not lines or lines[0].strip() != _FENCE:
        return []
    ends = next((i for i, line in enumerate(lines[1:], start=1) if line.strip() == _FENCE), 0)
    if not any(line.startswith("configs") for line in lines[:ends]):
        return []
    yaml = require("yaml", "hf")
    try:
        head = yaml.safe_load("\n".join(lines[1:ends]))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(f"{card}: its head is not YAML ({first_line(error)}) Repair it, or name the files.") from error
    configs = head.get("configs") if isinstance(head, Mapping) else None
    if not isinstance(configs, list) or not all(isinstance(each, Mapping) for each in configs):
        raise DataError(f"{card}: expected a list of subsets as configs. Repair it, or name the files.")
    return [{"config_name": "default", **each} for each in configs]


def _chosen(card: Path, configs: list[Mapping[str, Any]], subset: str | None) -> Mapping[str, Any]:
    names = [str(config["config_name"]) for config in configs]
    if subset is not None:
        found = [config for config, name in zip(configs, names) if name == subset]
    else:
        found = [config for config in configs if config.get("default") is True] or [
            config for config, name in zip(configs, names) if name == "default" or len(names) == 1
        ]
    if not found:
        got = f"got {subset!r}" if subset is not None else "and none is the default"
        raise ConfigError(f"text_subset: {card} has the subsets {', '.join(names)}, {got}. Name one of them.")
    return found[0]


def _patterns(card: Path, listed: Any) -> dict[str, list[str]]:
    """Return the patterns of files by split, in any of the ways in which cards list them."""
    if isinstance(listed, Mapping):
        listed = [{"split": split, "path": path} for split, path in listed.items()]
    if isinstance(listed, str) or (isinstance(listed, list) and all(isinstance(each, str) for each in listed)):
        listed = [{"split": "train", "path": listed}]
    patterns: dict[str, list[str]] = {}
    for each in listed if isinstance(listed, list) else [None]:
        paths = each.get("path") if isinstance(each, Mapping) else None
        paths = [paths] if isinstance(paths, str) else paths
        if each is None or not isinstance(paths, list) or not all(isinstance(one, str) and one for one in paths):
            raise DataError(f"{card}: expected data_files of paths, or of a split and a path each. Name the files.")
        patterns.setdefault(str(each.get("split", "train")), []).extend(paths)
    return patterns


def _inside(card: Path, path: str) -> PurePosixPath:
    """Return a path of a card; DataError where it leads out of the repository."""
    inner = PurePosixPath(path)
    if inner.is_absolute() or ".." in inner.parts or "://" in path or "\\" in path or "\0" in path:
        raise DataError(f"{card}: its files should lie in its folder, got {path!r}. Name the files to read.")
    return inner
