"""The same SAE in other parameters, for formats that have a place for those: computed in float64, rounded once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from flashsae.errors import ConfigError
from flashsae.formats.content import Content
from flashsae.formats.selection import selection_of

_AT_A_TIME = 1 << 24
"""Elements of a matrix that are widened at once."""
_ALIKE = 1e-5
"""Norms that were set to one value differ by less, relative to it, in float32."""
_UNIT, _UNIT_OF_HALVES = 5e-6, 1e-2
"""How far a norm may be from 1 to count as 1, in float32 and in dtypes of 16 bits; others allow twice that at least."""


def subtracting(content: Content, is_wanted: bool) -> Content:
    """Return the SAE whose encoder sees x − b_dec, or x itself: b_enc ± W_enc_T @ b_dec.

    Raises:
        ConfigError: it reads and writes different widths.
    """
    if content.apply_b_dec_to_input == is_wanted:
        return content
    return _fitting(content, lambda each: _subtracting(each, is_wanted))


def _subtracting(content: Content, is_wanted: bool) -> Content:
    if content.d_in != content.d_out:
        raise ConfigError(
            f"b_dec: an SAE that reads {content.d_in} and writes {content.d_out} values cannot subtract it from what "
            "it reads."
        )
    tensors = dict(content.tensors)
    b_dec = tensors["b_dec"].double()
    W_enc_T = tensors["W_enc_T"]
    moved = torch.cat([W_enc_T[rows].double() @ b_dec for rows in _slices(W_enc_T)])
    moved = moved if is_wanted else -moved
    changed = {"b_enc": tensors["b_enc"].double() + moved}
    if "b_mag" in tensors:
        changed["b_mag"] = tensors["b_mag"].double() + tensors["r_mag"].double().exp() * moved
    return replace(content, tensors=_rounded(tensors, changed), apply_b_dec_to_input=is_wanted)


def norms(W_dec: Tensor) -> Tensor:
    """Return the norms of decoder rows, [d_sae], float64."""
    return site_norms(W_dec, 1)[:, 0]


def site_norms(W_dec: Tensor, sites: int) -> Tensor:
    """Return the norms of rows at each of several sites beside each other, [d_sae, sites], float64."""
    blocks = W_dec.reshape(len(W_dec), sites, -1)
    return torch.cat([torch.linalg.vector_norm(blocks[rows].double(), dim=2) for rows in _slices(W_dec)])


def common_norms(W_dec: Tensor, sites: int) -> Tensor | None:
    """Return the norm of each row, [d_sae], where it is the same at every site; None where it is not."""
    found = site_norms(W_dec, sites)
    low, high = found.amin(1), found.amax(1)
    return found.mean(1) if bool((high - low <= _ALIKE * high).all()) else None


def are_one(of_rows: Tensor, dtype: torch.dtype) -> bool:
    """Tell whether all norms are 1, as far as a dtype tells it."""
    allowed = _UNIT_OF_HALVES if dtype.itemsize == 2 else _UNIT
    return bool(((of_rows - 1).abs() <= allowed).all())


def with_unit_rows(content: Content) -> Content | None:
    """Return the SAE whose decoder rows have norm 1, and whose activations are as many times what they were.

    Exact where a latent is active by itself: ReLU, JumpReLU, Gated. Where latents are compared with each other, or with
    one threshold, only if all rows have the same norm. A row of zeros becomes a direction that is never active.

    Returns:
        None where others would be selected: latents are compared, and rows have different norms.
    """
    W_dec = content.tensors["W_dec"]
    of_rows = norms(W_dec)
    if are_one(of_rows, W_dec.dtype):
        return content
    if selection_of(content).base not in ("relu", "jump_relu", "gated"):
        if not are_one(of_rows / of_rows.mean(), W_dec.dtype):
            return None
        of_rows = of_rows.mean().expand_as(of_rows)
    return _fitting(content, lambda each: _divided(each, of_rows))


def _divided(content: Content, of_rows: Tensor) -> Content:
    """Return the SAE whose decoder rows are divided by [d_sae] numbers, and its activations multiplied by them."""
    changed = divided(content.tensors, of_rows)
    changed["W_dec"][:, 0] += (of_rows == 0).to(content.dtype)
    for name in ("b_enc", "b_mag", "threshold"):
        if name in content.tensors:
            value = content.tensors[name].double()
            changed[name] = torch.where(of_rows > 0, value * of_rows, 0.0) if value.dim() else value * of_rows[0]
    return replace(content, tensors=_rounded(content.tensors, changed))


def divided(tensors: Mapping[str, Tensor], of_rows: Tensor) -> dict[str, Tensor]:
    """Return parameters with decoder rows divided by [d_sae] numbers, and pre-activations multiplied by them.

    A row that would be divided by 0 becomes one of zeros.
    """
    multiplied = {name: scaled(tensors[name], of_rows) for name in ("W_enc_T", "b_enc")}
    return {**tensors, **multiplied, "W_dec": scaled(tensors["W_dec"], inverse_of(of_rows))}


def inverse_of(of_rows: Tensor) -> Tensor:
    """Return what rows are multiplied by to be divided by numbers, and 0 for those that are 0."""
    return of_rows.reciprocal().where(of_rows > 0, 0.0)


def _fitting(content: Content, fold: Callable[[Content], Content]) -> Content:
    """Return what a fold makes of an SAE; in float32 where it makes more of it than float16 can tell."""
    folded = fold(content)
    if content.dtype != torch.float16 or _infinite(folded) == _infinite(content):
        return folded
    return fold(replace(content, tensors={name: tensor.float() for name, tensor in content.tensors.items()}))


def _infinite(content: Content) -> int:
    return sum(int(tensor.isinf().sum()) for tensor in content.tensors.values())


def scaled(
    tensor: Tensor,
    rows: Tensor | float | None = None,
    columns: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return a tensor times a number for each row and for each column; as it is where there are none.

    Args:
        tensor: [n, m] or [n].
        rows: [n] or one for all, float64.
        columns: [m], float64.
        dtype: of what is returned, where it is not that of the tensor.
    """
    dtype = tensor.dtype if dtype is None else dtype
    if rows is None and columns is None:
        return tensor.to(dtype)
    of_rows = rows if isinstance(rows, Tensor) and rows.dim() else None
    made = torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)
    for part in _slices(tensor):
        values = tensor[part].double()
        if of_rows is not None:
            values = values * of_rows[part].view(-1, *[1] * (values.dim() - 1))
        elif rows is not None:
            values = values * rows
        made[part] = (values if columns is None else values * columns).to(dtype)
    return made


def _slices(tensor: Tensor) -> list[slice]:
    step = max(1, _AT_A_TIME // max(1, tensor[:1].numel()))
    return [slice(start, start + step) for start in range(0, len(tensor), step)]


def _rounded(tensors: Mapping[str, Tensor], changed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors, some of them changed, in the dtype that they had."""
    return {name: changed[name].to(each.dtype) if name in changed else each for name, each in tensors.items()}
