"""What counts as activations: [tokens, d], float, finite, by site; checked where they come in."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from os import PathLike
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from flashsae.errors import ConfigError, DataError, DtypeError, ShapeError
from flashsae.ops.validate import FLOATS

T = TypeVar("T")

Batch: TypeAlias = dict[str, Tensor]
"""Activations of the same tokens by site, [B, d] each, in the order of the sites.

A site is a named place of activations: a hookpoint of a language model, or whatever arrays are called."""
Acts: TypeAlias = Mapping[str, Tensor | np.ndarray]
"""The same as people have them."""
X = "x"
"""The site of activations that come without a name."""


def only_site(by_site: Mapping[str, T]) -> T:
    """Return what there is of the only site; raise ConfigError where there are several."""
    if len(by_site) != 1:
        raise ConfigError(f"expected activations of exactly one site here, got {', '.join(by_site)}. Choose one.")
    return next(iter(by_site.values()))


def check_acts(x: Tensor, what: str) -> Tensor:
    """Return x without its graph if it is [tokens, d_in] of a float dtype, else say what is wrong."""
    if x.layout != torch.strided:
        raise DtypeError(f"{what}: expected a dense tensor, got the layout {x.layout}. Convert it: x.to_dense().")
    if x.is_meta:
        raise DtypeError(f"{what}: expected a tensor with data, got one on the device meta, which holds none.")
    if x.dim() != 2 or x.shape[1] == 0:
        advice = {0: "", 1: " Make one tensor of rows: torch.stack(rows).", 2: ""}
        flatten = " Flatten it: x.flatten(0, -2)."
        raise ShapeError(
            f"{what}: expected the shape [tokens, d_in], got {list(x.shape)}.{advice.get(x.dim(), flatten)}"
        )
    if x.dtype not in FLOATS:
        raise DtypeError(
            f"{what}: expected float32, float64, bfloat16 or float16, got {x.dtype}. Convert it: x.float()."
        )
    return x.detach()


def check_finite(acts: Tensor, where: str) -> None:
    """Raise DataError if `acts` ([n, d_in]) holds NaN or Inf, or would in float32; says how many rows, and which."""
    if is_finite(acts):
        return
    bad = ~torch.isfinite(acts.float()).all(dim=1)
    raise DataError(
        f"{where}: {int(bad.sum())} of {len(acts)} rows hold {what_is_not_finite(acts)} (first: row "
        f"{int(bad.nonzero()[0])}). Find out where they come from, or drop those rows, and start again."
    )


def is_finite(acts: Tensor) -> bool:
    """Tell whether float32 holds a tensor without NaN and Inf; ten times as fast as asking every element."""
    return acts.numel() == 0 or all(bool(torch.isfinite(bound.float())) for bound in torch.aminmax(acts))


def what_is_not_finite(acts: Tensor) -> str:
    """Return what to call the reason why `is_finite` is False."""
    return "numbers beyond float32 (x times a constant helps)" if bool(torch.isfinite(acts).all()) else "NaN or Inf"


def _as_tensor(x: np.ndarray, what: str) -> Tensor:
    if not isinstance(x, np.ndarray):
        raise DtypeError(f"{what}: expected a tensor, a numpy array or an iterable of such, got {type(x).__name__}.")
    if np.ma.is_masked(x):
        raise DataError(f"{what}: expected every entry to count, got masked ones. Take their rows out, or fill them.")
    if x.dtype.kind != "f" or x.dtype.itemsize > 8:
        raise DtypeError(f"{what}: expected a float array, got {x.dtype}. Convert it: x.astype('float32').")
    if any(stride < 0 for stride in x.strides) or not x.dtype.isnative:
        raise DtypeError(
            f"{what}: expected an array that torch can share, got reversed strides or bytes. Copy it: x.copy()."
        )
    return torch.from_numpy(x) if x.flags.writeable else _read_only_tensor(x)


def _read_only_tensor(x: np.ndarray) -> Tensor:
    """Share memory with an array that must not be written; torch warns of it, and nothing here writes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return torch.from_numpy(x)


def as_acts(x: Tensor | np.ndarray, what: str) -> Tensor:
    """Return x as a tensor without copying it if it is [tokens, d_in] of a float dtype, else say what is wrong."""
    return check_acts(x if isinstance(x, Tensor) else _as_tensor(x, what), what)


def batch_acts(batch: Any, what: str) -> Tensor:
    """Return a batch of an iterable as a tensor: itself, or the only one in a tuple, list or dict.

    Raises:
        ShapeError, DtypeError: it is not one float [tokens, d_in].
    """
    if isinstance(batch, Mapping):
        if len(batch) != 1:
            raise DtypeError(
                f"{what}: expected one tensor, got a dict of {', '.join(map(str, batch)) or 'nothing'}. Choose one: "
                f"(batch[{next(iter(batch), 'acts')!r}] for batch in x)."
            )
        (batch,) = batch.values()
    if isinstance(batch, tuple | list):
        if len(batch) != 1:
            raise DtypeError(
                f"{what}: expected one tensor, got a {type(batch).__name__} of {len(batch)}. Choose one: (batch[0] for "
                "batch in x)."
            )
        batch = batch[0]  # what a DataLoader over a TensorDataset yields
    return as_acts(batch, what)


def acts_by_site(x: Mapping[str, Any], what: str) -> Batch:
    """Return activations of several sites as tensors: of the same tokens, on one device.

    Raises:
        ShapeError, DtypeError: a site is not [tokens, d] of a float dtype, or they do not belong together.
    """
    acts = {site: as_acts(each, f"{what}[{site!r}]") for site, each in x.items()}
    if len({len(each) for each in acts.values()}) > 1:
        tokens = ", ".join(f"{len(each)} at {site}" for site, each in acts.items())
        raise ShapeError(f"{what}: expected the same tokens at every site, got {tokens}. Give a row for each token.")
    if len({each.device for each in acts.values()}) > 1:
        places = ", ".join(f"{site} on {each.device}" for site, each in acts.items())
        raise DtypeError(f"{what}: expected every site on one device, got {places}. Move them: x.to(device).")
    return acts


def iterate(x: Any) -> Iterator[Any]:
    """Return an iterator over batches; raises DtypeError if x is no iterable of such."""
    if isinstance(x, str | PathLike):
        raise DtypeError(f"x: expected activations, got the path {str(x)!r}. Open it: np.load(path, mmap_mode='r').")
    try:
        return iter(x)
    except TypeError as error:
        raise DtypeError(
            f"x: expected a tensor, a numpy array or an iterable of such, got {type(x).__name__}."
        ) from error
