"""Which level of nested reconstructions each entry of a code belongs to: the first one that holds it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flashsae.errors import ConfigError, DtypeError, ShapeError
from flashsae.ops.code import SparseCode
from flashsae.ops.pattern import Pattern
from flashsae.ops.validate import as_int, check_constant, check_device, check_float, check_shape, has_values, packed


@dataclass(frozen=True)
class Levels:
    """A code of B tokens whose entries are in the order of their levels.

    Args:
        code: the code.
        lists: its latents; the row of each place, token · L + level, ascending, B·L where it is not used: [capacity],
            int32; and where each row starts, [B·L + 1], int32. Of a full code the level of each latent alone, [d_sae],
            int32.
        weights: [L], float64, on the device of the code.
    """

    code: SparseCode
    lists: list[Tensor]
    weights: Tensor


def levels_of(
    code: SparseCode,
    prefixes: Sequence[int] | Tensor | None,
    budgets: Sequence[int] | None,
    weights: Sequence[float] | Tensor | None,
) -> Levels | None:
    """Return the levels that `decode_loss` is asked for; None for one of all latents, which is nothing special.

    Raises:
        ConfigError, ShapeError, DtypeError, GradientError: numbers do not ascend to what there is, or weights do not
            fit.
    """
    if prefixes is not None and budgets is not None:
        raise ConfigError("prefixes and budgets: expected one of them, got both.")
    if prefixes is None and budgets is None:
        if weights is not None:
            raise ConfigError("level_weights: expected prefixes or budgets, whose losses they weight, got neither.")
        return None
    L = _count(code, prefixes, budgets)
    if L == 1 and weights is None:
        return None
    if prefixes is not None and not _ascends(code.pattern):
        code = _by_latent(code)
    pattern = code.pattern
    if pattern.B * L >= 2**31:
        raise ShapeError(f"levels: expected fewer than 2**31 for all tokens together, got {pattern.B * L}.")
    numbers, limits = pattern.latents, budgets if prefixes is None else prefixes
    is_same = pattern.is_full or budgets is not None  # for all tokens
    if is_same:
        numbers = torch.arange(numbers.shape[1], dtype=numbers.dtype, device=numbers.device)
    if is_same and len(numbers) == L:  # a level each
        level = numbers.to(torch.int32)
    else:
        if not isinstance(limits, Tensor):
            limits = _constant(limits or (), torch.int64, numbers.device)
        # those from the last limit on are of the last level, if there can be any
        numbers, limits = packed(numbers, limits[:-1].to(numbers.dtype))
        level = torch.searchsorted(limits, numbers, right=True, out_int32=True)
    lists = [level] if pattern.is_full else [pattern.latents, *_rows(pattern, level, L)]
    return Levels(code, lists, _as_weights(weights, L, code))


def _count(code: SparseCode, prefixes: Sequence[int] | Tensor | None, budgets: Sequence[int] | None) -> int:
    """Return how many levels there are, after a look at their numbers."""
    name, given, last = "prefixes", prefixes, code.d_sae
    what = f"ascending numbers of latents, the last {last} as d_sae"
    if budgets is not None:
        if code.pattern.k is None:
            raise ConfigError("budgets: expected a code of k latents for each token, got one whose tokens differ.")
        name, given, last = "budgets", budgets, code.pattern.k
        what = f"ascending numbers of entries, the last {last} as k"
    if isinstance(given, Tensor):
        check_shape(name, given, ("L",))
        if name == "budgets" or given.dtype not in (torch.int32, torch.int64):
            raise DtypeError(f"{name}: expected {'int32 or int64' if name == 'prefixes' else 'ints'}, got a tensor.")
        check_device(name, given, code.acts, "code")
        if given.device.type != "cpu" or not has_values(given):
            return _at_least_one(name, what, given.shape[0])
        given = given.tolist()
    assert given is not None
    numbers = [as_int(name, number) for number in given]
    rises = all(low < high for low, high in zip([0, *numbers], numbers))
    if not numbers or not rises or numbers[-1] != last:
        raise ConfigError(f"{name}: expected {what}, got {numbers}.")
    return len(numbers)


def _at_least_one(name: str, what: str, L: int) -> int:
    if L == 0:
        raise ConfigError(f"{name}: expected {what}, got [].")
    return L


def _ascends(pattern: Pattern) -> bool:
    """Tell whether latents of each token are known to ascend. On the CPU the numbers tell."""
    if pattern.starts is not None or pattern.is_full:
        return True
    if pattern.latents.device.type == "cpu" and has_values(pattern.latents):
        return bool((pattern.latents.diff() >= 0).all())
    return pattern.ascends


def _by_latent(code: SparseCode) -> SparseCode:
    """Return the code with the latents of each token in ascending order; differentiable."""
    latents, order = torch.sort(code.pattern.latents, dim=1, stable=True)
    return SparseCode(Pattern(latents, code.d_sae, ascends=True), code.acts.gather(1, order), code.batch_shape)


def _rows(pattern: Pattern, level: Tensor, L: int) -> tuple[Tensor, Tensor]:
    """Return the row of each place, and where each starts; `level` is that of each place, or [k], of every token."""
    B, k, device = pattern.B, pattern.k, pattern.latents.device
    if k is None:
        rows = (pattern.tokens * L + level).clamp_max(B * L)
        numbers = torch.arange(B * L + 1, dtype=torch.int32, device=device)
        return rows, torch.searchsorted(rows, numbers, out_int32=True)
    token = torch.arange(B, dtype=torch.int32, device=device)[:, None]
    numbers = torch.arange(L, dtype=torch.int32, device=device).expand(*level.shape[:-1], L).contiguous()
    starts = (token * k + torch.searchsorted(level, numbers, out_int32=True)).reshape(-1)
    return (token * L + level).reshape(-1), F.pad(starts, (0, 1), value=B * k)


def _as_weights(weights: Sequence[float] | Tensor | None, L: int, code: SparseCode) -> Tensor:
    """Return weights of levels: [L], float64."""
    device = code.acts.device
    if weights is None:
        return torch.full((L,), 1 / L, dtype=torch.float64, device=device)
    if isinstance(weights, Tensor):
        check_shape("level_weights", weights, (L,))
        check_float("level_weights", weights)
        check_device("level_weights", weights, code.acts, "code")
        check_constant("level_weights", weights)
        return weights.detach().double()
    numbers = [float(weight) for weight in weights]
    if len(numbers) != L or not all(math.isfinite(number) for number in numbers):
        raise ConfigError(f"level_weights: expected {L} finite numbers, one a level, got {numbers}.")
    return _constant(numbers, torch.float64, device)


_CONSTANTS: dict[tuple[object, ...], Tensor] = {}


def _constant(numbers: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return numbers on a device: copied there once, since no copy from the host is allowed in a captured graph.

    They stay for good: a graph may read them.
    """
    key = (*numbers, dtype, device)
    if device.type == "cpu" or key not in _CONSTANTS:
        with torch.inference_mode(False):
            tensor = torch.tensor(list(numbers), dtype=dtype, device=device)
        if device.type == "cpu" or not has_values(tensor):
            return tensor
        _CONSTANTS[key] = tensor
    return _CONSTANTS[key]
