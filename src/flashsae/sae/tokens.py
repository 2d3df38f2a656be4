"""What an SAE may be given to encode, and how what it cannot take becomes that."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from flashsae.errors import DtypeError, ShapeError
from flashsae.ops.validate import check_float, check_ordinary
from flashsae.sae.config import SAEConfig


def check_tokens(x: object, config: SAEConfig) -> None:
    """Raise ShapeError or DtypeError unless x is [..., d_in] of a float dtype."""
    if not isinstance(x, Tensor):
        raise DtypeError(f"x: expected a tensor, got {type(x).__name__}. {_as_one_tensor(x, config)}")
    check_ordinary("x", x)
    if x.dim() == 0 or x.shape[-1] != config.d_in:
        beside = " and ".join(f"{each.stop - each.start} of {site}" for site, each in config.columns.items())
        beside = f", {beside} beside each other" if beside else ""
        raise ShapeError(f"x: expected the shape [..., {config.d_in}]{beside}, got {list(x.shape)}.")
    check_float("x", x)


def _as_one_tensor(x: object, config: SAEConfig) -> str:
    reads = tuple(config.columns) or config.architecture.reads
    if not isinstance(x, Mapping):
        return "Convert it: torch.as_tensor(x)."
    if len(reads) == 1:
        return f"Take what is read of it: x[{(reads[0] if reads[0] in x else next(iter(x), reads[0]))!r}]."
    return f"Put its sites beside each other: torch.cat([{', '.join(f'x[{site!r}]' for site in reads)}], -1)."
