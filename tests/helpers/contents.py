"""SAEs as values, at random."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from flashsae import SAE, SAEConfig
from flashsae.architecture import settings_of
from flashsae.formats.content import Content


def random_content(
    architecture: str,
    d_in: int = 7,
    d_sae: int = 19,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    metadata: dict[str, Any] | None = None,
    **settings: Any,
) -> Content:
    """Return an SAE of an architecture with no parameter at its initial value; thresholds are positive."""
    sae = SAE(SAEConfig(d_in, d_sae, arch=settings_of(architecture, **settings)), seed=seed, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    rows = [row for row in sae.architecture.parameters if row.saved]
    tensors = {}
    for row in rows:
        values = torch.randn(sae.state_dict()[row.name].shape, generator=generator, dtype=torch.float64)
        tensors[row.name] = (values.abs() / 2 if "threshold" in row.name else values).to(dtype)
    return Content(
        sae.architecture.name, asdict(sae.config.arch), tensors, sae.architecture.subtracts_b_dec,
        metadata=metadata or {},
    )  # fmt: skip
