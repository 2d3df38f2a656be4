"""Hierarchical TopK: one SAE for every number of active latents up to k."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import flashsae
from flashsae.architecture import AUTOENCODER, AUXK, NESTED, Architecture
from flashsae.errors import ConfigError
from flashsae.settings.kinds import AtMost, PositiveInt, Range, check_fields

if TYPE_CHECKING:
    from torch import Tensor


def _ascend(budgets: Any) -> bool:
    return all(low < high for low, high in zip((0, *budgets), budgets))


@dataclass(frozen=True)
class HierarchicalTopKSettings:
    """Settings of Hierarchical TopK.

    Args:
        k: Latents active for each token.
        budgets: Numbers of latents to reconstruct from, ascending to k; none for all from 1 to k.
    """

    k: Annotated[PositiveInt, AtMost("d_sae")] = 32
    budgets: Annotated[tuple[int, ...], Range("numbers from 1 on that ascend", _ascend)] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        if self.budgets and self.budgets[-1] != self.k:
            raise ConfigError(f"budgets: expected {self.k} as k for the last one, got {list(self.budgets)}.")


def encode(sae: Any, x: Tensor) -> Any:
    """Return relu(the k largest of (x − b_dec) @ W_enc + b_enc), the largest first."""
    scale = sae.selection_scale
    code = flashsae.ops.encode_topk(
        x, sae.W_enc_T, sae.b_enc, sae.config.arch.k, b_dec=sae.b_pre, key_scale=scale, precision=sae.precision,
        **sae.memory(x),
    )  # fmt: skip
    code = flashsae.ops.by_value(code, key_scale=scale)
    return code.replace(code.acts.relu())


def levels(sae: Any, code: Any) -> dict[str, Any]:
    """Return the budgets."""
    arch = sae.config.arch
    return {"budgets": arch.budgets or range(1, arch.k + 1)}


def at_budget(sae: flashsae.SAE, k: int) -> flashsae.SAE:
    """Return a trained SAE as one of fewer active latents: the same parameters, and codes of the k largest.

    Args:
        sae: of this architecture.
        k: latents active for each token; any number up to that of the training has been trained for, if all budgets
            were.
    Raises:
        ConfigError: it is an SAE of another architecture, or k is out of range.
    """
    if not isinstance(sae.config.arch, HierarchicalTopKSettings):
        raise ConfigError(f"sae: expected one of Hierarchical TopK, got {sae.architecture.title}.")
    arch = replace(sae.config.arch, k=k, budgets=())
    if arch.k > sae.config.arch.k:
        raise ConfigError(f"k: expected at most {sae.config.arch.k}, which the SAE was trained for, got {k}.")
    other = sae.normalizing(sae.config.normalize_activations)  # shares its parameters
    other.config = replace(sae.config, arch=arch)
    return other


ARCHITECTURE = Architecture(
    name="hierarchical_topk",
    title="Hierarchical TopK",
    settings=HierarchicalTopKSettings,
    parameters=AUTOENCODER,
    encode=encode,
    terms=(NESTED, AUXK),
    l0=lambda settings: settings.k,
    most=lambda settings: settings.k,
    scales=True,
    levels=levels,
    level_count=lambda settings: len(settings.budgets) or settings.k,
    source="Balagansky et al. 2025, section 3",
)
"""
    x_hat_j = Σ over the j largest latents i of acts_i · W_dec_i + b_dec
    loss = 1/k Σ over j = 1 ... k of Σ‖x − x_hat_j‖² / (tokens · variance)

or the mean over a list of budgets. In inference k latents; the code has the largest first, so its first j entries are
that of budget j, and `at_budget` makes an SAE of it.
"""
