"""Which dimension of what a module gives counts examples, which positions, and which is the vector of each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flashsae.errors import ConfigError, ShapeError
from flashsae.lm.hookpoints import is_input

_CHANNELS_FIRST = ("Conv", "BatchNorm", "InstanceNorm", "GroupNorm")


@dataclass(frozen=True)
class Positions:
    """How what is at a hookpoint is arranged.

    Args:
        order: of its dimensions: examples, positions (none where an example is one vector, two of images), vector.
        grid: the positions of an example as they were seen first: (), (positions,) or (height, width).
        d: width of a vector.
    """

    order: tuple[int, ...]
    grid: tuple[int, ...]
    d: int

    def vectors(self, output: Tensor) -> Tensor:
        """Return [examples, positions, d]."""
        return output.permute(self.order).reshape(output.shape[self.order[0]], -1, output.shape[self.order[-1]])

    def fits(self, output: Tensor, examples: int) -> bool:
        """Tell whether an output is arranged so."""
        if output.dim() != len(self.order):
            return False
        return output.shape[self.order[0]] == examples and output.shape[self.order[-1]] == self.d


def positions_of(module: nn.Module, hookpoint: str, output: Tensor, examples: int) -> Positions:
    """Find out how what is at a hookpoint is arranged.

    Args:
        module: at the hookpoint.
        hookpoint: its name.
        output: of some examples: [examples, d], [examples, positions, d], [examples, d, positions],
            [positions, examples, d], [examples, d, height, width] or [examples, height, width, d].
        examples: how many.
    Raises:
        ConfigError: it is none of these, or nobody can tell which.
    """
    shape = tuple(output.shape)
    order: tuple[int, ...] | None = None
    if output.is_floating_point() and output.numel():
        if len(shape) == 2 and shape[0] == examples:
            order = (0, 1)
        elif len(shape) == 3 and shape[0] == examples:
            order = (0, 2, 1) if _is_channels_first(module, hookpoint, shape) else (0, 1, 2)
        elif len(shape) == 3 and shape[1] == examples:
            order = (1, 0, 2)
        elif len(shape) == 4 and shape[0] == examples:
            first = _is_channels_first(module, hookpoint, shape)
            if first is None:
                raise ConfigError(
                    f"hookpoint: whether {hookpoint} gives [examples, d, height, width] or [examples, height, width, "
                    f"d] cannot be told from {list(shape)}; choose the module around it."
                )
            order = (0, 2, 3, 1) if first else (0, 1, 2, 3)
    if order is None:
        raise ConfigError(
            f"hookpoint: expected [examples, positions, d], [examples, d] or [examples, d, height, width], got "
            f"{list(shape)} of {output.dtype} from {hookpoint} for {examples} "
            f"{'examples' if examples > 1 else 'example'}; choose a layer, an MLP or an attention output."
        )
    grid = tuple(shape[i] for i in order[1:-1])
    return Positions(order, grid, shape[order[-1]])


def _is_channels_first(module: nn.Module, hookpoint: str, shape: tuple[int, ...]) -> bool | None:
    """Tell by what a module is made of, or else by a square; None where neither tells."""
    of_input = is_input(hookpoint)
    leaves = [leaf for leaf in module.modules() if not list(leaf.children())]
    for leaf in leaves if of_input else reversed(leaves):
        kind = type(leaf).__name__
        is_first = any(name in kind for name in _CHANNELS_FIRST)
        if _width(leaf, of_input) == shape[1 if is_first else -1]:
            return is_first
    if len(shape) == 4 and (shape[1] == shape[2]) != (shape[2] == shape[3]):
        return shape[2] == shape[3]
    return None


def _width(leaf: nn.Module, of_input: bool) -> int | None:
    """Return how many numbers a place has in front of, or behind, a module without others in it."""
    side = ("in_channels", "in_features") if of_input else ("out_channels", "out_features", "embedding_dim")
    for name in (*side, "num_features", "num_channels"):
        if isinstance(width := getattr(leaf, name, None), int):
            return width
    weight = getattr(leaf, "weight", None)  # of a norm
    return int(weight.shape[0]) if isinstance(weight, Tensor) and weight.dim() == 1 else None


def mask_of_positions(model: nn.Module, mask: Tensor, n: int, n_positions: int) -> Tensor:
    """Return which positions are none of padding: [n, n_positions], bool, on the CPU.

    Args:
        model: may know what becomes of a mask where it shortens its input.
        mask: of the input, 0 at padding.
        n: examples.
        n_positions: of each, behind the model's shortening.
    Raises:
        ShapeError: it cannot be told.
    """
    if mask.shape == (n, n_positions):
        return mask.bool().cpu()
    shortened = next((each for each in model.modules() if hasattr(each, "_get_feature_vector_attention_mask")), None)
    if shortened is not None and mask.dim() == 2:
        found: Tensor = shortened._get_feature_vector_attention_mask(n_positions, mask)  # type: ignore[operator]
        if found.shape == (n, n_positions):
            return found.bool().cpu()
    if bool(mask.bool().all()):
        return torch.ones(n, n_positions, dtype=torch.bool, device="cpu")
    raise ShapeError(
        f"inputs: attention_mask is {list(mask.shape)}, and {[n, n_positions]} positions are there, so which of them "
        "are padding cannot be told. Give it beside: batch['keep'], a bool of that shape."
    )
