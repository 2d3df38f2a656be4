"""The latent pass is a step of Adam: beside torch.optim.Adam, and beside the formulas written out in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from flashsae.errors import DtypeError, ShapeError
from flashsae.ops.adam_rows import AdamRule, adam_rows, row_squares
from flashsae.ops.factors import RowGradient
from flashsae.ops.latent_rows.reference import RUN
from flashsae.testing import UnitNormAdam, assert_as_accurate
from helpers.latent_pass import BACKENDS, LR, PARTS, SHAPES, dense_step, pass_inputs, row_gradient, scalars, step_on
from helpers.on_both import DEVICE, as_float64, assert_same, on_kernels
from helpers.steps import Tensors

BF16, F32 = torch.bfloat16, torch.float32


def torch_steps(start: Tensor, gradients: list[Tensor], rule: AdamRule) -> list[Tensor]:
    """Return the weights after each step of `torch.optim.Adam`."""
    weights = start.clone()
    settings = {"betas": (rule.beta1, rule.beta2), "eps": rule.eps, "weight_decay": rule.weight_decay, "foreach": False}
    if rule.unit_norm:
        adam = UnitNormAdam([weights], weights, LR, **settings)
    else:
        adam = torch.optim.Adam([weights], LR, **settings)
    after = []
    for gradient in gradients:
        weights.grad = gradient.clone()
        adam.step()
        after.append(weights.clone())
    return after


def our_steps(start: Tensor, gradients: list[Tensor], rule: AdamRule) -> list[Tensor]:
    """Return the weights after each of our steps."""
    weights, moments = start.clone(), (torch.zeros_like(start), torch.zeros_like(start))
    after = []
    for number, gradient in enumerate(gradients, 1):
        adam_rows(weights, moments, RowGradient(dense=gradient), *scalars(rule, number, start.device), rule)
        after.append(weights.clone())
    return after


@pytest.mark.parametrize("unit_norm", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_twenty_steps_are_those_of_torch_adam(weight_decay: float, unit_norm: bool, generator: torch.Generator) -> None:
    rule = AdamRule(weight_decay=weight_decay, unit_norm=unit_norm)
    start = normalize(torch.randn(9, 5, generator=generator), dim=1)
    gradients = [torch.randn(9, 5, generator=generator) for _ in range(20)]
    for gradient in gradients[1:]:
        gradient[4] = 0.0
    exact_gradients = [gradient.double() for gradient in gradients]
    exact = torch_steps(start.double(), exact_gradients, rule)
    for ours, truth in zip(our_steps(start.double(), exact_gradients, rule), exact):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-14)
    for ours, theirs, truth in zip(our_steps(start, gradients, rule), torch_steps(start, gradients, rule), exact):
        assert_as_accurate(ours, theirs, truth)


@pytest.mark.usefixtures("sparse_kernels")
@pytest.mark.parametrize("unit_norm", [False, True])
def test_t1_steps_of_the_kernels_are_those_of_torch_adam(unit_norm: bool, generator: torch.Generator) -> None:
    rule = AdamRule(weight_decay=0.1, unit_norm=unit_norm)
    start = normalize(torch.randn(5, 7, generator=generator), dim=1)
    gradients = [torch.randn(5, 7, generator=generator) for _ in range(6)]

    def steps(named: Tensors) -> Tensors:
        return dict(zip(named, our_steps(start.to(DEVICE), list(named.values()), rule)))

    ours = on_kernels(steps, {f"step {number}": gradient for number, gradient in enumerate(gradients)})
    theirs = torch_steps(start, gradients, rule)
    exact = torch_steps(start.double(), [gradient.double() for gradient in gradients], rule)
    for name, mine, peer, truth in zip(ours, ours.values(), theirs, exact):
        assert_as_accurate(mine, peer, truth, name)


def test_rows_without_gradient_move_by_their_momentum(generator: torch.Generator) -> None:
    gradients = [torch.randn(2, 3, generator=generator), *[torch.zeros(2, 3)] * 3]
    after = our_steps(torch.ones(2, 3), gradients, AdamRule())
    assert all(bool((before != now).all()) for before, now in pairwise(after))


@pytest.mark.usefixtures("sparse_kernels")
@pytest.mark.parametrize("unit_norm", [False, True], ids=["free", "unit norm"])
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize(("B", "k", "n", "d"), SHAPES)
def test_t0_moments_and_t1_weights(
    B: int, k: int, n: int, d: int, parts: str, unit_norm: bool, generator: torch.Generator
) -> None:
    rule = AdamRule(beta1=0.5, beta2=0.5, unit_norm=unit_norm)  # moments of integers are exact with these
    p = pass_inputs(B, k, n, d, parts, generator, integer=True, rows=BF16 if d % 2 else F32)
    ours, theirs, exact = step_on("kernels", p, rule), step_on("reference", p, rule), dense_step(as_float64(p), rule)
    assert_as_accurate(ours.pop("weights"), theirs.pop("weights"), exact.pop("weights"), "weights")
    assert_same(ours, theirs, exact)


@pytest.mark.usefixtures("sparse_kernels")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [F32, BF16])
@pytest.mark.parametrize("unit_norm", [False, True], ids=["free", "unit norm"])
def test_t1_a_step(unit_norm: bool, rows: torch.dtype, backend: str, generator: torch.Generator) -> None:
    rule = AdamRule(weight_decay=0.1, unit_norm=unit_norm)
    p = pass_inputs(2 * RUN + 9, 2, 5, 37, "sparse slots", generator, integer=False, rows=rows)
    ours, theirs, exact = step_on(backend, p, rule), dense_step(p, rule), dense_step(as_float64(p), rule)
    for name in exact:
        assert_as_accurate(ours[name], theirs[name], exact[name], name)


@pytest.mark.usefixtures("sparse_kernels")
def test_t3_two_steps_give_the_same_bits(generator: torch.Generator) -> None:
    p = pass_inputs(2 * RUN + 9, 2, 5, 37, "sparse slots", generator, integer=False)
    first = step_on("kernels", p, AdamRule(unit_norm=True), moments=BF16)
    second = step_on("kernels", p, AdamRule(unit_norm=True), moments=BF16)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize(("split", "moments"), [(False, F32), (True, BF16)])
def test_t3_any_number_of_rows_at_once_gives_the_same_bits(
    split: bool, moments: torch.dtype, parts: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = pass_inputs(RUN + 9, 2, 11, 7, parts, generator, integer=False)
    results = []
    for rows_at_once in (11, 4, 1):
        monkeypatch.setattr("flashsae.ops.adam_rows.op._CACHED_ELEMENTS", rows_at_once * 7)
        after = step_on("reference", p, AdamRule(unit_norm=True), split=split, moments=moments)
        squares = row_squares(p["weights"], row_gradient(p), unit_norm=True)
        results.append({**after, "squares": squares})
    for name, whole in results[0].items():
        assert torch.equal(whole, results[1][name]), name
        assert torch.equal(whole, results[2][name]), name


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy, in the interpreter
@pytest.mark.usefixtures("sparse_kernels")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("moments", [F32, BF16])
def test_nan_and_infinity_show_and_harm_no_other_row(
    moments: torch.dtype, split: bool, backend: str, generator: torch.Generator
) -> None:
    p = pass_inputs(0, 1, 6, 7, "dense", generator, integer=False)
    clean = step_on(backend, p, AdamRule(), split=split, moments=moments)
    p["dense"][1, 6] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(F32)  # the NaN that a GPU computes
    p["dense"][4, 0] = torch.inf
    after = step_on(backend, p, AdamRule(), split=split, moments=moments)
    for name in after:
        assert after[name][1].isnan().tolist() == [False] * 6 + [True], name
        assert after[name][4].isfinite().tolist() == [False] + [True] * 6, name
        for row in (0, 2, 3, 5):
            assert torch.equal(after[name][row], clean[name][row]), name
    assert bool(after["exp_avg"][4, 0].isinf())


@pytest.mark.usefixtures("sparse_kernels")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_of_zeros_stays_one(backend: str, generator: torch.Generator) -> None:
    p = pass_inputs(0, 1, 3, 5, "nothing", generator, integer=False)
    for tensor in p.values():
        tensor[1] = 0.0
    weights = step_on(backend, p, AdamRule(unit_norm=True))["weights"]
    assert weights[1].tolist() == [0.0] * 5
    torch.testing.assert_close(weights[[0, 2]].norm(dim=1), torch.ones(2))


@pytest.mark.usefixtures("sparse_kernels")
@pytest.mark.parametrize("layout", ["strided", "expanded"])
@pytest.mark.parametrize("parts", ["sparse dense", "sparse slots"])
def test_t0_parts_that_are_not_contiguous(parts: str, layout: str, generator: torch.Generator) -> None:
    p = pass_inputs(9, 2, 6, 7, parts, generator, integer=True)
    if layout == "strided":
        p["coeffs"] = p["coeffs"].T.contiguous().T
        p["rows"] = p["rows"].repeat(1, 2)[:, 7:]
        p["dense"] = p["dense"].T.contiguous().T
    else:
        p["rows"] = p["rows"][:, :1].expand(-1, 7)
        p["dense"] = p["dense"][:, :1].expand(-1, 7)
    packed = {name: tensor.contiguous() for name, tensor in p.items()}
    rule = AdamRule(beta1=0.5, beta2=0.5)  # moments of integers are exact with these
    ours, kernels, reference = (
        step_on("kernels", p, rule),
        step_on("kernels", packed, rule),
        step_on("reference", packed, rule),
    )
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(ours[name], kernels[name]), name
        assert torch.equal(ours[name], reference[name]), name


@pytest.mark.usefixtures("sparse_kernels")
def test_rows_too_long_for_a_program_take_the_reference(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    from flashsae.ops.adam_rows import launch

    def launched(*_: object, **__: object) -> None:
        raise RuntimeError("launched")

    p = pass_inputs(9, 2, 5, 7, "sparse", generator, integer=False)
    monkeypatch.setattr(launch, "launch_adam_rows", launched)
    monkeypatch.setattr(launch, "LARGEST_ROW", 7)
    with pytest.raises(RuntimeError, match="launched"):
        step_on("kernels", p, AdamRule(unit_norm=True))
    monkeypatch.setattr(launch, "LARGEST_ROW", 6)
    with pytest.raises(RuntimeError, match="launched"):  # in slices it has room
        step_on("kernels", p, AdamRule())
    ours, theirs = step_on("kernels", p, AdamRule(unit_norm=True)), step_on("reference", p, AdamRule(unit_norm=True))
    torch.testing.assert_close(ours, theirs)


def test_weights_and_moments_that_do_not_fit_are_named() -> None:
    rule, weights = AdamRule(), torch.zeros(4, 3)

    def step(weights: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
        adam_rows(weights, (exp_avg, exp_avg_sq), RowGradient(), *scalars(rule, 1), rule)

    with pytest.raises(ShapeError, match=r"weights: expected the shape \[d_sae, d\], got \[4\]"):
        step(weights[:, 0], weights[:, 0], weights[:, 0])
    with pytest.raises(ShapeError, match="weights: expected a contiguous tensor"):
        step(weights.T, weights.T, weights.T)
    with pytest.raises(DtypeError, match=r"weights: expected a float tensor, got torch\.int64"):
        step(weights.long(), weights, weights)
    with pytest.raises(ShapeError, match=r"exp_avg: expected the shape \[4, 3\], got \[3, 4\]"):
        step(weights, torch.zeros(3, 4), weights)
    with pytest.raises(ShapeError, match=r"exp_avg_sq: expected the shape \[4, 3\], got \[4, 2\]"):
        step(weights, weights, torch.zeros(4, 2))
    with pytest.raises(DtypeError, match=r"exp_avg_sq: expected torch\.float32 or torch\.bfloat16, got torch\.int16"):
        step(weights, weights, weights.short())
    with pytest.raises(ShapeError, match="exp_avg: expected a contiguous tensor"):
        step(weights, torch.zeros(3, 4).T, weights)
    with pytest.raises(DtypeError, match=r"exp_avg: expected torch\.float64"):
        step(weights.double(), weights, weights)
