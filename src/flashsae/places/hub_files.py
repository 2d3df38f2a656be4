"""Which files of a repository are an SAE, by their names alone: what is to be fetched, before anything is."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import PurePosixPath

from flashsae.errors import CheckpointError
from flashsae.natural import in_order

_WEIGHTS = frozenset({".safetensors", ".npz", ".pt", ".pth", ".bin"})
_CONFIGS = frozenset(
    {"cfg.json", "config.json", "config.yaml", "config.yml", "hyperparams.json", "lm_config.json", "flashsae.json"}
)
_SHOWN = 20


def is_inside(path: str) -> bool:
    """Tell whether a path of a repository stays in it, on any system."""
    parts = path.split("/")
    return not {"", ".", ".."} & set(parts) and not re.search(r"[\\:\0]", path)


def wanted_files(names: Sequence[str], path: str, place: str, *, several: bool) -> tuple[str, list[str]]:
    """Return where in a repository the SAE of a path lies, and the files that are needed to read it.

    These are its own, and the config files of the folders around it. Where a folder holds an SAE, what lies in the
    folders below is something else.

    Args:
        names: of all files of the repository.
        path: of a folder or file; "" is all of it.
        place: the same for people, for messages.
        several: take all SAEs under the path, where there are several.
    Raises:
        CheckpointError: there is no such path, no weights under it, or several SAEs and one is asked for.
    """
    below = [name for name in names if not path or name == path or name.startswith(f"{path}/")]
    if not below:  # such as layers/layer_3, for a file with an ending
        below = [name for name in saes_in(names) if name in names and name.startswith(f"{path}.")]
        path = below[0] if len(below) == 1 else path
    if not below:
        raise CheckpointError(f"{place}: there is no such path; {_told(saes_in(names), 'the repository')}")
    found = saes_in(below)
    if path in below:
        found = [path]
    elif path in found or len(found) == 1:
        path = path if path in found else found[0]
        found = [path]
    elif not several or not found:
        raise CheckpointError(f"{place}: {_told(found, 'it')}")
    wanted = dict.fromkeys(name for each in found for name in _files_of(names, each, several=several))
    return path, list(wanted)


def saes_in(names: Collection[str]) -> list[str]:
    """Return the paths of what looks like SAEs among the files of a repository: folders, or files of several in one.

    What lies below one, such as the same SAE in another format, is not told of.
    """
    folders = defaultdict(list)
    for name in in_order(names):
        if PurePosixPath(name).suffix in _WEIGHTS:
            folders[_parent(name)].append(name)
    found: list[str] = []
    for folder, weights in folders.items():
        alike = defaultdict(list)
        for name in weights:
            alike[re.sub(r"\d+", "0", name)].append(name)
        numbered = [name for some in alike.values() if len(some) > 1 for name in some]
        parent = _parent(folder)
        if numbered:
            found += numbered
        elif folder and not _configs_in(names, folder) and _configs_in(names, parent) and parent not in folders:
            found.append(parent)  # such as NAME/hyperparams.json beside NAME/checkpoints/final.safetensors
        else:
            found.append(folder)
    named = dict.fromkeys(found)
    return [path for path in named if not any(_lies_in(path, other) for other in named)]


def _lies_in(path: str, folder: str) -> bool:
    return path != folder and (not folder or path.startswith(f"{folder}/"))


def _files_of(names: Collection[str], path: str, *, several: bool) -> list[str]:
    """Return the files that are needed to read an SAE: its own, and config files of the folders around it.

    Of several in one folder, which have a file each, all that lies in the folder belongs together.
    """
    if path not in names:
        own = _of_folder(names, path)
    else:
        own = [name for name in names if _parent(name) == _parent(path)] if several else [path]
    return [*own, *_configs_around(names, path)]


def _of_folder(names: Collection[str], folder: str) -> list[str]:
    """Return the files of the SAE in a folder: those in it, or all below where its weights lie deeper."""
    here = [name for name in names if _parent(name) == folder]
    has_weights = any(PurePosixPath(name).suffix in _WEIGHTS for name in here)
    return here if has_weights else [name for name in names if not folder or name.startswith(f"{folder}/")]


def _configs_around(names: Collection[str], path: str) -> list[str]:
    """Return the config files of the folders that a folder or file lies in."""
    around = {"" if str(parent) == "." else str(parent) for parent in PurePosixPath(path).parents}
    return [name for name in names if _parent(name) in around and PurePosixPath(name).name in _CONFIGS]


def _configs_in(names: Collection[str], folder: str) -> bool:
    return any(f"{folder}/{config}" if folder else config in names for config in _CONFIGS)


def _parent(name: str) -> str:
    folder = str(PurePosixPath(name).parent)
    return "" if folder == "." else folder


def _told(found: Sequence[str], where: str) -> str:
    """Say which SAEs there are, the first twenty, and what to do."""
    if not found:
        return f"{where} holds no weights of an SAE. Check the name and the path."
    shown = ", ".join(path or "its root" for path in found[:_SHOWN])
    more = f" and {len(found) - _SHOWN:,} more" if len(found) > _SHOWN else ""
    return f"{where} holds {f'{len(found):,} SAEs' if len(found) > 1 else 'an SAE'}: {shown}{more}. Name one of them."
