"""A language model that runs no further than its hookpoints, and a first look at what these give."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from flashsae.errors import ConfigError, FlashSAEError
from flashsae.lm.hookpoints import is_input, module_of
from flashsae.lm.weights import Trace
from flashsae.lm.windows import TokenBatch


def text_reader(model: nn.Module) -> nn.Module:
    """Return the part of a model that reads text alone: all of it, the encoder of two halves, or the side of text.

    Raises:
        ConfigError: there is none.
    """
    reader = model
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        reader = model.get_encoder()  # type: ignore[operator]
    elif isinstance(side := getattr(model, "text_model", None), nn.Module):
        reader = side
    wanted = getattr(reader, "main_input_name", "input_ids")
    if wanted != "input_ids":
        raise ConfigError(f"model: {type(model).__name__} reads {wanted}, not text; name a language model.")
    return reader


def _name_of(part: nn.Module, model: nn.Module) -> str:
    return next((name for name, module in model.named_modules() if module is part and name), "the model")


def context_limit(model: nn.Module, tokenizer: Any) -> float:
    """Return how many tokens a model reads at once, as far as it or its tokenizer says so."""
    reader = text_reader(model)
    settings = getattr(reader, "config", None)
    positions = getattr(settings, "max_position_embeddings", None)
    for module in reader.modules():
        # the family of RoBERTa counts positions from behind the number of the padding token
        own = getattr(module, "position_embeddings", None)
        if isinstance(own, nn.Embedding) and own.padding_idx is not None and own.num_embeddings == positions:
            positions = own.num_embeddings - own.padding_idx - 1
    limits = (positions, getattr(tokenizer, "model_max_length", None))
    return min((limit for limit in limits if isinstance(limit, int | float) and limit > 0), default=float("inf"))


def vocabulary_size(model: nn.Module) -> int | None:
    """Return how many token ids a model has embeddings of; None where it does not say so."""
    try:
        embeddings = text_reader(model).get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return getattr(embeddings, "num_embeddings", None)


@contextmanager
def _no_cudnn_attention() -> Iterator[None]:
    """Leave cuDNN's attention out: it prepares for every new shape for about 60 ms, and texts have many lengths."""
    was_enabled = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was_enabled)


@contextmanager
def _traced(model: nn.Module) -> Iterator[tuple[set[nn.Module], set[nn.Module]]]:
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


class _AllSeen(Exception):  # noqa: N818 - not an error: it ends a forward whose rest nobody needs
    pass


class HookedModel:
    """A base model, run only as far as its last hookpoint.

    Args:
        model: switched to evaluation, its parameters are frozen; it stays on its device.
        hookpoints: as `resolve_hookpoints` returns them.
    Raises:
        ConfigError: the model does not read text, or a hookpoint lies in a part of it that does not.
    """

    def __init__(self, model: nn.Module, hookpoints: tuple[str, ...]) -> None:
        self.model = model.eval().requires_grad_(False)
        self.hookpoints = hookpoints
        self.device = next(model.parameters()).device
        self.reader = text_reader(model)
        inside = {id(module) for module in self.reader.modules()}
        outside = [name for name in hookpoints if id(self.module_at(name)) not in inside]
        if outside:
            raise ConfigError(
                f"hookpoint: {outside[0]} does not read text alone in {type(model).__name__}; choose a module of "
                f"{_name_of(self.reader, model)}, which does."
            )
        takes_cache = "use_cache" in inspect.signature(self.reader.forward).parameters
        self._options = {"use_cache": False} if takes_cache else {}

    def module_at(self, hookpoint: str) -> nn.Module:
        """Return the module that a hookpoint lies at."""
        return self.model.get_submodule(module_of(hookpoint))

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pick: Callable[[str, Tensor], Tensor] = lambda name, output: output.clone(),
    ) -> dict[str, Tensor]:
        """Return what is at each hookpoint; a module that runs twice gives the first.

        Args:
            input_ids: [sequences, length], int64, on any device.
            attention_mask: [sequences, length], int64, on any device; 0 is padding.
            pick: called with a hookpoint and what is there, returns what to keep of it: a copy, since a later layer may
                add to the tensor in place.
        Returns:
            by hookpoint, the first tensor of the output, or of the input (`hidden_states`, where that is given by its
            name), [sequences, length, d] for most modules; on the device of the model. Or what `pick` made of it.
        Raises:
            ConfigError: a module did not run, or gives or takes no tensor.
        """
        seen: dict[str, Tensor] = {}

        def keep(name: str, find: Callable[..., Tensor], *values: object) -> None:
            if name not in seen:
                seen[name] = pick(name, find(name, *values))
            if len(seen) == len(self.hookpoints):
                raise _AllSeen

        hooks = [self._hook(name, keep) for name in self.hookpoints]
        try:
            with torch.no_grad(), _no_cudnn_attention():
                self.reader(
                    input_ids=input_ids.to(self.device, non_blocking=True),
                    attention_mask=attention_mask.to(self.device, non_blocking=True),
                    **self._options,
                )
        except _AllSeen:
            return {name: seen[name] for name in self.hookpoints}
        finally:
            for hook in hooks:
                hook.remove()
        silent = ", ".join(name for name in self.hookpoints if name not in seen)
        raise ConfigError(f"hookpoint: {silent} did not run when the model read text; choose another module.")

    def _hook(self, name: str, keep: Callable[..., None]) -> RemovableHandle:
        module = self.module_at(name)
        if is_input(name):
            return module.register_forward_pre_hook(
                lambda module, args, kwargs: keep(name, _input_tensor, args, kwargs), with_kwargs=True
            )
        return module.register_forward_hook(lambda module, args, output: keep(name, _first_tensor, output))


def _input_tensor(name: str, args: tuple[object, ...], kwargs: dict[str, object]) -> Tensor:
    for value in (kwargs.get("hidden_states"), *args):
        if isinstance(value, Tensor):
            return value
    raise ConfigError(
        f"hookpoint: expected a module that is given a tensor in its place, or as hidden_states, got {module_of(name)} "
        f"with {', '.join([*(type(value).__name__ for value in args), *kwargs]) or 'nothing'}; choose another module."
    )


def _first_tensor(name: str, output: object) -> Tensor:
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output
    for value in values if isinstance(values, Iterable) else ():
        if isinstance(value, Tensor):
            return value
    raise ConfigError(f"hookpoint: {name} gives no tensor but {type(output).__name__}; choose another module.")


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
        with _traced(model.model) as (entered, completed):
            outputs = model(batch.ids, batch.attention)
    except FlashSAEError:
        raise
    except Exception as error:  # whatever a model raises that wants other inputs or has fewer positions
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
        raise ConfigError(
            f"model: {name} cannot read {batch.ids.shape[1]} tokens of text ({type(error).__name__}: {reason}). Try a "
            "smaller context_length, or name a model that reads text alone."
        ) from error
    for hookpoint, output in outputs.items():
        _check_output(hookpoint, output, batch.ids)
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


def never_finite(name: str, hookpoint: str, dtype: torch.dtype) -> str:
    """Return what to say of a model that gives no finite numbers, whatever it reads."""
    half = "" if dtype == torch.float32 else ", or read in float32, as on the CPU (device cpu)"
    return (
        f"model: {name} gives NaN or Inf at {hookpoint} whatever it reads: its weights hold such, or overflow in "
        f"{dtype}. Load whole weights, or choose an earlier hookpoint{half}."
    )


def _check_output(hookpoint: str, output: Tensor, ids: Tensor) -> None:
    """Raise ConfigError if what is at a hookpoint is not a vector for each token of two windows."""
    side = "input" if is_input(hookpoint) else "output"
    advice = "choose a module of the residual stream, an MLP or an attention output."
    shape = list(output.shape)
    one = [1, *shape[1:]] if shape[:1] == [2] else shape
    if len(shape) != 3 or shape[1] != ids.shape[1] or not output.is_floating_point():
        raise ConfigError(
            f"hookpoint: expected an {side} of shape [sequences, length, d], got {one} of {output.dtype} from "
            f"{hookpoint} for one sequence of {ids.shape[1]} tokens; {advice}"
        )
    is_same = shape[0] == 2 and not torch.equal(ids[0], ids[1]) and torch.equal(output[0], output[1])
    if shape[0] != 2 or is_same:
        raise ConfigError(
            f"hookpoint: expected an {side} that depends on the tokens, got from {hookpoint} the same for every "
            f"sequence, as of positions; {advice}"
        )
