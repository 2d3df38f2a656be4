"""Names for a profiler: which part of a step launched what, beside the operators of `flashsae.ops`."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from torch.profiler import record_function

_NOTHING = contextlib.nullcontext()


def part(name: str) -> AbstractContextManager[object]:
    """Return a range of this name, round what is launched inside `with`; where no profiler looks, a microsecond less.

    Args:
        name: such as "adam_rows 0"; `flashsae bench` tells the stages of a step apart by these.
    """
    if torch.compiler.is_compiling() or not torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
        return _NOTHING
    return record_function(name)
