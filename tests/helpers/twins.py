"""Two SAEs that are alike, but for their gradients: those of the one are factors, those of the other ordinary."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from flashsae import SAE, SAEConfig
from flashsae.ops import FactoredGradient
from flashsae.optim import ADAM_EPS, FactoredAdam

D, N, K, B, LR = 16, 40, 3, 6, 1e-2  # so many latents that a factor takes less memory than numbers
F64 = torch.float64
MATRICES = ("W_enc_T", "W_dec")


def make_sae(dtype: torch.dtype = F64) -> SAE:
    return SAE(SAEConfig(D, N, K), seed=1, dtype=dtype)


def make_x(number: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(B, D, generator=torch.Generator().manual_seed(number), dtype=F64).to(dtype)


def loss_of(sae: SAE, x: Tensor) -> Tensor:
    return sae.decode_loss(sae.encode(x), x).loss / x.numel()


def numbers(gradient: Tensor | None) -> Tensor:
    """Return a gradient as an ordinary tensor, whatever it was."""
    assert gradient is not None
    return gradient + 0


class Twins:
    """`ours`, whose gradients are factors, and `theirs`, and an optimiser of each. Iterating gives both."""

    def __init__(self, dtype: torch.dtype = F64) -> None:
        self.dtype = dtype
        self.ours, self.theirs = make_sae(dtype), make_sae(dtype)
        self.optimizer = FactoredAdam(self.ours.parameters(), LR)
        self.adam = torch.optim.Adam(self.theirs.parameters(), LR, eps=ADAM_EPS)

    def __iter__(self) -> Iterator[SAE]:
        return iter((self.ours, self.theirs))

    def backward(self, number: int = 0) -> None:
        """Add the gradients of a batch to those that are there."""
        for sae in self:
            loss_of(sae, make_x(number, self.dtype)).backward()

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Return the gradients of both weight matrices: as factors, and the same as an ordinary tensor."""
        grads = [[sae.get_parameter(name).grad for sae in self] for name in MATRICES]
        return [(ours, theirs) for ours, theirs in grads if ours is not None and theirs is not None]

    def gradients(self) -> list[Tensor]:
        """Return the gradients of both weight matrices of both."""
        return [gradient for pair in self.pairs() for gradient in pair]

    def step(self) -> None:
        """Do a step of Adam on both."""
        self.optimizer.step()
        self.adam.step()

    def assert_factored(self) -> None:
        """Assert that no numbers of our gradients were asked for."""
        for gradient, _ in self.pairs():
            assert isinstance(gradient, FactoredGradient)
            assert gradient.factors is not None

    def assert_same(self) -> None:
        """Assert that parameters and gradients of both are the same; kernels compute in float32, to fewer digits."""
        assert_same_sae(self.ours, self.theirs)


def assert_same_sae(ours: SAE, theirs: SAE) -> None:
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters()):
        digits = {"rtol": 1e-9, "atol": 1e-12} if mine.dtype == F64 else {"rtol": 1e-4, "atol": 1e-6}
        torch.testing.assert_close(mine.detach(), other.detach(), **digits, msg=lambda m, n=name: f"{n}: {m}")
        if mine.grad is not None or other.grad is not None:
            torch.testing.assert_close(numbers(mine.grad), other.grad, **digits)
