"""Attention without a mask where nothing is masked, also where a model cannot look."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

_Call = tuple[Tensor | None, bool]  # the mask, and whether it is causal
_Change = Callable[[Tensor | None, bool], _Call]


class AttentionCalls:
    """How the calls of attention in a forward went, for another forward of the same model.

    Models give no mask where they see that nothing is masked, and attention has faster kernels then. Where they cannot
    look, as in the capture of a graph, they give one always.
    """

    def __init__(self) -> None:
        self._is_causal: list[bool | None] = []

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note the calls of a forward in this thread."""
        self._is_causal = []

        def note(mask: Tensor | None, is_causal: bool) -> _Call:
            self._is_causal.append(is_causal if mask is None else None)
            return mask, is_causal

        with _Changed(note):
            yield

    @contextmanager
    def again(self) -> Iterator[None]:
        """Let the calls of another forward in this thread, of inputs as long, do without a mask where those did."""
        before = iter(self._is_causal)

        def repeat(mask: Tensor | None, is_causal: bool) -> _Call:
            was_causal = next(before, None)
            return (mask, is_causal) if was_causal is None else (None, was_causal)

        with _Changed(repeat):
            yield


class _Changed(TorchFunctionMode):
    """Lets a function see, and say, the mask of each call of attention, and whether it is causal."""

    def __init__(self, change: _Change) -> None:
        super().__init__()
        self._change = change

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        call = self._attention if func is scaled_dot_product_attention else func
        return call(*args, **(kwargs or {}))

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **more: Any,
    ) -> Any:
        attn_mask, is_causal = self._change(attn_mask, is_causal)
        return scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **more)
