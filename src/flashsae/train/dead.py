"""Dead latents: those that no token has given a value above zero for a number of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from flashsae.metrics import count_active
from flashsae.shapes import TopActs, TopIndices


class DeadLatents:
    """Count for each latent the tokens since it was last active. Selected with the value 0 does not count as active.

    Args:
        d_sae: number of latents.
        after_tokens: a latent is dead after this many tokens without a value above 0.
        device: where codes come from.
    """

    def __init__(self, d_sae: int, after_tokens: int, device: torch.device | str = "cpu") -> None:
        self.tokens_since_fired = torch.zeros(d_sae, dtype=torch.int64, device=device)
        """[d_sae], int64."""
        self._after_tokens = after_tokens

    def update(self, top_acts: TopActs, top_indices: TopIndices) -> None:
        """Count the tokens of a step: both [B, k]. Exact to the batch; no wait for the device."""
        fired = count_active(torch.zeros_like(self.tokens_since_fired), top_acts, top_indices)
        self.tokens_since_fired.add_(len(top_acts)).mul_(fired == 0)

    def mask(self) -> Tensor:
        """Return which latents are dead: [d_sae], bool."""
        return self.tokens_since_fired >= self._after_tokens
