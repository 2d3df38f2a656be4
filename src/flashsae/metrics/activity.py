"""Which latents are active, how often, and which are dead."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from flashsae.ops.code import SparseCode


def is_dead(tokens_since_fired: Int[Tensor, " d_sae"], dead_after_tokens: int) -> Bool[Tensor, " d_sae"]:
    """Tell which latents are dead: not active in the last `dead_after_tokens` tokens of training.

    The one definition, of the auxiliary loss, the log and the report.
    """
    return tokens_since_fired >= dead_after_tokens


def count_active(counts: Int[Tensor, " d_sae"], code: SparseCode) -> Int[Tensor, " d_sae"]:
    """Add to `counts`, in place, on how many tokens each latent is active: on those where its value is not 0.

    A latent that was selected with 0 is not active, and neither is a place of the code that is not used. Values below 0
    are activity of a code with signs; behind a ReLU there are none. No wait for the device.

    Args:
        counts: int64.
        code: of some tokens.
    """
    if code.pattern.is_full:
        return counts.add_((code.acts != 0).sum(0))
    latents, is_active = _places(code)
    return counts.scatter_add_(0, latents, is_active.long())


def active_entries(code: SparseCode) -> tuple[Tensor, Tensor, Tensor]:
    """Return token, latent and value of each active entry of a code: [n] each, by token. Waits for the device."""
    if code.pattern.is_full:
        tokens, latents = (code.acts != 0).nonzero().unbind(1)
        return tokens, latents, code.acts[tokens, latents]
    latents, is_active = _places(code)
    active = is_active.nonzero()[:, 0]
    return code.pattern.tokens[active].long(), latents[active], code.acts.flatten()[active]


def _places(code: SparseCode) -> tuple[Tensor, Tensor]:
    """Return latent of every place of a code, flat, and whether it is active there; the last where none is used."""
    latents, is_active = code.pattern.latents.flatten().long(), (code.acts != 0).flatten()
    if code.pattern.k is not None:
        return latents, is_active
    return latents.clamp_max(code.d_sae - 1), is_active & (latents < code.d_sae)


class LatentActivity:
    """How often each latent is active (value other than 0), and so L0 of a set.

    Args:
        d_sae: number of latents.
        device: where codes come from.
    """

    def __init__(self, d_sae: int, device: torch.device | str = "cpu") -> None:
        self._fired = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self._tokens = 0

    def update(self, code: SparseCode) -> None:
        """Add the code of a batch."""
        count_active(self._fired, code)
        self._tokens += code.pattern.B

    @property
    def tokens(self) -> int:
        """Tokens seen."""
        return self._tokens

    def latent_density(self) -> Tensor:
        """Return the fraction of tokens on which each latent is active: [d_sae], float64."""
        return self._fired.double() / max(self._tokens, 1)

    def l0(self) -> float:
        """Return the mean number of active latents a token."""
        return self._fired.sum().item() / max(self._tokens, 1)


def direction_recovery(W_dec: Tensor, directions: Tensor, cosine: float = 0.95) -> float:
    """Return the fraction of known directions that some decoder row matches.

    Args:
        W_dec: [d_sae, d_in].
        directions: [n, d_in], the ground truth.
        cosine: a direction counts as recovered if its largest cosine with a row of W_dec is above this.
    """
    rows = torch.nn.functional.normalize(W_dec.detach().double(), dim=1)
    truth = torch.nn.functional.normalize(directions.double().to(rows.device), dim=1)
    return (truth @ rows.T).amax(1).gt(cosine).double().mean().item()
