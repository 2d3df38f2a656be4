"""What passes through modules of a model: seen and replaced by hooks, or read in a forward that ends when it can."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from flashsae.errors import ConfigError
from flashsae.lm.hookpoints import is_input, module_of
from flashsae.lm.parts import as_it_is_used

Pick = Callable[[str, Tensor], Tensor]
"""Called with a hookpoint and what is there, returns what to keep of it."""
Change = Callable[[Tensor], Tensor | None]
"""Called with what is at a hookpoint, returns what takes its place; None leaves it."""


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Run a model as for inference, without gradients; its modes are put back afterwards.

    cuDNN's attention is left out: it prepares for every new shape for about 60 ms, and texts have many lengths.
    """
    was_enabled = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    with as_it_is_used(model), torch.no_grad():
        torch.backends.cuda.enable_cudnn_sdp(False)
        try:
            yield
        finally:
            torch.backends.cuda.enable_cudnn_sdp(was_enabled)


class _AllSeen(Exception):  # noqa: N818 - not an error: it ends a forward whose rest nobody needs
    pass


def captured(
    model: nn.Module,
    hookpoints: Iterable[str],
    pick: Pick,
    run: Callable[[], object],
    reader: nn.Module | None = None,
) -> dict[str, Tensor]:
    """Return what is at each hookpoint while a model runs, no further than the last of them.

    Args:
        model: that the hookpoints lie in.
        hookpoints: as `resolve_hookpoints` returns them.
        pick: what to keep; a copy, since a later layer may add to the tensor in place. A module that runs twice gives
            the first.
        run: runs the model.
        reader: the part of it that is looked at: what runs before it begins is not seen; None is all.
    Raises:
        DidNotRunError: a module did not.
        ConfigError: one gives or takes no tensor.
    """
    wanted = tuple(hookpoints)
    seen: dict[str, Tensor] = {}
    begun: list[nn.Module] = [model] if reader is None else []

    def keep(name: str, value: Tensor) -> None:
        if not begun:
            return
        if name not in seen:
            seen[name] = pick(name, value)
        if len(seen) == len(wanted):
            raise _AllSeen

    hooks = [on_run(model.get_submodule(module_of(name)), name, partial(keep, name)) for name in wanted]
    if reader is not None:
        hooks.insert(0, reader.register_forward_pre_hook(lambda module, args: begun.append(module), prepend=True))
    try:
        run()
    except _AllSeen:
        return {name: seen[name] for name in wanted}
    finally:
        for hook in hooks:
            hook.remove()
    raise DidNotRunError([name for name in wanted if name not in seen])


def on_run(module: nn.Module, hookpoint: str, change: Change) -> RemovableHandle:
    """Let a function see what is at a hookpoint each time its module runs, and put another tensor in its place.

    Of several values that a module gives it is the first tensor, whichever kind of collection they come in; of what it
    is given, `hidden_states` or the first one that stands in its place. The others stay as they are.

    Args:
        module: that the hookpoint lies at.
        hookpoint: tells its input from its output.
        change: sees the tensor.
    Returns:
        the handle that ends it.
    Raises:
        ConfigError: when it runs: it gives or takes no tensor, or in a collection where none can be replaced.
    """

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        place: Any = _place_of_input(hookpoint, args, kwargs)
        values: Any = kwargs if isinstance(place, str) else args
        changed = change(values[place])
        if changed is None:
            return None
        values = _replaced(hookpoint, values, place, changed)
        return (args, values) if isinstance(place, str) else (values, kwargs)

    def behind(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, Tensor):
            return change(output)
        place = _place_of_output(hookpoint, output)
        changed = change(output[place] if hasattr(output, "__getitem__") else [*output][place])
        return None if changed is None else _replaced(hookpoint, output, place, changed)

    if is_input(hookpoint):
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(behind)


class DidNotRunError(ConfigError):
    """Modules did not run when the model read its inputs.

    Args:
        hookpoints: at which they lie.
        advice: what to choose instead.
        what: the inputs, in words.
    """

    def __init__(self, hookpoints: Iterable[str], advice: str = "another module", what: str = "text") -> None:
        self.hookpoints = tuple(hookpoints)
        names = ", ".join(self.hookpoints)
        super().__init__(f"hookpoint: {names} did not run when the model read {what}; choose {advice}.")


def _place_of_input(name: str, args: tuple[object, ...], kwargs: dict[str, object]) -> str | int:
    if isinstance(kwargs.get("hidden_states"), Tensor):
        return "hidden_states"
    for place, value in enumerate(args):
        if isinstance(value, Tensor):
            return place
    raise ConfigError(
        f"hookpoint: expected a module that is given a tensor in its place, or as hidden_states, got {module_of(name)} "
        f"with {', '.join([*(type(value).__name__ for value in args), *kwargs]) or 'nothing'}; choose another module."
    )


def _place_of_output(name: str, output: Any) -> Any:
    """Return where the first tensor stands: a key of a mapping, a place in any other collection."""
    listed = output if isinstance(output, Iterable) else ()
    values = output.items() if isinstance(output, Mapping) else enumerate(listed)
    for place, value in values:
        if isinstance(value, Tensor):
            return place
    raise ConfigError(f"hookpoint: {name} gives no tensor but {type(output).__name__}; choose another module.")


def _replaced(name: str, values: Any, place: Any, changed: Tensor) -> Any:
    """Return a collection of the same kind with another value at a place."""
    if isinstance(values, tuple):
        listed = [*values[:place], changed, *values[place + 1 :]]
        return type(values)._make(listed) if hasattr(values, "_make") else tuple(listed)
    if not hasattr(values, "__setitem__"):
        raise ConfigError(
            f"hookpoint: nothing can be put into the {type(values).__name__} that {name} gives; choose another module."
        )
    values = copy(values)
    values[place] = changed
    return values
