"""The same SAE in other parameters, for formats that have a place for those: computed in float64, rounded once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flashsae.errors import ConfigError
from flashsae.formats.content import Content
from flashsae.formats.selection import split

_ROWS = 4096
UNIT, UNIT_OF_HALVES = 5e-6, 1e-2
"""How far a norm may be from 1 to count as 1, in float32 and in dtypes of 16 bits; others allow twice that at least."""


def inner_of(content: Content) -> str:
    """Return what an SAE selects in inference, of an autoencoder or whatever it is: topk, batch_topk, jump_relu ..."""
    base = split(content.architecture)[1]
    return "topk" if base == "hierarchical_topk" else base


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
    moved = torch.cat([rows.double() @ b_dec for rows in torch.split(tensors["W_enc_T"], _ROWS)])
    moved = moved if is_wanted else -moved
    changed = {"b_enc": tensors["b_enc"].double() + moved}
    if "b_mag" in tensors:
        changed["b_mag"] = tensors["b_mag"].double() + tensors["r_mag"].double().exp() * moved
    return replace(content, tensors=_rounded(tensors, changed), apply_b_dec_to_input=is_wanted)


def norms(W_dec: Tensor) -> Tensor:
    """Return the norms of decoder rows, [d_sae], float64."""
    return torch.cat([rows.double().norm(dim=1) for rows in torch.split(W_dec, _ROWS)])


def are_one(of_rows: Tensor, dtype: torch.dtype) -> bool:
    """Tell whether all norms are 1, as far as a dtype tells it."""
    allowed = UNIT_OF_HALVES if dtype.itemsize == 2 else UNIT
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
    if inner_of(content) not in ("relu", "jump_relu", "gated"):
        if not are_one(of_rows / of_rows.mean(), W_dec.dtype):
            return None
        of_rows = of_rows.mean().expand_as(of_rows)
    return _fitting(content, lambda each: _divided(each, of_rows))


def _divided(content: Content, of_rows: Tensor) -> Content:
    """Return the SAE whose decoder rows are divided by [d_sae] numbers, and its activations multiplied by them."""
    W_dec = content.tensors["W_dec"]
    inverse = of_rows.reciprocal().where(of_rows > 0, 0.0)
    changed = {"W_dec": scaled_rows(W_dec, inverse), "W_enc_T": scaled_rows(content.tensors["W_enc_T"], of_rows)}
    changed["W_dec"][:, 0] += (of_rows == 0).to(W_dec.dtype)
    for name in ("b_enc", "b_mag", "threshold"):
        if name in content.tensors:
            value = content.tensors[name].double()
            changed[name] = torch.where(of_rows > 0, value * of_rows, 0.0) if value.dim() else value * of_rows[0]
    return replace(content, tensors=_rounded(content.tensors, changed))


def _fitting(content: Content, fold: Callable[[Content], Content]) -> Content:
    """Return what a fold makes of an SAE; in float32 where it makes more of it than float16 can tell."""
    folded = fold(content)
    if content.dtype != torch.float16 or _infinite(folded) == _infinite(content):
        return folded
    return fold(replace(content, tensors={name: tensor.float() for name, tensor in content.tensors.items()}))


def _infinite(content: Content) -> int:
    return sum(int(tensor.isinf().sum()) for tensor in content.tensors.values())


def scaled_rows(matrix: Tensor, factors: Tensor) -> Tensor:
    """Return a matrix whose rows are multiplied by [rows] factors, rounded once; some at a time, to save memory."""
    parts = zip(torch.split(matrix, _ROWS), torch.split(factors, _ROWS))
    return torch.cat([(rows.double() * each[:, None]).to(matrix.dtype) for rows, each in parts])


def _rounded(tensors: Mapping[str, Tensor], changed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors, some of them changed, in the dtype that they had."""
    return {name: changed[name].to(each.dtype) if name in changed else each for name, each in tensors.items()}


def refuse_sites(content: Content, title: str, outer: tuple[str, ...] = ()) -> None:
    """Raise ConfigError where an SAE reads or writes more than a format has names for, or normalises tokens.

    Args:
        content: the SAE.
        title: of the format.
        outer: what it holds beside autoencoders.
    """
    own = split(content.architecture)[0]
    if own and own not in outer:
        raise ConfigError(f"{title} holds no {own}: keep it as flashsae, or choose a format that does.")
    if content.normalize_activations != "none":
        raise ConfigError(
            f"{title} has no place for normalize_activations, got {content.normalize_activations!r}: keep it as "
            "flashsae."
        )


def l0_of(content: Content) -> int | None:
    """Return how many latents are active for a token, on average, as far as an SAE tells it; at least 1."""
    settings: Mapping[str, Any] = content.settings
    for value in (settings.get("k"), content.metadata.get("l0"), settings.get("target_l0")):
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf"):
            return min(content.d_sae, max(1, round(value)))
    return None
