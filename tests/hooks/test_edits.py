"""Changes of latents, on every kind of code, against the same on dense tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flashsae import SparseCode, ablate, clamp, scale, steer
from flashsae.errors import ConfigError, DtypeError, FlashSAEError, ShapeError
from flashsae.hooks.at import Window
from flashsae.hooks.edits import Edit, Edited, Edits
from helpers.kinds_of_codes import KINDS, code_of

WINDOW = Window(2, 0, 5, 5)
LATENTS = [9, 0, 15]
AMOUNTS = [2.0, -1.0, 0.5]


@pytest.fixture
def dense(generator: torch.Generator) -> Tensor:
    values = torch.rand(2, 5, 16, generator=generator)
    return values * (values >= values.topk(3).values[..., -1:])


def applied(code: SparseCode, *edits: Any) -> Edited:
    return Edits("h.1", edits, 16).apply(code, WINDOW)


def done(edit: Callable[[Tensor], Tensor], dense: Tensor, at: Tensor | None = None) -> Tensor:
    there = torch.zeros(16, dtype=torch.bool).index_fill(0, torch.tensor(LATENTS), True)
    where = there if at is None else there & at[..., None]
    return torch.where(where, edit(dense), dense)


AMOUNT = torch.zeros(16).index_copy(0, torch.tensor(LATENTS), torch.tensor(AMOUNTS))
ORACLES: dict[str, tuple[Callable[[Any], Edit], Callable[[Tensor], Tensor]]] = {
    "ablate": (lambda at: ablate(LATENTS, at=at), torch.zeros_like),
    "clamp": (lambda at: clamp(LATENTS, 3, at=at), lambda dense: torch.full_like(dense, 3)),
    "clamp each": (lambda at: clamp(LATENTS, AMOUNTS, at=at), AMOUNT.expand_as),
    "scale": (lambda at: scale(LATENTS, -2.0, at=at), lambda dense: dense * -2),
    "scale each": (lambda at: scale(LATENTS, torch.tensor(AMOUNTS), at=at), lambda dense: dense * AMOUNT),
    "steer": (lambda at: steer(LATENTS, 1.5, at=at), lambda dense: dense + 1.5),
    "steer each": (lambda at: steer(np.array(LATENTS), np.array(AMOUNTS), at=at), lambda dense: dense + AMOUNT),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("edit", ORACLES)
@pytest.mark.parametrize("at", [None, [0, 3], [[True] * 2, [False, True]]], ids=["all", "some", "mask"])
def test_edits_are_those_of_dense_tensors(kind: str, edit: str, at: Any, dense: Tensor) -> None:
    code, (make, oracle) = code_of(kind, dense), ORACLES[edit]
    mask = torch.zeros(2, 5, dtype=torch.bool)
    if at == [0, 3]:
        mask[:, at] = True
    elif at:
        mask[:, :2] = torch.tensor(at)
    edited = applied(code, make(at))
    wanted = done(oracle, dense, None if at is None else mask)
    assert torch.equal(edited.code.to_dense(), wanted)
    assert edited.code.shape == (2, 5)
    assert edited.origin is not None
    assert torch.equal(edited.code.replace(edited.origin).to_dense(), dense)  # what it is measured against
    assert torch.equal(code.to_dense(), dense)  # a code is a value


@pytest.mark.parametrize("kind", KINDS)
def test_edits_follow_each_other(kind: str, dense: Tensor) -> None:
    edits = steer(3, 2.0), clamp([3, 4], 1.0, at=0), scale(range(16), 2.0), steer(4, 1.0), ablate(5)
    wanted = dense.clone()
    wanted[..., 3] += 2
    wanted[:, 0, [3, 4]] = 1
    wanted *= 2
    wanted[..., 4] += 1
    wanted[..., 5] = 0
    edited = applied(code_of(kind, dense), *edits)
    assert torch.equal(edited.code.to_dense(), wanted)
    assert edited.origin is not None
    assert torch.equal(edited.code.replace(edited.origin).to_dense(), dense)
    largest = int(dense[0, 0].argmax())  # there in some tokens, added to others
    twice = applied(code_of(kind, dense), steer(largest, 2.0), clamp(largest, 1.0), steer(largest, 0.5))
    assert (twice.code.to_dense()[..., largest] == 1.5).all()


@pytest.mark.parametrize("kind", KINDS)
def test_functions_are_edits(kind: str, dense: Tensor) -> None:
    def halved(code: SparseCode) -> SparseCode:
        code.acts.mul_(0.5)  # of what is written to nothing else may know
        return code

    code = code_of(kind, dense)
    alone = applied(code, halved)
    assert alone.origin is not None
    assert torch.equal(alone.code.replace(alone.origin).to_dense(), dense)
    assert torch.equal(alone.code.to_dense(), dense / 2)
    edited = applied(code, steer(3, 2.0), halved)
    assert edited.origin is not None
    assert torch.equal(edited.code.replace(edited.origin).to_dense(), dense)
    assert torch.equal(code.to_dense(), dense)
    wanted = dense.clone()
    wanted[..., 3] += 2
    assert torch.equal(edited.code.to_dense(), wanted / 2)
    other = applied(code, lambda code: code_of("full", dense * 2))
    assert torch.equal(other.code.to_dense(), dense * 2)
    assert other.origin is None or kind == "full"


@pytest.mark.parametrize("kind", KINDS)
def test_amounts_and_values_have_gradients(kind: str, dense: Tensor) -> None:
    code = code_of(kind, dense)
    acts, amount = code.acts.clone().requires_grad_(), torch.tensor(AMOUNTS, requires_grad=True)
    edited = applied(code.replace(acts), steer(LATENTS, amount), clamp(1, 2.0))
    weights = torch.rand(2, 5, 16, generator=torch.Generator().manual_seed(1))
    (edited.code.to_dense() * weights).sum().backward()
    assert amount.grad is not None
    torch.testing.assert_close(amount.grad, weights[..., LATENTS].sum((0, 1)))
    weights[..., 1] = 0  # it is what it is clamped to, whatever it was
    assert acts.grad is not None
    there = dense != 0
    found = code.replace(acts.grad).to_dense()
    assert torch.equal(found[there], weights[there])
    with torch.no_grad():
        amount += 1  # a step of an optimizer
        assert torch.equal(applied(code, steer(LATENTS, amount)).code.to_dense()[..., 9], dense[..., 9] + 3)


def test_latents_may_be_none_or_a_mask(dense: Tensor) -> None:
    code = code_of("fixed", dense)
    for edit in (ablate([]), steer([], 2.0), clamp(torch.zeros(16, dtype=torch.bool), 1.0)):
        assert torch.equal(applied(code, edit).code.to_dense(), dense)
    assert not applied(code, ablate(torch.ones(16, dtype=torch.bool))).code.to_dense().any()
    assert ablate(np.int64(3)).latents.tolist() == ablate({3}).latents.tolist() == [3]


def test_an_edit_is_a_value() -> None:
    latents, amounts = torch.tensor([1, 2]), torch.tensor([1.0, 2.0])
    edit = steer(latents, amounts)
    latents[0], amounts[0] = 5, 5.0
    assert edit.latents.tolist() == [1, 2]
    assert edit.amount.tolist() == [1, 2]
    assert [repr(each) for each in (ablate(3), steer([1, 2], 0.5, at="new"), clamp(range(9), range(9)))] == [
        "ablate(3)", "steer([1, 2], 0.5, at='new')", "clamp(9 latents, 9 numbers)",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ablate(1.5), DtypeError, "ablate: expected the number of a latent, several, or a mask.* got float"),
        (lambda: ablate(True), DtypeError, "got bool"),
        (lambda: ablate("3"), DtypeError, "got str"),
        (lambda: ablate([[1, 2]]), DtypeError, "got list"),
        (lambda: ablate(torch.ones(3)), DtypeError, r"got \[3\] of torch.float32"),
        (lambda: steer([3, 4, 3], 1.0), ConfigError, "steer: expected each latent once, got 3 several times"),
        (lambda: steer(3, "much"), DtypeError, "steer: expected a number, or one for each latent, got str"),
        (lambda: steer(3, True), DtypeError, "got bool"),
        (lambda: clamp(3, None), DtypeError, "clamp: expected a number.* got NoneType"),
        (lambda: clamp([1, 2], [1.0, 2.0, 3.0]), ShapeError, r"or one for each of 2 latents, got \[3\]"),
        (lambda: scale(1, float("nan")), ConfigError, "scale: expected finite numbers, got nan"),
        (lambda: steer(3, torch.tensor([True])), DtypeError, "got Tensor"),
    ],
)
def test_what_is_no_edit_is_refused(make: Callable[[], Edit], error: type[FlashSAEError], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (steer(16, 1.0), ShapeError, "steer: expected latents of h.1 from 0 to 15, got 16"),
        (ablate([3, -1]), ShapeError, "ablate: expected latents of h.1 from 0 to 15, got -1"),
        (3, DtypeError, "edits: expected what flashsae.ablate, clamp, scale and steer return, or functions, got int"),
        (lambda code: code.acts, DtypeError, "edits: expected a function that returns a SparseCode, got Tensor"),
        (lambda code: code_of("fixed", torch.rand(2, 4, 16)), ShapeError, "edits: h.1: expected a code of the shape"),
    ],
)
def test_edits_of_other_saes_are_refused(edit: Any, error: type[FlashSAEError], message: str, dense: Tensor) -> None:
    with pytest.raises(error, match=message):
        applied(code_of("fixed", dense), edit)
