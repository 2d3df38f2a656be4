"""Where the activations of a run lie now, which may have been moved together with it."""

from __future__ import annotations

from pathlib import Path

from flashsae.data.cache import ActivationCache
from flashsae.data.cache_index import CacheIndex, has_index
from flashsae.data.existing import held_hookpoints, not_complete
from flashsae.errors import CheckpointError
from flashsae.lm.hookpoints import patterns_in
from flashsae.settings.reading import ActivationsConfig


def moved_place(config: ActivationsConfig, place: Path, folder: Path) -> Path:
    """Return where the complete cache of a run lies now; a run that has trained never writes to it.

    A folder elsewhere counts only if it may be the one: caches of other models may have the same name. Whether it is
    tells the checkpoint, which knows its checksums.

    Args:
        config: of the run, settled.
        place: where it was.
        folder: of the caches of the run.
    Raises:
        CheckpointError: neither there nor where a move of both would have put it, or it is not complete.
    """
    if has_index(place):
        if not ActivationCache.is_complete(place):
            raise not_complete(place, CacheIndex.read(place))
        return place
    for ancestor in folder.resolve().parents:
        for first in range(1, len(place.parts)):
            moved = ancestor.joinpath(*place.parts[first:])
            if _may_be_of(config, moved):
                return moved
    raise CheckpointError(
        f"the activations of this run are neither in {place} nor where a move of both would have put them: put that "
        "folder back, or start a new run."
    )


def _may_be_of(config: ActivationsConfig, place: Path) -> bool:
    if not has_index(place):
        return False
    try:
        index = CacheIndex.read(place)
    except CheckpointError:
        return True  # so that it is told what is damaged
    held = list(index.settings.get("hookpoints", ()))
    asked = [] if config.hookpoint is None else patterns_in(config.hookpoint)
    return (
        index.complete
        and config.model in (None, index.settings.get("model"))
        and all(name in held for pattern in asked for name in held_hookpoints(pattern, held))
    )
