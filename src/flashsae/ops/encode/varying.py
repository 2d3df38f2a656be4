"""Encode with a number of latents that differs between tokens: the largest of a batch, or all above a threshold."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from flashsae.backend import crossover
from flashsae.errors import ConfigError, DtypeError, ShapeError
from flashsae.ops.code import SparseCode
from flashsae.ops.encode.op import as_memory, check_encoder, resolve, shared_code
from flashsae.ops.encode.reference import WORKSPACE_BYTES
from flashsae.ops.gradients import share
from flashsae.ops.pattern import Pattern
from flashsae.ops.validate import (
    Precision,
    as_int,
    check_constant,
    check_device,
    check_float,
    check_k,
    check_noise,
    check_ordinary,
    check_shape,
    compute_dtype,
    has_values,
)

Capacity = int | Literal["any", "full"] | None
"""How many entries a code above a threshold has room for: see `encode_above`."""

_COUNTED = 1 << 28  # pre-activations compared at once: a byte each


def encode_batch_topk(
    x: Tensor,
    W_enc_T: Tensor,
    b_enc: Tensor,
    k: int,
    *,
    b_dec: Tensor | None = None,
    key_scale: Tensor | None = None,
    magnitude: bool = False,
    precision: Precision | None = None,
    workspace_bytes: int = WORKSPACE_BYTES,
    noise: Tensor | None = None,
) -> SparseCode:
    """Encode tokens and keep the B·k largest latents of the whole batch: k a token on average.

        pre_acts = (x - b_dec) @ W_enc_T.T + b_enc;   acts = the B·k largest of all pre_acts

    No nonlinearity is in it: `code.replace(code.acts.relu())` is the code of a BatchTopK SAE.

    Args:
        x, W_enc_T, b_enc, b_dec, key_scale, magnitude, precision, workspace_bytes, noise: as in `encode_topk`; over a
            batch "bf16-int8" runs as "bf16" and "float32-int8" as "float32".
        k: latents to keep for each token on average, 1 <= k <= d_sae.
    Returns:
        the code, of varying length: acts [B·k], float32 (float64 for float64), pre-activations of any sign. Every place
        is used.
    Raises:
        ShapeError, DtypeError, ConfigError: names the argument, what was expected and what came.
        GradientError: key_scale requires a gradient.
    Numerics: as in `encode_topk`. Of equal values the first token wins, then the lowest latent; NaN is the largest.
    Gradients: as in `encode_topk`, through the selected latents.
    Cost: as `encode_topk`; the pre-activations of the batch are never in memory at once. No wait for the device.
    Source: Bussmann et al. 2024, "BatchTopK sparse autoencoders"; selection ours,
        docs/methodology.md#selection-over-a-batch.
    """
    d_sae = check_encoder(x, W_enc_T, b_enc, b_dec, key_scale)
    check_noise(noise, x)
    k, memory = check_k(k, d_sae), as_memory(workspace_bytes)
    if x.shape[0] * k >= 2**31:
        raise ShapeError(f"x: expected fewer than 2**31 latents in all, B · k, got {x.shape[0] * k}: use fewer tokens.")
    acts, latents, starts, *_ = torch.ops.flashsae.encode_batch_topk(
        x, W_enc_T, b_enc, b_dec, key_scale, [k, int(magnitude), *memory], resolve(precision, W_enc_T), noise
    )
    return shared_code(Pattern(latents, d_sae, starts), acts)


def encode_above(
    x: Tensor,
    W_enc_T: Tensor,
    b_enc: Tensor,
    threshold: float | Tensor,
    *,
    b_dec: Tensor | None = None,
    capacity: Capacity = None,
    precision: Precision | None = None,
    workspace_bytes: int = WORKSPACE_BYTES,
    weight_bytes: int = 0,
    noise: Tensor | None = None,
) -> SparseCode:
    """Encode tokens and keep every latent whose pre-activation exceeds a threshold.

        pre_acts = (x - b_dec) @ W_enc_T.T + b_enc;   acts = all pre_acts > threshold

    Args:
        x, W_enc_T, b_enc, b_dec, precision, workspace_bytes, weight_bytes, noise: as in `encode_topk`; above a
            threshold "bf16-int8" runs as "bf16" and "float32-int8" as "float32".
        threshold: a number, a scalar tensor, or [d_sae], one for each latent. Receives no gradient here.
        capacity: how many entries there is room for. None: as many as there are, which the host waits for; a number: no
            wait, and `code.pattern.overflowed` tells whether they were more. Then the first of them in order are there,
            `code.pattern.count` says how many there are, and encoding again with that capacity gives all. A training on
            a GPU needs one. "full": every latent of every token, as `Pattern.full`, whatever its pre-activation; what
            exceeds the threshold is counted. "any": as None, but where so many exceed it that dense products are
            faster, as "full". Whatever follows must then be 0 for values up to the threshold.
    Returns:
        the code, of varying length: acts [capacity], float32 (float64 for float64); 0 in places that are not used.
        A full one: acts [B, d_sae], all pre-activations.
    Raises:
        ShapeError, DtypeError, ConfigError: names the argument, what was expected and what came; no capacity while a
            CUDA graph is captured.
        GradientError: threshold requires a gradient.
    Numerics: as in `encode_topk`: exact selection among the pre-activations. NaN counts as exceeding. A full code needs
        no certificate and no screen: its product is one of float32, tf32 or bf16 as `precision` says.
    Gradients: x, W_enc_T (as a factor, where `collect_factors` asked for it), b_enc and b_dec, through the selected
        latents. Once differentiable.
    Cost: as `encode_topk`.
    Source: ours, docs/methodology.md#selection-over-a-batch.
    """
    d_sae = check_encoder(x, W_enc_T, b_enc, b_dec, None)
    check_noise(noise, x)
    capacity, memory = _as_capacity(capacity, x), as_memory(workspace_bytes, weight_bytes)
    operands = x, W_enc_T, b_enc, b_dec
    thresholds, chosen = _as_thresholds(threshold, x, d_sae), resolve(precision, W_enc_T)
    if capacity == "full":
        acts, *_ = torch.ops.flashsae.pre_acts(*operands, [], chosen)
        return shared_code(Pattern.full(len(x), d_sae, device=x.device, count=_count(acts, thresholds)), acts)
    if capacity == "any" and has_values(x):
        limit = int(crossover(W_enc_T) * len(x) * d_sae)
        flat, latents, starts, *_ = torch.ops.flashsae.encode_any(
            *operands, thresholds, [limit, *memory], chosen, noise
        )  # fmt: skip
        if len(starts):
            return shared_code(Pattern(latents, d_sae, starts), flat)
        pattern = Pattern.full(len(x), d_sae, device=x.device)
        share(pattern, flat)
        acts = flat.view(len(x), d_sae)
        return SparseCode(pattern, acts, pre_acts=acts)
    room = capacity if isinstance(capacity, int) else None
    acts, latents, starts, count, *_ = torch.ops.flashsae.encode_above(
        *operands, thresholds, [-1 if room is None else room, *memory], chosen, noise
    )  # fmt: skip
    return shared_code(Pattern(latents, d_sae, starts, None if room is None else count), acts)


def _as_capacity(capacity: Capacity, x: Tensor) -> Capacity:
    """Return a capacity as it may be here."""
    if capacity is None or isinstance(capacity, str):
        if capacity not in (None, "any", "full"):
            raise ConfigError(f'capacity: expected a number, "any", "full" or None, got {capacity!r}.')
        if capacity != "full" and _is_capturing(x):
            raise ConfigError(
                f"capacity: expected a number while a CUDA graph is captured, as training on a GPU does, got "
                f"{capacity!r}, which waits for the device. Give one where sae.training, of what tokens need and some "
                "more."
            )
        if capacity != "full":
            _check_has_data(x)
        return capacity
    number = as_int("capacity", capacity)
    if not 0 <= number < 2**31:
        raise ConfigError(f"capacity: expected 0 <= capacity < 2**31, or None, got {number}.")
    return number


@torch.no_grad()
def _count(pre_acts: Tensor, thresholds: Tensor) -> Tensor:
    """Return how many pre-activations exceed the thresholds: a scalar, int64, on the device."""
    thresholds, count = thresholds.to(pre_acts.dtype), torch.zeros((), dtype=torch.int64, device=pre_acts.device)
    rows = max(1, _COUNTED // pre_acts.shape[1])
    for first in range(0, len(pre_acts), rows):
        count += pre_acts[first : first + rows].le(thresholds).logical_not_().sum()
    return count


def _check_has_data(x: Tensor) -> None:
    """Raise DtypeError for a stand-in that nothing traces, of which no number of entries can follow."""
    if torch.compiler.is_compiling():
        return
    if x.is_meta or (isinstance(x, FakeTensor) and x.fake_mode.shape_env is None):
        where = "of FakeTensorMode" if isinstance(x, FakeTensor) else "on the device meta"
        raise DtypeError(
            f"x: expected tokens with data, on which it depends how many latents exceed a threshold, got a tensor "
            f"{where}. Give encode_above a capacity, or let torch.compile or torch.export trace real tokens."
        )


def _is_capturing(x: Tensor) -> bool:
    return x.is_cuda and has_values(x) and torch.cuda.is_current_stream_capturing()


def _as_thresholds(threshold: float | Tensor, x: Tensor, d_sae: int) -> Tensor:
    """Return thresholds as [1] or [d_sae]."""
    if isinstance(threshold, int | float):
        return torch.full((1,), float(threshold), dtype=compute_dtype(x.dtype), device=x.device)
    check_ordinary("threshold", threshold)
    if threshold.dim():
        check_shape("threshold", threshold, (d_sae,))
    check_float("threshold", threshold)
    check_device("threshold", threshold, x, "x")
    check_constant("threshold", threshold)
    return threshold.reshape(-1)
