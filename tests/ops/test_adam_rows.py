from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from flashsae.errors import DtypeError, ShapeError
from flashsae.ops import build_index
from flashsae.ops.adam_rows import AdamRule, adam_rows, row_squares
from flashsae.ops.adam_rows.reference import merge_halves, round_stochastically, split_halves
from flashsae.ops.factors import RowGradient, SparseFactor
from flashsae.ops.latent_rows.reference import RUN
from flashsae.testing import assert_as_accurate, integer_inputs
from helpers.on_both import DEVICE, as_float64, assert_same, on_kernels, on_reference
from helpers.steps import Tensors

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
LR = 1e-2
HALVES = AdamRule(beta1=0.5, beta2=0.5)
"""Moments of integers are exact with these."""

NANS = torch.tensor([0x7FC00000, 0x7F800001, 0x7FFFFFFF, -1, -0x400000, -0x7FFFFF]).int().view(F32)
"""Of both signs, among them those whose bits a rounding would carry over."""


PARTS = ["nothing", "sparse", "dense", "slots", "sparse dense", "sparse slots"]


@pytest.fixture
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("FLASHSAE_DENSE_ABOVE", "1")


def scalars(rule: AdamRule, step: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Return lr, step and bias_correction as the optimiser makes them."""
    wide = {"dtype": F64, "device": device}
    t = torch.tensor(float(step), **wide)
    return torch.tensor(LR, **wide), t, 1 - torch.tensor([rule.beta1, rule.beta2], **wide) ** t


def inputs_of(
    B: int, k: int, n: int, d: int, parts: str, generator: torch.Generator, *, integer: bool, rows: torch.dtype = F32
) -> Tensors:
    """Return a state and the named parts of a gradient. Integer rows of weights are unit vectors, so that they project
    exactly."""

    def numbers(*shape: int) -> Tensor:
        if integer:
            return integer_inputs(*shape, generator=generator)
        return torch.randn(*shape, generator=generator)

    weights = torch.eye(d)[torch.randint(0, d, (n,), generator=generator)]
    weights *= torch.randint(0, 2, (n, 1), generator=generator) * 2.0 - 1
    if not integer:
        weights = torch.nn.functional.normalize(numbers(n, d), dim=1)
    p = {"weights": weights, "exp_avg": numbers(n, d), "exp_avg_sq": numbers(n, d).square() + 1}
    if "sparse" in parts:
        top_indices = torch.randint(0, n, (B, k), generator=generator)
        top_indices[:, 0] = n // 2  # active on every token
        p |= {"top_indices": top_indices, "coeffs": numbers(B, k), "rows": numbers(B, d).to(rows)}
    if "dense" in parts:
        p["dense"] = numbers(n, d).to(rows)
    if "slots" in parts:
        p["dense"] = numbers(max(1, n // 2), d).to(rows)
        order = torch.randperm(n, generator=generator).int()
        p["slots"] = torch.where(order < len(p["dense"]), order, -1)
    return p


def gradient_of(p: Tensors) -> RowGradient:
    sparse = None
    if "rows" in p:
        sparse = SparseFactor(build_index(p["top_indices"], len(p["weights"])), p["coeffs"], p["rows"])
    return RowGradient(sparse, p.get("dense"), p.get("slots"))


def one_step(p: Tensors, rule: AdamRule, step: int = 3, *, split: bool = False, moments: torch.dtype = F32) -> Tensors:
    """Return the state after a step; split weights come back merged, and their high halves too."""
    weights, low = split_halves(p["weights"]) if split else (p["weights"].clone(), None)
    dtype = moments if p["exp_avg"].dtype == F32 else F64
    after = [p[name].to(dtype, copy=True) for name in ("exp_avg", "exp_avg_sq")]
    lr, t, bias_correction = scalars(rule, step, weights.device)
    adam_rows(weights, (after[0], after[1]), gradient_of(p), lr, t, bias_correction, rule, low=low)
    result = {"weights": weights, "exp_avg": after[0], "exp_avg_sq": after[1]}
    return result if low is None else {**result, "weights": merge_halves(weights, low), "high": weights}


def dense_gradient(p: Tensors, unit_norm: bool) -> Tensor:
    gradient = torch.zeros_like(p["weights"])
    if "rows" in p:
        code = p["coeffs"].new_zeros(len(p["coeffs"]), len(gradient)).scatter_add(1, p["top_indices"], p["coeffs"])
        gradient += code.T @ p["rows"].to(code.dtype)
    if "dense" in p:
        slots = p.get("slots", torch.arange(len(gradient))).tolist()
        for latent, slot in enumerate(slots):
            if slot >= 0:
                gradient[latent] += p["dense"][slot]
    if unit_norm:
        gradient -= (gradient * p["weights"]).sum(1, keepdim=True) * p["weights"]
    return gradient


def dense_step(p: Tensors, rule: AdamRule, step: int = 3) -> Tensors:
    """Do what the docstring says, with no thought of speed."""
    gradient = dense_gradient(p, rule.unit_norm) + rule.weight_decay * p["weights"]
    exp_avg = rule.beta1 * p["exp_avg"] + (1 - rule.beta1) * gradient
    exp_avg_sq = rule.beta2 * p["exp_avg_sq"] + (1 - rule.beta2) * gradient**2
    first, second = exp_avg / (1 - rule.beta1**step), exp_avg_sq / (1 - rule.beta2**step)
    weights = p["weights"] - LR * first / (second.sqrt() + rule.eps)
    if rule.unit_norm:
        weights /= weights.norm(dim=1, keepdim=True)
    return {"weights": weights, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}


def torch_steps(start: Tensor, gradients: list[Tensor], rule: AdamRule) -> list[Tensor]:
    """Return the weights after each step of `torch.optim.Adam`; projection and norm written out."""
    weights = start.clone()
    betas = rule.beta1, rule.beta2
    adam = torch.optim.Adam([weights], LR, betas, rule.eps, weight_decay=rule.weight_decay, foreach=False)
    after = []
    for gradient in gradients:
        along = (gradient * weights).sum(1, keepdim=True) * weights
        weights.grad = gradient - along if rule.unit_norm else gradient.clone()
        adam.step()
        if rule.unit_norm:
            weights /= weights.norm(dim=1, keepdim=True)
        after.append(weights.clone())
    return after


def our_steps(start: Tensor, gradients: list[Tensor], rule: AdamRule) -> list[Tensor]:
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
    start = torch.nn.functional.normalize(torch.randn(9, 5, generator=generator), dim=1)
    gradients = [torch.randn(9, 5, generator=generator) for _ in range(20)]
    for gradient in gradients[1:]:
        gradient[4] = 0.0
    wide = start.double(), [gradient.double() for gradient in gradients]
    exact = torch_steps(*wide, rule)
    for ours, theirs in zip(our_steps(*wide, rule), exact):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    for ours, theirs, truth in zip(our_steps(start, gradients, rule), torch_steps(start, gradients, rule), exact):
        assert_as_accurate(ours, theirs, truth)


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize(("split", "moments"), [(False, F32), (True, BF16)])
def test_t3_any_number_of_rows_at_once_gives_the_same_bits(
    split: bool, moments: torch.dtype, parts: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    d = 7
    p = inputs_of(RUN + 9, 2, 11, d, parts, generator, integer=False)
    results = []
    for rows in (11, 4, 1):
        monkeypatch.setattr("flashsae.ops.adam_rows.op._CACHED_ELEMENTS", rows * d)
        squares = row_squares(p["weights"], gradient_of(p), unit_norm=True)
        results.append(one_step(p, AdamRule(unit_norm=True), split=split, moments=moments) | {"squares": squares})
    for name, whole in results[0].items():
        assert all(torch.equal(whole, part[name]) for part in results[1:]), name


def test_rows_without_gradient_move_by_their_momentum(generator: torch.Generator) -> None:
    gradients = [torch.randn(2, 3, generator=generator), *[torch.zeros(2, 3)] * 3]
    after = our_steps(torch.ones(2, 3), gradients, AdamRule())
    assert all(bool((before != now).all()) for before, now in pairwise(after))


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("unit_norm", [False, True])
def test_t1_steps_of_the_kernels_are_those_of_torch_adam(unit_norm: bool, generator: torch.Generator) -> None:
    rule = AdamRule(weight_decay=0.1, unit_norm=unit_norm)
    start = torch.nn.functional.normalize(torch.randn(5, 7, generator=generator), dim=1)
    gradients = {f"{number:02}": torch.randn(5, 7, generator=generator) for number in range(6)}
    ours = on_kernels(lambda q: dict(zip(gradients, our_steps(start.to(DEVICE), list(q.values()), rule))), gradients)
    theirs = torch_steps(start, list(gradients.values()), rule)
    exact = torch_steps(start.double(), list(as_float64(gradients).values()), rule)
    for number, truth in enumerate(exact):
        assert_as_accurate(ours[f"{number:02}"], theirs[number], truth, f"step {number}")


SHAPES = [(0, 2, 5, 3), (1, 1, 1, 1), (9, 1, 6, 7), (37, 3, 11, 37), (5, 2, 4, 130), (5, 2, 3, 600), (RUN + 9, 2, 3, 5)]


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("unit_norm", [False, True], ids=["free", "unit norm"])
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize(("B", "k", "n", "d"), SHAPES)
def test_t0_moments_and_t1_weights(
    B: int, k: int, n: int, d: int, parts: str, unit_norm: bool, generator: torch.Generator
) -> None:
    rule = replace(HALVES, unit_norm=unit_norm)
    p = inputs_of(B, k, n, d, parts, generator, integer=True, rows=BF16 if d % 2 else F32)
    ours, theirs = (on(lambda q: one_step(q, rule), p) for on in (on_kernels, on_reference))
    exact = dense_step(as_float64(p), rule)
    weights = [result.pop("weights") for result in (ours, theirs, exact)]
    assert_same(ours, theirs, exact)
    assert_as_accurate(*weights, "weights")


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("rows", [F32, BF16])
@pytest.mark.parametrize("unit_norm", [False, True], ids=["free", "unit norm"])
def test_t1_a_step(unit_norm: bool, rows: torch.dtype, generator: torch.Generator) -> None:
    rule = AdamRule(weight_decay=0.1, unit_norm=unit_norm)
    p = inputs_of(2 * RUN + 9, 2, 5, 37, "sparse slots", generator, integer=False, rows=rows)
    theirs, exact = dense_step(p, rule), dense_step(as_float64(p), rule)
    for ours in (on_kernels(lambda q: one_step(q, rule), p), on_reference(lambda q: one_step(q, rule), p)):
        for name in exact:
            assert_as_accurate(ours[name], theirs[name], exact[name], name)


@pytest.mark.usefixtures("_kernels")
def test_t3_two_steps_give_the_same_bits(generator: torch.Generator) -> None:
    p = inputs_of(2 * RUN + 9, 2, 5, 37, "sparse slots", generator, integer=False)
    first, second = (on_kernels(lambda q: one_step(q, AdamRule(unit_norm=True), moments=BF16), p) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("unit_norm", [False, True], ids=["free", "unit norm"])
@pytest.mark.parametrize("d", [7, 600])
def test_a_step_on_halves_is_that_on_whole_weights_bit_for_bit(
    d: int, unit_norm: bool, generator: torch.Generator
) -> None:
    p = inputs_of(9, 2, 5, d, "sparse", generator, integer=False)
    rule = AdamRule(unit_norm=unit_norm)
    for on in (on_kernels, on_reference):
        whole, split = on(lambda q: one_step(q, rule), p), on(lambda q: one_step(q, rule, split=True), p)
        for name in whole:
            assert torch.equal(whole[name], split[name]), name
        assert not torch.equal(whole["weights"], whole["weights"].bfloat16().float())


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("step", [1, 1000])
@pytest.mark.parametrize("d", [37, 600])
def test_bfloat16_moments_are_those_of_float32_rounded_to_the_same_bits(
    d: int, step: int, generator: torch.Generator
) -> None:
    p = inputs_of(37, 3, 5, d, "sparse", generator, integer=True)
    p["coeffs"] *= 37  # more digits than bfloat16 has
    p["exp_avg"], p["exp_avg_sq"] = p["exp_avg"].bfloat16().float(), p["exp_avg_sq"].bfloat16().float()
    exact = dense_step(as_float64(p), HALVES)
    for on in (on_kernels, on_reference):
        ours = on(lambda q: one_step(q, HALVES, step, moments=BF16), p)
        for number, name in enumerate(("exp_avg", "exp_avg_sq")):
            rounded = round_stochastically(exact[name].float(), torch.tensor(float(step)), number)
            assert ours[name].dtype == BF16
            assert torch.equal(ours[name], rounded), name
            assert not torch.equal(ours[name].double(), exact[name])


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy, in the interpreter
@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("moments", [F32, BF16])
def test_nan_and_infinity_show_and_harm_no_other_row(
    moments: torch.dtype, split: bool, generator: torch.Generator
) -> None:
    p = inputs_of(0, 1, 6, 7, "dense", generator, integer=False)

    def run(q: Tensors) -> Tensors:
        return one_step(q, AdamRule(), split=split, moments=moments)

    clean = {on: on(run, p) for on in (on_kernels, on_reference)}
    p["dense"][1, 6] = NANS[2]  # what a GPU computes
    p["dense"][4, 0] = torch.inf
    for on, expected in clean.items():
        ours = on(run, p)
        for name in ours:
            assert ours[name][1].isnan().tolist() == [False] * 6 + [True], name
            assert ours[name][4].isfinite().tolist() == [False] + [True] * 6, name
            for row in (0, 2, 3, 5):
                assert torch.equal(ours[name][row], expected[name][row]), name
        assert bool(ours["exp_avg"][4, 0].isinf())


@pytest.mark.usefixtures("_kernels")
def test_a_row_of_zeros_stays_one(generator: torch.Generator) -> None:
    p = inputs_of(0, 1, 3, 5, "nothing", generator, integer=False)
    for tensor in p.values():
        tensor[1] = 0.0
    for on in (on_kernels, on_reference):
        ours = on(lambda q: one_step(q, AdamRule(unit_norm=True)), p)
        assert ours["weights"][1].tolist() == [0.0] * 5
        torch.testing.assert_close(ours["weights"][[0, 2]].norm(dim=1), torch.ones(2))


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("parts", ["sparse dense", "sparse slots"])
def test_t0_parts_that_are_not_contiguous(parts: str, generator: torch.Generator) -> None:
    p = inputs_of(9, 2, 6, 7, parts, generator, integer=True)
    strided = {**p, "coeffs": p["coeffs"].T.contiguous().T, "rows": p["rows"].repeat(1, 2)[:, 7:]}
    strided["dense"] = p["dense"].T.contiguous().T
    expanded = {**p, "rows": p["rows"][:, :1].expand(-1, 7), "dense": p["dense"][:, :1].expand(-1, 7)}
    for inputs in (strided, expanded):
        packed = {name: tensor.contiguous() for name, tensor in inputs.items()}
        ours = on_kernels(lambda q: one_step(q, HALVES), inputs)
        for on in (on_kernels, on_reference):
            expected = on(lambda q: one_step(q, HALVES), packed)
            assert torch.equal(ours["exp_avg"], expected["exp_avg"])
            assert torch.equal(ours["exp_avg_sq"], expected["exp_avg_sq"])


@pytest.mark.usefixtures("_kernels")
def test_weights_that_have_no_low_halves_are_rounded_once(generator: torch.Generator) -> None:
    p = inputs_of(9, 2, 5, 7, "sparse", generator, integer=False)
    p["weights"] = p["weights"].bfloat16()
    exact = dense_step(as_float64(p), AdamRule())
    for on in (on_kernels, on_reference):
        ours = on(lambda q: one_step(q, AdamRule()), p)
        assert_as_accurate(ours["weights"], exact["weights"].bfloat16(), exact["weights"])
        assert not torch.equal(ours["weights"], p["weights"])


EXTREMES = [0.0, -0.0, 1.0, 1e-45, -1e-45, 1e-39, 1e30, 3.4028235e38, -3.4028235e38, torch.inf, -torch.inf]


def test_halves_merge_to_the_same_bits(generator: torch.Generator) -> None:
    bits = torch.randint(-(2**31), 2**31, (1000,), generator=generator).int()
    any_finite = bits.view(F32)[bits.view(F32).isfinite()]
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001], dtype=torch.int32).view(F32)
    numbers = torch.cat([any_finite, ties, torch.tensor(EXTREMES)])
    high, low = split_halves(numbers)
    assert (high.dtype, low.dtype) == (BF16, torch.int16)
    assert torch.equal(merge_halves(high, low).view(torch.int32), numbers.view(torch.int32))
    error = (high[:-6].double() - numbers[:-6].double()).abs()
    assert bool((error <= (numbers[:-6].bfloat16().double() - numbers[:-6].double()).abs()).all())  # rounds to nearest


@pytest.mark.usefixtures("_kernels")
def test_extreme_weights_pass_a_step_of_zero_unchanged() -> None:
    weights = torch.tensor([EXTREMES[:-2]])
    p = {"weights": weights, "exp_avg": torch.zeros_like(weights), "exp_avg_sq": torch.ones_like(weights)}
    for on in (on_kernels, on_reference):
        after = on(lambda q: one_step(q, AdamRule(), split=True), p)["weights"]
        assert torch.equal(after.view(torch.int32), weights.view(torch.int32))


def test_the_halves_of_every_nan_are_nan() -> None:
    high, low = split_halves(NANS)
    assert bool(NANS.isnan().all())
    assert bool(high.isnan().all())
    assert bool(merge_halves(high, low).isnan().all())


def test_stochastic_rounding_has_the_right_mean_and_errs_by_less_than_a_unit(generator: torch.Generator) -> None:
    values = torch.randn(8, 40, generator=generator) * 10.0 ** torch.randint(-30, 30, (8, 40), generator=generator)
    exponent = torch.frexp(values).exponent.double()
    unit = 2.0 ** (exponent - 8)
    steps = 1000
    errors = torch.stack(
        [
            torch.stack([round_stochastically(values, torch.tensor(float(step)), number) for number in (0, 1)]).double()
            - values.double()
            for step in range(1, steps + 1)
        ]
    )
    assert bool((errors.abs() < unit).all())
    mean = errors.mean(0) / unit
    assert mean.abs().max().item() < 5 * 0.5 / steps**0.5
    assert mean.mean().abs().item() < 5 * 0.5 / (steps * mean.numel()) ** 0.5


def test_stochastic_rounding_gives_each_number_and_step_and_moment_its_own_noise() -> None:
    values = torch.full((64, 64), 1 + 2.0**-8)  # half way between two numbers of bfloat16
    up = [
        (round_stochastically(values, torch.tensor(float(step)), number) > 1).double() - 0.5
        for step, number in ((1, 0), (2, 0), (1, 1))
    ]
    pairs = [(up[0], up[1]), (up[0], up[2]), (up[0], up[0].T), (up[0], up[0].roll(1, 0)), (up[0], up[0].roll(1, 1))]
    for a, b in pairs:
        assert abs(4 * (a * b).mean().item()) < 5 / 64


def test_stochastic_rounding_keeps_what_bfloat16_holds() -> None:
    values = torch.tensor([[0.0, -0.0, 1.5, -3.0, torch.inf, -torch.inf, 2.0**-133]])
    for step in range(50):
        for number in (0, 1):
            t = torch.tensor(float(step))
            rounded = round_stochastically(values, t, number).float()
            assert torch.equal(rounded.view(torch.int32), values.view(torch.int32))
            assert bool(round_stochastically(NANS[None], t, number).isnan().all())


def test_row_squares_are_those_written_out() -> None:
    weights = torch.tensor([[0.6, 0.8], [1.0, 0.0], [0.0, 1.0]])
    gradient = RowGradient(dense=torch.tensor([[3.0, 4.0], [3.0, 4.0]]), slots=torch.tensor([0, -1, 1]).int())
    assert row_squares(weights, gradient, unit_norm=False).tolist() == [25.0, 0.0, 25.0]
    assert row_squares(weights, gradient, unit_norm=True).tolist() == pytest.approx([0.0, 0.0, 9.0], abs=1e-10)
    assert row_squares(weights, RowGradient(), unit_norm=False).tolist() == [0.0] * 3


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("unit_norm", [False, True], ids=["free", "unit norm"])
@pytest.mark.parametrize("parts", ["nothing", "sparse", "sparse slots"])
@pytest.mark.parametrize(("B", "k", "n", "d"), SHAPES)
def test_t0_row_squares(
    B: int, k: int, n: int, d: int, parts: str, unit_norm: bool, generator: torch.Generator
) -> None:
    p = inputs_of(B, k, n, d, parts, generator, integer=True)

    def run(q: Tensors) -> Tensors:
        return {"squares": row_squares(q["weights"], gradient_of(q), unit_norm)}

    exact = {"squares": dense_gradient(as_float64(p), unit_norm).square().sum(1)}
    assert_same(on_kernels(run, p), on_reference(run, p), exact)


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("unit_norm", [False, True], ids=["free", "unit norm"])
@pytest.mark.parametrize("d", [37, 600])
def test_t1_row_squares(d: int, unit_norm: bool, generator: torch.Generator) -> None:
    p = inputs_of(RUN + 9, 2, 5, d, "sparse slots", generator, integer=False)
    p["weights"] *= torch.linspace(0.5, 1.5, 5)[:, None]  # norms need not be 1
    theirs, exact = (dense_gradient(q, unit_norm).square().sum(1) for q in (p, as_float64(p)))
    for on in (on_kernels, on_reference):
        ours = on(lambda q: {"squares": row_squares(q["weights"], gradient_of(q), unit_norm)}, p)["squares"]
        assert_as_accurate(ours, theirs, exact)


@pytest.mark.usefixtures("_kernels")
def test_row_squares_of_halves_see_whole_weights_and_in_kernels_the_high_ones(generator: torch.Generator) -> None:
    p = inputs_of(9, 2, 5, 37, "sparse", generator, integer=False)

    def run(q: Tensors) -> Tensors:
        high, low = split_halves(q["weights"])
        pairs = {"split": (high, low), "whole": (q["weights"], None), "high": (high, None)}
        return {n: row_squares(w, gradient_of(q), True, low=halves) for n, (w, halves) in pairs.items()}

    ours, theirs = on_kernels(run, p), on_reference(run, p)
    assert torch.equal(theirs["split"], theirs["whole"])
    assert torch.equal(ours["split"], ours["high"])
    assert not torch.equal(theirs["high"], theirs["whole"])
    before = dense_gradient(p, unit_norm=False).square().sum(1)
    assert bool(((ours["split"] - theirs["whole"]).abs() <= 2**-8 * before).all())


@pytest.mark.usefixtures("_kernels")
def test_rows_too_long_for_a_program_take_the_reference(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    from flashsae.ops.adam_rows import launch

    def launched(*_: object, **__: object) -> None:
        raise RuntimeError("launched")

    p = inputs_of(9, 2, 5, 7, "sparse", generator, integer=False)
    monkeypatch.setattr(launch, "launch_adam_rows", launched)
    monkeypatch.setattr(launch, "LARGEST_ROW", 7)
    with pytest.raises(RuntimeError, match="launched"):
        on_kernels(lambda q: one_step(q, AdamRule(unit_norm=True)), p)
    monkeypatch.setattr(launch, "LARGEST_ROW", 6)
    with pytest.raises(RuntimeError, match="launched"):  # in slices it has room
        on_kernels(lambda q: one_step(q, AdamRule()), p)
    ours, theirs = (on(lambda q: one_step(q, AdamRule(unit_norm=True)), p) for on in (on_kernels, on_reference))
    torch.testing.assert_close(ours, theirs)


def test_bad_arguments_are_named() -> None:
    rule, weights = AdamRule(), torch.zeros(4, 3)

    def step(weights: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, low: Tensor | None = None) -> None:
        adam_rows(weights, (exp_avg, exp_avg_sq), RowGradient(), *scalars(rule, 1), rule, low=low)

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
    with pytest.raises(ShapeError, match=r"gradient\.dense: expected the shape \[4, 3\], got \[2, 3\]"):
        row_squares(weights, RowGradient(dense=torch.zeros(2, 3)), False)
    with pytest.raises(ShapeError, match=r"gradient\.slots: expected the shape \[4\]"):
        row_squares(weights, RowGradient(dense=torch.zeros(2, 3), slots=torch.zeros(3, dtype=torch.int32)), False)
    with pytest.raises(ShapeError, match=r"low: expected the shape \[4, 3\], got \[4, 2\]"):
        step(weights.bfloat16(), weights, weights, torch.zeros(4, 2).short())
    with pytest.raises(DtypeError, match=r"weights and low: .* got torch\.float32 and torch\.int16"):
        step(weights, weights, weights, weights.short())
    with pytest.raises(DtypeError, match=r"weights and low: .* got torch\.bfloat16 and torch\.int32"):
        row_squares(weights.bfloat16(), RowGradient(), False, low=weights.int())
    with pytest.raises(ShapeError, match=r"weights: expected the shape \[d_sae, d\], got \[4\]"):
        row_squares(weights[:, 0], RowGradient(), False)
