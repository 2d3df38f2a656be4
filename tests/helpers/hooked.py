"""SAEs in tiny models: what is at a hookpoint, and which hooks there are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flashsae import SAE, SAEConfig
from flashsae.architecture import settings_of

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def sae_of(arch: str = "topk", dtype: torch.dtype = torch.float32, seed: int = 0, **settings: Any) -> SAE:
    """Return a small SAE of an architecture, of activations of width 16, in `eval()` mode."""
    given = {"k": 4} if arch.endswith("topk") else {}
    config = SAEConfig(16, 64, arch=settings_of(arch, **given), **settings)
    return SAE(config, seed=seed, dtype=dtype).eval()


def at_hookpoint(model: nn.Module, hookpoint: str, *inputs: Any, **named: Any) -> Tensor:
    """Return what is at a hookpoint, as any hook sees it."""
    seen: list[Tensor] = []
    handle = model.get_submodule(hookpoint).register_forward_hook(
        lambda module, args, output: seen.append(output if isinstance(output, Tensor) else output[0])
    )
    with torch.no_grad():
        model(*inputs, **named)
    handle.remove()
    return seen[0]


def hooks_of(model: nn.Module) -> list[Any]:
    """Return all hooks that stand in a model."""
    return [each for m in model.modules() for each in (*m._forward_hooks, *m._forward_pre_hooks)]
