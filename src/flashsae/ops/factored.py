"""The gradient of a weight matrix as a tensor: an ordinary `.grad` for everybody, factors for the latent pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from typing_extensions import Self

from flashsae import distributed
from flashsae.backend import use_kernels
from flashsae.errors import ShapeError
from flashsae.ops.adam_rows.op import row_squares
from flashsae.ops.factors import Factor, RowFactor, RowGradient, SparseFactor, inverse, is_divisor, is_scale
from flashsae.ops.validate import compute_dtype

aten = torch.ops.aten


class _Content:
    """What a gradient consists of; shared by a gradient and its detached views, as memory is."""

    def __init__(self, factors: list[Factor], numbers: Tensor | None = None) -> None:
        self.factors: list[Factor] | None = factors
        self.numbers = numbers

    def set(self, factors: list[Factor]) -> None:
        self.factors, self.numbers = factors, None


class FactoredGradient(Tensor):
    """The gradient of a weight matrix, [d_sae, d], as a tensor whose numbers are not there until somebody reads them.

    Backward passes leave it on matrices that `collect_factors` was told of. Autograd accumulates it, hooks receive it,
    `zero_grad` forgets it, `clip_grad_norm_` and `GradScaler` scale it and `FactoredAdam` consumes it, all as factors;
    for any other operation it is the ordinary gradient: [d_sae, d] numbers, computed at that moment.

    Args:
        factors: whose sum it is.
        like: the matrix.
    Numerics: the numbers are those of the ordinary gradient: summed in the compute dtype, rounded once to that of the
        matrix. Factors whose memory exceeds that of the numbers are added up, so accumulation is bounded.
    Source: ours, docs/methodology.md#gradients-as-factors.
    """

    _content: _Content

    # operations on it return ordinary tensors, not tensors of this class
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, factors: Sequence[Factor], like: Tensor) -> Self:
        """Make an empty shell of the shape, dtype and device of the matrix."""
        shell = torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=like.device)
        # there is no memory behind it: code that asks for its address is told so instead of reading from 0
        torch._C._set_throw_on_mutable_data_ptr(shell)
        return shell

    def __init__(self, factors: Sequence[Factor], like: Tensor) -> None:
        self._content = _Content(self._bounded(list(factors)))

    @property
    def factors(self) -> tuple[Factor, ...] | None:
        """The factors whose sum this is; None once somebody has changed its numbers."""
        factors = self._content.factors
        return None if factors is None else tuple(factors)

    def row_gradient(self) -> RowGradient:
        """Return this gradient as the latent pass reads it."""
        content = self._content
        if content.factors is None or (content.numbers is not None and not all(f.is_intact for f in content.factors)):
            return RowGradient(dense=content.numbers)
        return RowGradient.of(distributed.joined(content.factors))

    @torch.no_grad()
    def materialize(self) -> Tensor:
        """Return the numbers as an ordinary tensor, not to be written to: [d_sae, d]. Kept, so computed once."""
        content = self._content
        if content.numbers is None:
            gradient = self.row_gradient()
            zeros = torch.zeros(self.shape if gradient.is_empty else 0, dtype=self.dtype, device=self.device)
            content.numbers = zeros if gradient.is_empty else gradient.total(zeros)
        return content.numbers

    def _own(self) -> Tensor:
        """Return the numbers to be written to: from now on they are the gradient."""
        content, numbers = self._content, self.materialize()
        if any(isinstance(f, RowFactor) and f.rows.data_ptr() == numbers.data_ptr() for f in content.factors or []):
            numbers = numbers.clone()
        content.factors, content.numbers = None, numbers
        return numbers

    def _view(self) -> FactoredGradient:
        view = FactoredGradient([], self)
        view._content = self._content
        return view

    def _bounded(self, factors: list[Factor]) -> list[Factor]:
        """Return the same sum in less memory, where numbers take less than several factors."""
        numbers = self.numel() * compute_dtype(self.dtype).itemsize
        sparse = [factor for factor in factors if isinstance(factor, SparseFactor)]
        # that of all levels of a loss may be larger by itself, which is no reason to give it up for rows beside it
        nested = sparse[0] if len(sparse) == 1 and sparse[0].levels > 1 else None
        if len(factors) < 2 or sum(factor.nbytes for factor in factors if factor is not nested) <= numbers:
            return factors
        like = torch.empty(0, dtype=compute_dtype(self.dtype), device=self.device)
        return [RowFactor(RowGradient.of(factors).total(like), None)]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Do an operation of PyTorch on factors if there is a way, else on numbers."""
        kwargs = kwargs or {}
        special = _ON_FACTORS.get(func)
        result = NotImplemented if special is None else special(*args, **kwargs)
        return _on_numbers(func, args, kwargs) if result is NotImplemented else result

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        factors = self._content.factors
        parts = "numbers" if factors is None else " + ".join(type(f).__name__ for f in factors) or "zeros"
        return f"FactoredGradient({list(self.shape)}, {self.dtype}, {self.device}: {parts})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.clone()

    @property
    def data(self) -> Tensor:
        """The gradient, detached; what is assigned to it becomes the gradient."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if value.shape != self.shape:
            raise ShapeError(f"data: expected the shape {list(self.shape)}, got {list(value.shape)}.")
        numbers = value._own() if isinstance(value, FactoredGradient) else value.detach()
        Tensor.data.__set__(self, FactoredGradient([], numbers))  # type: ignore[attr-defined]
        self._content.factors, self._content.numbers = None, numbers

    # whoever is handed memory may write to it
    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._own().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __dlpack__(self, **options: Any) -> Any:
        return self._own().__dlpack__(**options)

    def share_memory_(self) -> Self:
        """Move the numbers to memory that processes share."""
        self._own().share_memory_()  # type: ignore[no-untyped-call]
        return self

    def is_shared(self) -> bool:
        """Tell whether other processes may see the numbers."""
        return self._content.factors is None and bool(self.materialize().is_shared())  # type: ignore[no-untyped-call]

    def data_ptr(self) -> int:
        """Return the address of the numbers."""
        return self._own().data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        """Return the memory of the numbers."""
        return self._own().untyped_storage()

    def numpy(self, *, force: bool = False) -> Any:
        """Return the numbers as an array."""
        return self._own().numpy(force=force)

    def tolist(self) -> Any:
        """Return the numbers as lists."""
        return self.materialize().tolist()


def _on_numbers(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Run an operation on the numbers; what it may write to, also later through a view, is no sum of factors then."""
    written: set[int] = set()
    is_declared = func.namespace == "aten"  # other libraries, such as collectives, may write without saying so
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None or not is_declared:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            tree_map_only(FactoredGradient, lambda gradient: written.add(id(gradient)), value)
    wrappers: dict[int, FactoredGradient] = {}

    def numbers(gradient: FactoredGradient) -> Tensor:
        if id(gradient) not in written:
            return gradient.materialize()
        plain = gradient._own()
        wrappers[id(plain)] = gradient
        return plain

    plain_args, plain_kwargs = tree_map_only(FactoredGradient, numbers, (tuple(args), kwargs))
    result = func(*plain_args, **plain_kwargs)
    return tree_map_only(Tensor, lambda tensor: wrappers.get(id(tensor), tensor), result)


def _clone(gradient: FactoredGradient, **_options: Any) -> Any:
    factors = gradient._content.factors
    return NotImplemented if factors is None else FactoredGradient(factors, gradient)


def _new_like(gradient: FactoredGradient, size: Sequence[int], *_strides: Any, **options: Any) -> Any:
    """Serve autograd, which copies a gradient that somebody else holds too: into one without factors."""
    options = {name: value for name, value in options.items() if value is not None}
    expected = {"dtype": gradient.dtype, "layout": torch.strided, "device": gradient.device, "pin_memory": False}
    if tuple(size) != tuple(gradient.shape) or any(expected[name] != value for name, value in options.items()):
        return NotImplemented
    return FactoredGradient([], gradient)


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Any:
    if not isinstance(target, FactoredGradient) or not isinstance(source, FactoredGradient):
        return NotImplemented
    factors = source._content.factors
    if factors is None or (target.shape, target.dtype, target.device) != (source.shape, source.dtype, source.device):
        return NotImplemented
    target._content.set(list(factors))
    return target


def _sum_of(first: Any, second: Any, alpha: float, in_place: bool = False) -> list[Factor] | None:
    """Return the factors of a sum; numbers of the same shape join them as rows."""
    if not isinstance(first, FactoredGradient) or alpha != 1 or first._content.factors is None:
        return None
    if isinstance(second, FactoredGradient):
        more = second._content.factors
        if more is None:
            more = [RowFactor(second.materialize().clone(), None)]
    elif type(second) is Tensor and second.is_floating_point() and second.dim() == 2:
        more = [RowFactor(second.clone(), None)]
    else:
        return None
    if (second.shape, second.device) != (first.shape, first.device) or not (in_place or second.dtype == first.dtype):
        return None
    return first._bounded([*first._content.factors, *more])


def _add(first: Any, second: Any, *, alpha: float = 1) -> Any:
    factors = _sum_of(first, second, alpha)
    return NotImplemented if factors is None else FactoredGradient(factors, first)


def _add_(first: Any, second: Any, *, alpha: float = 1) -> Any:
    factors = _sum_of(first, second, alpha, in_place=True)
    if factors is None:
        return NotImplemented
    first._content.set(factors)
    return first


def _scaled(gradient: Any, scale: Any) -> list[Factor] | None:
    if not isinstance(gradient, FactoredGradient) or not is_scale(scale) or gradient._content.factors is None:
        return None
    return [factor.scaled(scale) for factor in gradient._content.factors]


def _mul(gradient: Any, scale: Any) -> Any:
    factors = _scaled(gradient, scale)
    return NotImplemented if factors is None else FactoredGradient(factors, gradient)


def _mul_(gradient: Any, scale: Any) -> Any:
    factors = _scaled(gradient, scale)
    if factors is None:
        return NotImplemented
    gradient._content.set(factors)
    return gradient


def _div(gradient: Any, scale: Any) -> Any:
    return _mul(gradient, inverse(scale)) if is_divisor(scale) else NotImplemented


def _div_(gradient: Any, scale: Any) -> Any:
    return _mul_(gradient, inverse(scale)) if is_divisor(scale) else NotImplemented


def _zero_(gradient: FactoredGradient) -> FactoredGradient:
    gradient._content.set([])
    return gradient


def _vector_norm(
    gradient: Any, ord: float = 2, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Any:
    is_whole = ord == 2 and dim in (None, [], [0, 1]) and not keepdim and dtype is None
    if not is_whole or gradient._content.factors is None or not use_kernels(gradient):
        return NotImplemented
    return row_squares(gradient, gradient.row_gradient(), False).sum().sqrt().to(gradient.dtype)


def _unscale(gradients: list[Tensor], found_inf: Tensor, inv_scale: Tensor) -> None:
    """Serve `torch.amp.GradScaler`: scale, and tell of numbers that are not finite."""
    plain = [gradient for gradient in gradients if not isinstance(gradient, FactoredGradient)]
    if plain:
        aten._amp_foreach_non_finite_check_and_unscale_(plain, found_inf, inv_scale)
    for gradient in gradients:
        if isinstance(gradient, FactoredGradient):
            gradient.mul_(inv_scale.reshape(()))
            norm = torch.linalg.vector_norm(gradient)  # beyond the range of squares no step would do good either
            is_bad = ~norm.isfinite()
            found_inf.copy_(torch.maximum(found_inf, is_bad.to(found_inf.dtype)))


_ON_FACTORS: dict[Any, Callable[..., Any]] = {
    aten.detach.default: FactoredGradient._view,
    aten.alias.default: FactoredGradient._view,
    aten.clone.default: _clone,
    aten.new_empty_strided.default: _new_like,
    aten.copy_.default: _copy,
    aten.add.Tensor: _add,
    aten.add_.Tensor: _add_,
    aten.mul.Tensor: _mul,
    aten.mul_.Tensor: _mul_,
    aten.div.Tensor: _div,
    aten.div_.Tensor: _div_,
    aten.zero_.default: _zero_,
    aten.linalg_vector_norm.default: _vector_norm,
    aten._amp_foreach_non_finite_check_and_unscale_.default: _unscale,
}
