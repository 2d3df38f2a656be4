"""How each architecture is measured: the settings, sites and parameters with which about k latents a token are active.

On random data nothing but the k of the size says how many latents are active. What selects by a threshold gets the one
that k of all pre-activations exceed, so that all architectures are measured with the same mean L0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from flashsae.architecture import architecture_named, architecture_of, settings_of

PRE_ACTS_STD = 1.02**0.5  # of unit x minus b_dec of 0.1, along a unit direction, with a bias of 0.1
CROSSCODER_SITES = 3
LEVELS = 5


@dataclass(frozen=True)
class Shape:
    """One size.

    Args:
        name: as it stands in results.
        batch_tokens: tokens, B.
        d_in: width of the activations; of a crosscoder, of all its sites together.
        d_sae: number of latents.
        k: active latents of each token.
    """

    name: str
    batch_tokens: int
    d_in: int
    d_sae: int
    k: int


def tiny(shape: Shape) -> Shape:
    """Return the shape scaled down until a CPU runs it at once; to test the benchmark, not to time anything."""
    return replace(
        shape,
        batch_tokens=32,
        d_in=16 + shape.d_in // 256,
        d_sae=128 + shape.d_sae // 4096,
        k=min(16, 2 + shape.k // 16),
    )


@dataclass(frozen=True)
class Sites:
    """The activations of an architecture, those of all sites beside each other in one tensor.

    Args:
        widths: of each site, in the order in which the architecture names them.
        d_in: width of what is read, which stands first.
        d_out: width of what is written, which stands last.
    """

    widths: Mapping[str, int]
    d_in: int
    d_out: int

    @property
    def transcodes(self) -> bool:
        """Whether other activations are written than are read."""
        return sum(self.widths.values()) > self.d_in

    def batch(self, x: Tensor) -> dict[str, Tensor]:
        """Return the activations by site, views."""
        return dict(zip(self.widths, torch.split(x, list(self.widths.values()), dim=1)))

    def read(self, x: Tensor) -> Tensor:
        """Return what goes in, a view."""
        return x[:, : self.d_in]

    def written(self, x: Tensor) -> Tensor:
        """Return what is to be reconstructed, a view."""
        return x[:, -self.d_out :]


def sites_of(settings: object, shape: Shape) -> Sites:
    """Return the sites of an architecture: each as wide as the size says, those of a crosscoder together."""
    architecture = architecture_of(settings)
    names = architecture.sites or tuple(f"site {number}" for number in range(CROSSCODER_SITES))
    width = shape.d_in if architecture.sites else shape.d_in // CROSSCODER_SITES
    reads, writes = architecture.sites_of(names)
    return Sites(dict.fromkeys(names, width), width * len(reads), width * len(writes))


def arch_settings(arch: object, shape: Shape) -> Any:
    """Return the settings of an architecture at a size.

    Args:
        arch: its settings, or its name: then with the k of the size, if it has such a setting.
        shape: the size.
    """
    if not isinstance(arch, str):
        return arch
    names = {field.name for field in fields(architecture_named(arch).settings)}
    given = {name: value(shape) for name, value in SETTINGS.items() if name in names}
    return settings_of(arch, **given)


def level_prefixes(shape: Shape) -> tuple[int, ...]:
    """Return the prefixes of nested levels, each twice as many latents as the one before; the last are all."""
    return tuple(shape.d_sae >> level for level in reversed(range(LEVELS)))


def base_name(arch: str) -> str:
    """Return the name of the selection of an architecture, which may be composed: jump_relu of transcoder:jump_relu."""
    return arch.rpartition(":")[2]


def threshold(shape: Shape) -> float:
    """Return what k of the d_sae pre-activations of a token exceed, on average."""
    return PRE_ACTS_STD * NormalDist().inv_cdf(1 - shape.k / shape.d_sae)


HELD_BACK = ("relu", "gated")
"""Where all pre-activations above 0 are active, so that b_enc has to hold them back."""
JUMPS = ("jump_relu",)
"""Whose error need not fall: latents jump where they cross their threshold, and no gradient of weights knows of it."""
SLOWER = 1000
"""The learning rate of codes above a threshold is divided by this, so that L0 stays as it is while it is measured."""
SETTINGS: dict[str, Callable[[Shape], Any]] = {"k": lambda shape: shape.k, "target_l0": lambda shape: float(shape.k)}
"""Settings that follow from the size, by name, for every architecture that has them."""


def other_params(settings: object, shape: Shape, params: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters of an architecture beside weights and biases, and b_enc if it is to be another one.

    Args:
        settings: of the architecture.
        shape: the size.
        params: weights and biases, by name.
    """
    architecture, like = architecture_of(settings), params["b_enc"]
    sizes = {"d_in": params["W_enc_T"].shape[1], "d_out": params["W_dec"].shape[1], "d_sae": shape.d_sae}
    made: dict[str, Tensor] = {}
    for row in architecture.parameters:
        start = row.initial
        if row.name in params:
            continue
        made[row.name] = params[start].clone() if isinstance(start, str) else like.new_full(row.sizes(sizes), start)
    base = base_name(architecture.name)
    if base in HELD_BACK:
        made["b_enc"] = like - threshold(shape)
    if base == "gated":
        made["b_mag"] = made["b_enc"].clone()  # gates and magnitudes are alike
    if base == "jump_relu":
        made["threshold"].fill_(threshold(shape))
    return made
