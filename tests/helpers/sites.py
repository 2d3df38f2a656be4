"""Architectures like those of others, with TopK as their selection: registered by being imported."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

import flashsae
from flashsae import Parameter
from flashsae.architecture import AUTOENCODER
from flashsae.architectures.topk import ARCHITECTURE as TOPK
from flashsae.architectures.topk import TopKSettings


@dataclass(frozen=True)
class BridgeSettings(TopKSettings):
    """Settings of a transcoder.

    Args:
        k: Latents active for each token.
    """


@dataclass(frozen=True)
class MoreSettings(TopKSettings):
    """Settings of an SAE with more weights than others.

    Args:
        k: Latents active for each token.
    """


def encode(sae: Any, x: Tensor) -> Any:
    code = flashsae.ops.encode_topk(x, sae.W_enc_T, sae.b_enc, sae.config.arch.k, b_dec=sae.b_pre)
    return code.replace(code.acts.relu())


def register() -> None:
    """Make them known, to one test: a transcoder from before to after, and an SAE with more weights."""
    rows = {row.name: row for row in AUTOENCODER}
    reading = replace(rows["W_enc_T"], initial="unit_rows")
    bridge = replace(
        TOPK, name="bridge", title="Bridge", settings=BridgeSettings, encode=encode,
        parameters=tuple({**rows, "W_enc_T": reading}.values()),
        reads=("before",), writes=("after",), subtracts_b_dec=False,
    )  # fmt: skip
    more = (
        Parameter("W_gate_T", ("d_sae", "d_in"), "gates", "W_dec"),
        Parameter("W_skip", ("d_out", "d_in"), "skip", "unit_rows"),
    )
    flashsae.register(bridge)
    flashsae.register(
        replace(TOPK, name="more", title="More", settings=MoreSettings, parameters=(*rows.values(), *more))
    )
