"""The entries of a token in the order of their values."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from flashsae.errors import ConfigError
from flashsae.ops.code import SparseCode, check_code
from flashsae.ops.encode import per_latent
from flashsae.ops.pattern import Pattern


def by_value(code: SparseCode, *, key_scale: Tensor | None = None, magnitude: bool = False) -> SparseCode:
    """Put the entries of each token in descending order of value, so that the first j of them are its j largest.

        acts[b] = sort(acts[b], descending), latents alike

    Args:
        code: of k latents for each token.
        key_scale: [d_sae], float: go by acts * key_scale; values are not scaled. None: 1 each.
        magnitude: go by the absolute values; signs stay.
    Returns:
        the same code: the same latents with the same values and pre_acts, in another order. Of equal values the lowest
        latent comes first, NaN before all others. So the first j entries are those that `encode_topk` selects with j in
        place of k, where the code came from there as it is, by the same keys.
    Raises:
        ConfigError: tokens have different numbers of latents.
        ShapeError, DtypeError: key_scale does not fit.
    Numerics: nothing is computed, only moved; -0 equals 0. Two runs give the same bits. No wait for the device.
    Gradients: acts. Which comes first has none.
    Cost: a sort of B·k numbers within tokens; two where latents are not known to ascend. Both orders share the sort
        that the index takes.
    Source: ours.
    """
    check_code(code)
    if code.pattern.k is None:
        raise ConfigError("code: expected the same number of latents for every token, got a code of varying length.")
    keys = code.acts.detach()
    if key_scale is not None:
        keys = keys * per_latent(key_scale.detach(), code.pattern)
    order = _descending(code.pattern, keys.abs() if magnitude else keys)
    acts = code.acts.gather(1, order)
    pre_acts: Tensor | None = acts
    if code.pre_acts is not code.acts:
        pre_acts = None if code.pre_acts is None else code.pre_acts.gather(1, order)
    return replace(code, pattern=code.pattern.in_order(order), acts=acts, pre_acts=pre_acts)


def _descending(pattern: Pattern, keys: Tensor) -> Tensor:
    """Return for each place of the new order the old one: [B, k], int64."""
    by_latent = None if pattern.ascends else pattern.latents.sort(dim=1, stable=True).indices
    if by_latent is not None:
        keys = keys.gather(1, by_latent)
    keys = torch.where(keys.isnan(), torch.nan, keys + 0.0)  # a NaN with a sign, and -0, are nothing of their own
    order = keys.sort(dim=1, descending=True, stable=True).indices
    return order if by_latent is None else by_latent.gather(1, order)
