"""Dead latents: those that were active on none of so many tokens. Counting and reviving them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from flashsae import distributed, ops
from flashsae.errors import ConfigError
from flashsae.metrics import count_active, is_dead
from flashsae.sae.module import SAE
from flashsae.settings.training import AuxK
from flashsae.shapes import Activations

PERIOD = 16
"""Steps between two looks of the host at how many latents are dead, at most, where looking would make it wait."""

LEAST_RESIDUAL = 1e-3
"""Of the variance: a residual of less counts as this much, so that a batch met exactly cannot blow up the loss."""

_NEVER = -1e30  # bias of a row that stands for no latent: never above 0


class DeadRows(NamedTuple):
    """The dead latents in a table of fixed size.

    Args:
        latents: [capacity], int64: the dead latents, ascending; 0 in rows that are left over.
        is_dead: [capacity], bool: False in rows that are left over.
        slots: [d_sae], int32: row of each latent, -1 for the living.
    """

    latents: Int[Tensor, " capacity"]
    is_dead: Bool[Tensor, " capacity"]
    slots: Int[Tensor, " d_sae"]


@dataclass
class Bounds:
    """What is known of how many latents can be dead. A resumed run must go by the same.

    Args:
        now: for the steps that are done now.
        next: for the steps behind these.
        capacity: rows of the table.
    """

    now: int
    next: int
    capacity: int


class DeadLatents:
    """Count for each latent the tokens since it was last active. Selected with the value 0 does not count as active.

    Args:
        d_sae: number of latents.
        after_tokens: a latent is dead after this many tokens without a value other than 0.
        device: where codes come from.
    """

    def __init__(self, d_sae: int, after_tokens: int, device: torch.device | str = "cpu") -> None:
        self.tokens_since_fired = torch.zeros(d_sae, dtype=torch.int64, device=device)
        """[d_sae], int64."""
        self.bounds: Bounds | None = None
        """What `capacity` goes by on a GPU; None before its first call."""
        self._after_tokens = after_tokens
        self._pending: Tensor | None = None
        self._is_read: torch.cuda.Event | None = None

    def update(self, code: ops.SparseCode) -> Tensor:
        """Count the tokens of a step. Exact to the batch; no wait for the device.

        Returns:
            [d_sae], int64: on how many tokens of the batch each latent was active.
        """
        active_on = distributed.summed(count_active(torch.zeros_like(self.tokens_since_fired), code))
        self.tokens_since_fired.add_(distributed.tokens_of(code.pattern.B)).mul_(active_on == 0)
        return active_on

    def mask(self) -> Tensor:
        """Return which latents are dead: [d_sae], bool."""
        return is_dead(self.tokens_since_fired, self._after_tokens)

    def rows(self, capacity: int) -> DeadRows:
        """Return a table of the dead latents, which must be no more than `capacity`; no wait for the device.

        Raises:
            ConfigError: capacity is 0.
        """
        if capacity < 1:
            raise ConfigError(
                "capacity: expected at least 1, got 0. No latent can be dead then: leave out what needs them."
            )
        dead = self.mask()
        place = dead.cumsum(0, dtype=torch.int32) - 1
        slots = torch.where(dead, place, -1)
        numbers = torch.arange(len(dead), dtype=torch.int64, device=dead.device)
        latents = torch.zeros(capacity + 1, dtype=torch.int64, device=dead.device)
        latents.scatter_(0, torch.where(dead, place, capacity).long(), numbers)
        is_dead = torch.arange(capacity, dtype=torch.int64, device=dead.device) <= place[-1]
        return DeadRows(torch.where(is_dead, latents[:capacity], 0), is_dead, slots)

    def capacity(self, step: int, batch_tokens: int) -> int:
        """Return a number that the dead latents of this step do not exceed, without a wait for a GPU.

        On the CPU it is their number. On a GPU it is bounded by how many can be dead at most within the next steps,
        counted every so many steps and read as many later: few where `after_tokens` are few steps, or nearly all could
        be dead by then. Rounded up, and lowered every PERIOD steps only, so that shapes seldom change.

        Args:
            step: counting from 0; to be called at every step.
            batch_tokens: tokens in a step.
        """
        if self.tokens_since_fired.device.type == "cpu":
            return int(self.mask().sum())
        return self._bounded_capacity(step, batch_tokens)

    def _bounded_capacity(self, step: int, batch_tokens: int) -> int:
        # looking ahead 2 · period steps is then looking ahead a sixteenth of after_tokens at most, if it can be so few
        period = max(1, min(PERIOD, self._after_tokens // (32 * batch_tokens)))
        if self.bounds is None:
            now = int(self._count_within(2 * period * batch_tokens))
            self.bounds = Bounds(now, now, 0)
        if step % period == 0:
            self.finish_reading()
            soon = self._count_within(2 * period * batch_tokens)
            self.bounds.now = self.bounds.next
            self._pending = torch.empty((), dtype=torch.int64, device="cpu", pin_memory=soon.is_cuda).copy_(
                soon, non_blocking=True
            )
            if soon.is_cuda:
                self._is_read = torch.cuda.Event()  # type: ignore[no-untyped-call]
                self._is_read.record()
        needed = _rounded_up(self.bounds.now, len(self.tokens_since_fired))
        if needed > self.bounds.capacity or step % PERIOD == 0:
            self.bounds.capacity = needed
        return self.bounds.capacity

    def finish_reading(self) -> None:
        """Wait for a count that is on its way, so that `bounds` holds it."""
        if self._pending is not None and self.bounds is not None:
            if self._is_read is not None:
                self._is_read.synchronize()
            self.bounds.next = int(self._pending)
            self._pending = None

    def _count_within(self, tokens: int) -> Tensor:
        """Return how many latents can be dead after so many more tokens at most."""
        return (self.tokens_since_fired >= self._after_tokens - tokens).sum()


def auxk_loss(
    sae: SAE,
    x: Activations,
    decoded: ops.DecodeLoss,
    token_weights: Float[Tensor, " B"],
    dead: DeadRows,
    k_aux: int,
    *,
    form: AuxK = "gao",
    target: Float[Tensor, "B d_out"] | None = None,
) -> Float[Tensor, ""]:
    """Compute how badly dead latents explain what the living ones left over.

        gao                 Σ‖e − ê‖² / Σ‖e‖²
        sae_lens            s · Σ‖e − ê‖² / (B · variance), ê of pre-activations, which may be negative
        dictionary_learning Σ‖e − ê‖² / Σ‖e − mean e‖²
        sparsify            s · Σ‖e − ê‖² / Σ‖target − mean target‖²

    e is the residual. ê is the reconstruction from the k_aux largest dead latents of each token, all where there are
    fewer, without b_dec; of relu(pre-activations) but where it is said. Where codes have signs, from the dead latents
    that are largest by magnitude, with their signs. s = min(dead latents / k_aux, 1). Means are over the batch.

    Args:
        sae: whose latents are dead.
        x: [B, d_in].
        decoded: of x and its code, with these weights; no gradient flows into it.
        token_weights: [B], all equal, from `flashsae.sae.fvu_weights`.
        dead: the dead latents; their rows are all that is read or changed.
        k_aux: dead latents to use for each token. The libraries take d_in / 2.
        form: whose formula.
        target: [B, d_out], what is reconstructed; None is x. Read by sparsify alone.
    Returns:
        scalar; 0 if no latent is dead. To be weighted by auxk_alpha: 1/32, and 1 for sae_lens.

        The first term of our loss is Σ‖e‖² / (B · variance). That of SAELens and of dictionary_learning is Σ‖e‖² / B,
        `variance` times as much: of SAELens the whole loss is, so that its coefficient is auxk_alpha here, and
        dictionary_learning with 1/32 weighs as auxk_alpha = 1 / (32 · variance) does, with the variance of a token in
        the unit that it trains in, about 1 where it normalises. That of sparsify is Σ‖e‖² / Σ‖target − mean target‖²,
        which is ours on average: its auxk_alpha is ours.
    Gradients: W_dec, W_enc_T and b_enc at dead latents, and b_dec. (sparsify itself trains the decoder only: its
        backward pass drops the gradient of pre-activations. That is no part of its formula, and is not reproduced.)
    Numerics: denominators are no less than a thousandth of the variance of the sample, times B: no batch can make one
        vanish. That of gao is the loss of all latents, in the same unit as the numerator, and so costs nothing.
    Cost: as `encode_topk` and `decode_loss` with as many latents as the table has rows.
    Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders", appendix A.2, which leaves the normalisation
        open: in gao it is the squared residual of the batch. SAELens 6.54 (TopKTrainingSAE), dictionary_learning 0.1
        (AutoEncoderTopK's trainer) and sparsify 1.3 (SparseCoder).
    """
    W_enc_T, W_dec = (ops.take_rows(W, dead.latents, dead.slots) for W in (sae.W_enc_T, sae.W_dec))
    b_enc, k, signed = sae.b_enc.index_select(0, dead.latents), min(k_aux, len(dead.latents)), sae.architecture.signed
    # rows that stand for no latent come last; they may be selected all the same, and give nothing then
    scale = dead.is_dead.float() if signed else None
    if sae.selection_scale is not None:
        of_dead = sae.selection_scale.index_select(0, dead.latents)
        scale = of_dead if scale is None else of_dead * scale
    b_enc = b_enc if signed else torch.where(dead.is_dead, b_enc, _NEVER)
    code = ops.encode_topk(
        x, W_enc_T, b_enc, k,
        b_dec=sae.b_pre, key_scale=scale, magnitude=signed, precision=sae.precision, noise=sae.noise,
    )  # fmt: skip
    if signed or form == "sae_lens":
        code = code.replace(code.acts * ops.per_latent(dead.is_dead.to(code.acts.dtype), code.pattern))
    else:
        code = code.replace(code.acts.relu())
    residual = decoded.residual.detach()
    missed = ops.decode_loss(code, W_dec, None, residual, token_weights=token_weights, precision=sae.precision).loss
    if form in ("sae_lens", "sparsify"):
        missed = missed * (dead.is_dead.sum(dtype=missed.dtype) / k_aux).clamp_max(1.0)
    if form == "gao":
        missed = missed / decoded.level_losses[-1].clamp_min(LEAST_RESIDUAL)
    elif form != "sae_lens":
        spread = _spread(residual if form == "dictionary_learning" else x if target is None else target, token_weights)
        missed = missed / spread.clamp_min(LEAST_RESIDUAL)
    return missed * dead.is_dead[0]


def _spread(tokens: Tensor, token_weights: Tensor) -> Tensor:
    """Return Σ weight · ‖token − mean‖², summed over tokens in float64: a gradient is divided by it."""
    wide = tokens.detach().to(token_weights.dtype)
    squares = (wide - wide.mean(0)).square().sum(1)
    return (squares.double() @ token_weights.double()).to(token_weights.dtype)


def _rounded_up(count: int, largest: int) -> int:
    """Return a multiple of an eighth of the power of two below, at least of 16."""
    step = max(16, 1 << max(0, count.bit_length() - 4))
    return min(largest, -(-count // step) * step)
