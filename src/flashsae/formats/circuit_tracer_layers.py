"""Which layer a transcoder of circuit-tracer is of, and what that calls the places which it reads and writes.

What circuit-tracer calls a pair of places holds for all layers: mlp.hook_in, hook_mlp_out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from flashsae.errors import ConfigError
from flashsae.formats.content import Content, kept_of
from flashsae.formats.hook_names import hook_name_of, hookpoints_of, layer_of, model_of

NAME = "circuit_tracer"
_HOOKS = "mlp.hook_in", "hook_mlp_out"
"""What a transcoder reads and writes, where nobody said: what an MLP is given, and what it adds to the stream."""


def by_layer(contents: Mapping[str, Content]) -> list[Content]:
    """Return transcoders in the order of their layers, each with its hookpoint in its metadata where it has one.

    Args:
        contents: by hookpoint, such as "h.3.mlp:in, h.3.mlp", or h.3.mlp for both sides.
    Raises:
        ConfigError: there is not one for each layer from 0 on.
    """
    layers: dict[int, Content] = {}
    for hookpoint, content in contents.items():
        number = _layer(hookpoint, content, is_alone=len(contents) == 1)
        if number in layers:
            raise ConfigError(f"{NAME}: expected one transcoder for each layer, got two of layer {number}: choose one.")
        is_named = content.metadata.get("hookpoint") is not None or layer_of(hookpoint) is None
        named = content.metadata if is_named else {**content.metadata, "hookpoint": hookpoint}
        layers[number] = replace(content, metadata=named)
    if not layers or sorted(layers) != list(range(len(layers))):
        raise ConfigError(
            f"{NAME}: expected a transcoder of every layer of the model, from 0 on without gaps, got those of "
            f"{', '.join(map(str, sorted(layers))) or 'none'}: train the others, or save these in another format."
        )
    return [layers[number] for number in range(len(layers))]


def _layer(hookpoint: str, content: Content, *, is_alone: bool) -> int:
    foreign = kept_of(content.metadata, NAME).get("layer")
    names = (hookpoint.rpartition(", ")[2], str(content.metadata.get("hookpoint", "")).rpartition(", ")[2])
    number = next((found for name in names if (found := layer_of(name)) is not None), foreign)
    if isinstance(number, int) and not isinstance(number, bool):
        return number
    if is_alone:
        return 0
    raise ConfigError(
        f"{NAME}: expected hookpoints with the number of a layer, such as h.3.mlp, got {hookpoint!r}: name it so."
    )


def hooks_of(content: Content) -> tuple[str, str]:
    """Return what circuit-tracer calls the places that a transcoder reads and writes, in any layer."""
    hookpoint, foreign = content.metadata.get("hookpoint"), kept_of(content.metadata, NAME)
    if hookpoint is None or {"feature_input_hook", "feature_output_hook"} <= foreign.keys():
        names = foreign.get("feature_input_hook", _HOOKS[0]), foreign.get("feature_output_hook", _HOOKS[1])
        return str(names[0]), str(names[1])
    reads, is_pair, writes = str(hookpoint).partition(", ")
    reads, writes = (reads, writes) if is_pair else (f"{reads}:in", reads)
    if layer_of(reads) != layer_of(writes):
        raise ConfigError(
            f"{NAME}: expected a transcoder that reads and writes one layer, got {hookpoint!r}: name both sides of it."
        )
    model = content.metadata.get("model")
    return _hook(reads, model), _hook(writes, model)


def places_of(model_name: str | None, hooks: tuple[str, str], number: int) -> str | None:
    """Return the hookpoints of a pair of hooks in a layer, as h.3.mlp:in, h.3.mlp; None where one has none."""
    model = None if model_name is None else model_of(model_name)
    return hookpoints_of([f"blocks.{number}.{hook}" for hook in hooks], model)


def _hook(hookpoint: str, model: object) -> str:
    name = hook_name_of(hookpoint, None if model is None else str(model))
    if name is not None:
        return name.split(".", 2)[2]
    if found := re.search(r"\.\d+\.mlp(:in)?$", hookpoint):  # whatever stands around an MLP, these are its own
        return "mlp.hook_in" if found[1] else "mlp.hook_out"
    raise ConfigError(
        f"{NAME}: transformer-lens has no name for {hookpoint!r} of the model {model}: save it in another format, such "
        "as flashsae."
    )
