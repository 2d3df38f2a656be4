"""A first look at what the hookpoints of a model give, before anything is made of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flashsae.errors import ConfigError, FlashSAEError
from flashsae.lm.capture import DidNotRunError
from flashsae.lm.hooked import HookedModel
from flashsae.lm.hookpoints import is_input, module_of
from flashsae.lm.weights import Trace
from flashsae.lm.windows import TokenBatch
from flashsae.natural import in_order


@contextmanager
def traced(model: nn.Module) -> Iterator[tuple[set[nn.Module], set[nn.Module]]]:
    """Yield the modules that begin to run and those that end, while they do."""
    entered: set[nn.Module] = set()
    completed: set[nn.Module] = set()
    hooks = []
    for module in model.modules():
        hooks.append(module.register_forward_pre_hook(lambda module, args: entered.add(module)))
        hooks.append(module.register_forward_hook(lambda module, args, output: completed.add(module)))
    try:
        yield entered, completed
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class Seen:
    """What a first look at a model shows.

    Args:
        widths: of the activations, by hookpoint.
        dtype: of the activations.
        trace: which modules had a part in them.
    """

    widths: dict[str, int]
    dtype: torch.dtype
    trace: Trace


def look(model: HookedModel, batch: TokenBatch, name: str) -> Seen:
    """Run a model on two windows of full length, to learn now what would go wrong after hours.

    Args:
        model: to run.
        batch: two windows of the same tokens in another order.
        name: of the model, for messages.
    Raises:
        ConfigError: the model cannot read them, or a hookpoint does not give a vector for each token.
    """
    try:
        with traced(model.model) as (entered, completed):
            outputs = model(batch.ids, batch.attention)
    except DidNotRunError as error:
        instead = _around(model, error.hookpoints[0], batch) or _that_ran(model, completed)
        raise (DidNotRunError(error.hookpoints, instead) if instead else error) from None
    except FlashSAEError:
        raise
    except Exception as error:  # whatever a model raises that wants other inputs or has fewer positions
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
        raise ConfigError(
            f"model: {name} cannot read {batch.ids.shape[1]} tokens of text ({type(error).__name__}: {reason}). Try a "
            "smaller context_length, or name a model that reads text alone."
        ) from error
    for hookpoint, output in outputs.items():
        _check_output(model, hookpoint, output, batch)
        chosen = batch.keep if bool(batch.keep.any()) else batch.attention.bool()
        if not bool(output[chosen.to(output.device)].isfinite().all()):
            raise ConfigError(never_finite(name, hookpoint, output.dtype))
    hooked = frozenset(map(model.module_at, model.hookpoints))
    # a module whose input was the last thing needed was called, and did nothing
    entered -= {module for module in hooked - completed if not entered.intersection(module.children())}
    return Seen(
        {hookpoint: int(output.shape[2]) for hookpoint, output in outputs.items()},
        next(iter(outputs.values())).dtype,
        Trace(model.model, hooked, frozenset(entered), frozenset(completed)),
    )


def check_apart(model: HookedModel, batch: TokenBatch, name: str) -> None:
    """Raise ConfigError unless documents of one input are read as if each stood alone, where positions begin again.

    Args:
        model: to run.
        batch: two windows of full length; the second half of the first is read behind its first half, and alone.
        name: of the model, for messages.
    """
    ids = batch.ids[:1]
    half = ids.shape[1] // 2
    place = torch.arange(ids.shape[1], dtype=torch.int64, device="cpu")[None]
    advice = "Leave it out, so that documents see those before them, or leave out --pack."
    if not half or not model.takes_positions:
        raise ConfigError(f"pack_apart: {name} cannot be told where a document begins in an input. {advice}")
    positions = torch.where(place < half, place, place - half)
    others = torch.cat([ids[:, :half].roll(1, 1), ids[:, half:]], dim=1)  # the same tokens before it, in another order
    packed, beside = (model(each, torch.ones_like(ids), position_ids=positions) for each in (ids, others))
    alone = model(ids[:, half:], torch.ones_like(ids[:, half:]), position_ids=place[:, : ids.shape[1] - half])
    for hookpoint, acts in alone.items():
        found, other = (each[hookpoint][:, half:].float() for each in (packed, beside))
        norm, rounding = acts.float().norm(), _ROUNDING.get(acts.dtype, _ROUNDING_OF_HALF)
        # what is masked counts as exactly 0, whatever it is
        if bool((found - other).norm() > 1e-7 * norm) or not bool((found - acts.float()).norm() <= rounding * norm):
            raise ConfigError(
                f"pack_apart: in {name} documents of one input see each other at {hookpoint}, wherever their positions "
                f"begin. {advice}"
            )


_ROUNDING, _ROUNDING_OF_HALF = {torch.float32: 1e-3, torch.float64: 1e-3}, 0.03
"""Of the norm of activations: what another order of sums may make of them, by dtype."""


def never_finite(name: str, hookpoint: str, dtype: torch.dtype) -> str:
    """Return what to say of a model that gives no finite numbers, whatever it reads."""
    half = "" if dtype == torch.float32 else ", or read in float32, as on the CPU (device cpu)"
    return (
        f"model: {name} gives NaN or Inf at {hookpoint} whatever it reads: its weights hold such, or overflow in "
        f"{dtype}. Load whole weights, or choose an earlier hookpoint{half}."
    )


def _check_output(model: HookedModel, hookpoint: str, output: Tensor, batch: TokenBatch) -> None:
    """Raise ConfigError if what is at a hookpoint is not a vector for each token of two windows."""
    ids, shape = batch.ids, list(output.shape)
    side, length = "input" if is_input(hookpoint) else "output", ids.shape[1]
    advice = "a module of the residual stream, an MLP or an attention output"
    if _is_of_tokens(output, ids):
        if len(output) == 2 and (torch.equal(ids[0], ids[1]) or not torch.equal(output[0], output[1])):
            return
        if not bool(output.isfinite().all()):  # Inf everywhere tells nothing of what it depends on
            return
        raise ConfigError(
            f"hookpoint: expected an {side} that depends on the tokens, got from {hookpoint} the same for every "
            f"sequence, as of positions; choose {advice}."
        )
    one = [1, *shape[1:]] if shape[:1] == [2] else shape
    why = ""
    if _of_experts(hookpoint) or (len(shape) == 2 and len(output) != len(ids)):
        why = ", as a router and experts have, which see the tokens of all sequences in one list"
    elif len(shape) == 2:
        why = ", one row for the sequence, as a pooler has"
    raise ConfigError(
        f"hookpoint: expected an {side} of shape [sequences, length, d], got {one} of {output.dtype} from "
        f"{hookpoint} for one sequence of {length} tokens{why}; choose {_around(model, hookpoint, batch) or advice}."
    )


def _is_of_tokens(output: Tensor, ids: Tensor) -> bool:
    return (
        output.dim() == 3 and output.shape[1] == ids.shape[1] and len(output) in (1, 2) and output.is_floating_point()
    )


def _of_experts(hookpoint: str) -> bool:
    """Tell whether a module is a router or an expert, by its path."""
    return any(name in ("experts", "router", "gate") for name in module_of(hookpoint).split("."))


def _around(model: HookedModel, hookpoint: str, batch: TokenBatch) -> str | None:
    """Return the innermost module around a hookpoint that gives a vector for each token; None if none does."""
    path = module_of(hookpoint)
    while path := path.rpartition(".")[0]:
        try:
            output = model.at(path)(batch.ids, batch.attention)[path]
        except Exception:  # whatever modules raise that give something else, or are only lists
            continue
        if len(output) == 2 and _is_of_tokens(output, batch.ids):
            return f"{path}, which is around it"
    return None


def _that_ran(model: HookedModel, completed: set[nn.Module]) -> str | None:
    """Return the last layer of the longest list of layers that ran; None if none did."""
    lists = (module for module in model.reader.modules() if isinstance(module, nn.ModuleList))
    longest = max(([*filter(completed.__contains__, layers)] for layers in lists), key=len, default=[])
    names = [name for name, module in model.model.named_modules() if any(module is layer for layer in longest)]
    return f"one that did, such as {in_order(names)[-1]}" if names else None
