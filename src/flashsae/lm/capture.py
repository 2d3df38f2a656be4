"""What passes through modules of a model: seen by hooks, in a forward that ends as soon as all of it was seen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from flashsae.errors import ConfigError
from flashsae.lm.hookpoints import is_input, module_of
from flashsae.lm.parts import as_it_is_used

Pick = Callable[[str, Tensor], Tensor]
"""Called with a hookpoint and what is there, returns what to keep of it."""


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

    def keep(name: str, find: Callable[..., Tensor], *values: object) -> None:
        if not begun:
            return
        if name not in seen:
            seen[name] = pick(name, find(name, *values))
        if len(seen) == len(wanted):
            raise _AllSeen

    hooks = [_hook(model.get_submodule(module_of(name)), name, keep) for name in wanted]
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


def _hook(module: nn.Module, name: str, keep: Callable[..., None]) -> RemovableHandle:
    if is_input(name):
        return module.register_forward_pre_hook(
            lambda module, args, kwargs: keep(name, _input_tensor, args, kwargs), with_kwargs=True
        )
    return module.register_forward_hook(lambda module, args, output: keep(name, _first_tensor, output))


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
