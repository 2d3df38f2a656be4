"""What is checked of an SAE: tensors, numbers and names in files of others, and what a format can hold of ours."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashsae.errors import CheckpointError, ConfigError
from flashsae.formats.content import Content
from flashsae.formats.selection import Selection, split

INSTEAD = "save it in another format, such as flashsae."
"""What to do with an SAE that a format cannot hold."""
_SMALL = 1 << 20
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""That weights may have."""


def glimpse(path: Path) -> dict[str, Any]:
    """Return the object in a small JSON file, to tell formats apart by; {} of whatever it cannot be read from."""
    with suppress(OSError, ValueError, RecursionError):
        if path.is_file() and path.stat().st_size <= _SMALL:
            content = json.loads(path.read_text("utf-8"))
            return content if isinstance(content, dict) else {}
    return {}


def without_nan(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a file says of a training, with null for numbers that JSON has no words for, though Python has."""
    plain: dict[str, Any] = json.loads(json.dumps(content), parse_constant=lambda _: None)
    return plain


def sizes(tensors: Mapping[str, object], name: str, dims: int) -> tuple[int, ...]:
    """Return the sizes of a tensor, which others go by; -1, which stands for any, where it has other than so many."""
    tensor = tensors.get(name)
    is_one = isinstance(tensor, Tensor) and tensor.dim() == dims and tensor.numel() > 0
    return tuple(tensor.shape) if is_one and isinstance(tensor, Tensor) else (-1,) * dims


def check_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    optional: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """Raise CheckpointError unless a file holds the tensors that it must, and none that it may not.

    Args:
        path: of the file, for the message.
        tensors: that it holds, by name.
        shapes: of those that it must hold; -1 stands for any positive number.
        optional: of those that it may hold.
    """
    allowed = {**shapes, **(optional or {})}
    missing, foreign = sorted(shapes.keys() - tensors.keys()), sorted(tensors.keys() - allowed.keys())
    if missing or foreign:
        wrong = f"it has no {', '.join(missing)}" if missing else f"{', '.join(foreign)[:200]} is none of its tensors"
        raise CheckpointError(
            f"{path} is damaged or not of this format: {wrong}; expected {', '.join(sorted(allowed))}. Fetch it again."
        )
    for name, tensor in tensors.items():
        shape, wanted = tuple(tensor.shape), allowed[name]
        fits = len(shape) == len(wanted) and all(
            size == want or (want == -1 and size > 0) for size, want in zip(shape, wanted)
        )
        if not fits or tensor.dtype not in _DTYPES:
            expected = f"floats {[size if size >= 0 else 'any' for size in wanted]}".replace("'", "")
            kind = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{path} is damaged: {name}: expected {expected}, got {kind} {list(shape)}. Fetch it again."
            )


def check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError where a value is infinite or no number."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise CheckpointError(
                f"{path} is damaged: {name} holds values that are infinite or no numbers. Fetch it again."
            )


def check_threshold(path: Path, threshold: Tensor) -> None:
    """Raise CheckpointError where a threshold is NaN; one that is infinite has a meaning."""
    if bool(threshold.isnan().any()):
        raise CheckpointError(f"{path} is damaged: a threshold is no number. Fetch it again.")


def check_alone(path: Path, parts: Mapping[str, Path]) -> None:
    """Raise CheckpointError where a folder holds several SAEs, and one is to be read."""
    if parts:
        names = ", ".join(list(parts)[:5])
        raise CheckpointError(
            f"{path} holds several SAEs: name one of them, such as {path / next(iter(parts))}; there are {names}."
        )


def widest(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """Return the narrowest dtype that holds every value of tensors."""
    return reduce(torch.promote_types, [tensor.dtype for tensor in tensors.values()])


def of_one_dtype(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return parameters, contiguous, in the narrowest dtype that holds all of them exactly.

    A single number takes the dtype of the others wherever that tells it.
    """
    dtype = widest({name: tensor for name, tensor in tensors.items() if tensor.dim()})
    for each in tensors.values():
        if not each.dim() and not each.isnan() and each.double() != each.to(dtype).double():
            dtype = torch.promote_types(dtype, each.dtype)
    return {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}


def number(path: Path, name: str, value: object) -> float:
    """Return a number that may be a tensor of one.

    Raises:
        CheckpointError: it is none.
    """
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    if not isinstance(value, int | float) or isinstance(value, bool):
        got = "nothing" if value is None else f"a {type(value).__name__}"
        raise CheckpointError(f"{path}: {name}: expected a number, got {got}. Save the SAE again.")
    return value


def active(path: Path, k: float, d_sae: int) -> int:
    """Return k, the number of latents that a token selects.

    Raises:
        CheckpointError: it is no number of latents that there are.
    """
    if not 1 <= k <= d_sae or k != int(k):
        raise CheckpointError(
            f"{path}: k: expected a whole number from 1 to {d_sae} as d_sae, got {k}. Save the SAE again."
        )
    return int(k)


def folder_name(name: str) -> str:
    """Return what the folder of an SAE is called, by its hookpoint or the name that it has beside others.

    Not every file system has colons in names. A name of several parts, as layers.3/seed1, is of folders in each other.

    Raises:
        ConfigError: it would lead out of the folder that it is to be in, or is no name that a folder can have.
    """
    told = name.replace(":", "@").replace(", ", "+")
    if not all(re.fullmatch(r"\w[\w.+@-]{0,199}", part) for part in told.split("/")):
        raise ConfigError(f"hookpoint: expected a name that a folder can have, got {ascii(name)[:60]}.")
    return told


def refuse_outer(content: Content, title: str, outer: tuple[str, ...] = ()) -> None:
    """Raise ConfigError of a transcoder or crosscoder that a format does not hold.

    Args:
        content: the SAE.
        title: of the format.
        outer: what it holds beside autoencoders.
    """
    own = split(content.architecture)[0]
    if own and own not in outer:
        raise ConfigError(f"{title} holds no {own}: {INSTEAD}")


def refuse_normalization(content: Content, title: str, held: tuple[str, ...] = ("none",)) -> None:
    """Raise ConfigError where tokens are normalised in a way that a format has no place for."""
    if content.normalize_activations not in held:
        raise ConfigError(
            f"{title} has no place for normalize_activations, got {content.normalize_activations!r}: {INSTEAD}"
        )


def refuse_widths(widths: Sequence[int], title: str) -> None:
    """Raise ConfigError where places that are read or written have different widths, and a format has one."""
    if len(set(widths)) > 1:
        raise ConfigError(
            f"{title} has one width for all that an SAE reads and writes, got {', '.join(map(str, widths))}: {INSTEAD}"
        )


def refuse_unset(content: Content, selection: Selection, title: str) -> None:
    """Raise ConfigError where a format asks for the threshold that an SAE selects by, and it has none yet."""
    if selection.name == "threshold" and selection.threshold is None:
        raise ConfigError(
            f"{title} selects what exceeds a threshold, and {content.architecture} came without one: train it, or "
            f"{INSTEAD}"
        )
