"""The seed of rounding noise reaches the product that is screened, and nothing else reads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from flashsae.ops import Pattern, encode_above, encode_batch_topk, encode_topk, linear, pre_acts
from flashsae.ops.encode.product import Product
from flashsae.precision import operand_of
from helpers.on_both import DEVICE

SCREENED = ["bf16-int8", "float32-int8"]
ENCODERS: dict[str, Callable[..., Any]] = {
    "encode_topk": lambda *of, **by: encode_topk(*of, 3, **by),
    "encode_batch_topk": lambda *of, **by: encode_batch_topk(*of, 3, **by),
    "encode_above": lambda *of, **by: encode_above(*of, 0.5, **by),
    "encode_above, some": lambda *of, **by: encode_above(*of, 0.5, capacity=20, **by),
    "encode_above, any": lambda *of, **by: encode_above(*of, 0.5, capacity="any", **by),
}


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHSAE_BACKEND", "triton")


@pytest.fixture
def operands(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    x, W, b = (torch.randn(*shape, generator=generator).to(DEVICE) for shape in ((5, 13), (40, 13), (40,)))
    return x, W.requires_grad_(), b


@pytest.mark.parametrize("precision", SCREENED)
@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_hands_it_on(
    name: str, precision: Any, operands: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, Tensor | None]] = []
    of = Product.of.__func__  # type: ignore[attr-defined]

    def noted(cls: type[Product], x: Tensor, W: Tensor, precision: str, *others: Any, **by: Any) -> Product:
        product: Product = of(cls, x, W, precision, *others, **by)
        made.append((precision, product.noise))
        return product

    monkeypatch.setattr(Product, "of", classmethod(noted))
    noise = torch.tensor(7, device=DEVICE)
    code = ENCODERS[name](*operands, precision=precision, noise=noise)
    code.acts.sum().backward()  # it is no input of the backward pass
    ENCODERS[name](*operands, precision=precision)
    (first, seed), (second, none) = made
    assert first == second == precision
    assert seed is not None
    assert int(seed) == 7
    assert none is None


@pytest.mark.parametrize("precision", SCREENED)
def test_what_selects_nothing_is_that_of_its_operands(precision: Any, operands: tuple[Tensor, Tensor, Tensor]) -> None:
    x, W, b = operands
    pattern = Pattern.topk(torch.arange(10, device=DEVICE).reshape(5, 2), 40)
    plain = operand_of(precision)
    assert torch.equal(linear(x, W, precision=precision), linear(x, W, precision=plain))
    for capacity in ("full", pattern):
        ours, theirs = (
            encode_above(x, W, b, 0.0, capacity="full", precision=each).acts
            if capacity == "full"
            else pre_acts(x, W, b, pattern, precision=each)
            for each in (precision, plain)
        )
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["encode_topk", "encode_batch_topk", "encode_above"])
def test_a_wrong_one_is_refused(name: str, operands: tuple[Tensor, Tensor, Tensor]) -> None:
    from flashsae.errors import DtypeError

    with pytest.raises(DtypeError, match=r"noise: expected an int64 tensor, got torch.int32"):
        ENCODERS[name](*operands, noise=torch.tensor(7, dtype=torch.int32, device=DEVICE))


def test_one_that_nothing_screens_with_changes_nothing(operands: tuple[Tensor, Tensor, Tensor]) -> None:
    x, W, b = operands
    for precision in ("float32", "tf32", "bf16"):
        with_it = encode_topk(x, W, b, 4, precision=precision, noise=torch.tensor(9, device=DEVICE))  # type: ignore[arg-type]
        without = encode_topk(x, W, b, 4, precision=precision)  # type: ignore[arg-type]
        assert torch.equal(with_it.acts, without.acts)
        assert torch.equal(with_it.top_indices, without.top_indices)
