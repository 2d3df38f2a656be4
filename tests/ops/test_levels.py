"""Nested reconstructions, by prefixes of latents and by budgets of entries, beside dense autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flashsae.errors import ConfigError, DtypeError, FlashSAEError, GradientError, ShapeError
from flashsae.ops import FactoredGradient, Pattern, SparseCode, collect_factors, decode_loss, take_rows
from flashsae.optim import FactoredAdam
from flashsae.testing import assert_as_accurate, integer_inputs, poison_empty
from helpers.codes import dense_of, ragged, to
from helpers.on_both import DEVICE, as_float64
from helpers.steps import Tensors, leaves

N, D = 20, 7
NAMES = ("acts", "W_dec", "b_dec", "target")


@pytest.fixture(params=["reference", "sparse kernels", "dense products"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test in three ways; where its tensors are to lie."""
    if request.param == "reference":
        monkeypatch.setenv("FLASHSAE_BACKEND", "reference")
        return "cpu"
    pytest.importorskip("triton")
    monkeypatch.setenv("FLASHSAE_BACKEND", "triton")
    monkeypatch.setenv("FLASHSAE_DENSE_ABOVE", "0" if request.param == "dense products" else "1")
    from flashsae.ops.decode import launch

    monkeypatch.setattr(launch, "LEVELS_CHUNK", 4)  # so that even these few columns are several chunks
    return DEVICE


sparse = pytest.mark.parametrize("device", ["reference", "sparse kernels"], indirect=True)


def fixed(B: int, k: int, generator: torch.Generator, *, n: int = N, ascends: bool = True) -> Pattern:
    latents = torch.rand(B, n, generator=generator).topk(k).indices
    return Pattern.topk(latents.sort().values if ascends else latents, n)


def inputs_of(pattern: Pattern, generator: torch.Generator, *, integer: bool = True, d: int = D) -> Tensors:
    B, n = pattern.B, pattern.d_sae
    shapes = {"acts": tuple(pattern.latents.shape), "W_dec": (n, d), "b_dec": (d,), "target": (B, d)}
    if integer:
        p = {name: integer_inputs(*shape, generator=generator, largest=1) for name, shape in shapes.items()}
    else:
        p = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    return p | {"token_weights": torch.randint(0, 3, (B,), generator=generator).float()}


def results(losses: Tensor, weights: Tensor, p: Tensors, residual: Tensor) -> Tensors:
    grads = torch.autograd.grad((losses * weights.to(losses)).sum() * 3, [p[n] for n in NAMES])
    return {"losses": losses.detach(), "residual": residual.detach()} | dict(zip(NAMES, grads))


def dense(pattern: Pattern, inputs: Tensors, levels: dict[str, Any], weights: Tensor) -> Tensors:
    """Decode every level from a dense code of its own."""
    p = leaves(inputs)
    losses, residual = [], p["target"]
    for limit in next(iter(levels.values())):
        if "prefixes" in levels:
            kept = pattern.latents < int(limit)
        else:
            kept = (torch.arange(pattern.latents.shape[1]) < limit).expand_as(pattern.latents)
        code = dense_of(pattern, torch.where(kept, p["acts"], 0))
        residual = p["target"] - code @ p["W_dec"] - p["b_dec"]
        losses.append((residual.square().sum(1) * p["token_weights"].detach()).sum())
    return results(torch.stack(losses), weights, p, residual)


def ours(pattern: Pattern, inputs: Tensors, levels: dict[str, Any], weights: Tensor | list[float]) -> Tensors:
    p = leaves(inputs)
    with poison_empty():
        found = decode_loss(
            SparseCode(pattern, p["acts"]), p["W_dec"], p["b_dec"], p["target"],
            token_weights=p["token_weights"].detach(), **levels, level_weights=weights,
        )  # fmt: skip
        assert not found.level_losses.requires_grad
        grads = torch.autograd.grad(found.loss * 3, [p[n] for n in NAMES])
    result = {"losses": found.level_losses, "loss": found.loss.detach(), "residual": found.residual}
    return result | dict(zip(NAMES, grads))


def used(key: str, tensor: Tensor, pattern: Pattern) -> Tensor:
    """Return what is defined: places of a code that are not used hold anything."""
    return tensor[: int(pattern.starts[-1])] if key == "acts" and pattern.starts is not None else tensor


CASES = {
    "fixed": ("fixed", {"prefixes": (3, 11, N)}),
    "not in order": ("not in order", {"prefixes": (3, 11, N)}),
    "repeats": ("repeats", {"prefixes": (3, 11, N)}),
    "varying": ("varying", {"prefixes": (3, 11, N)}),
    "levels without entries": ("varying", {"prefixes": (1, 2, 3, 4, 5, 6, 7, 18, 19, N)}),
    "one level": ("fixed", {"prefixes": (N,)}),
    "all budgets": ("not in order", {"budgets": (1, 2, 3, 4, 5, 6)}),
    "some budgets": ("fixed", {"budgets": [1, 4, 6]}),
    "one budget": ("repeats", {"budgets": (6,)}),
    "overflowed": ("overflowed", {"prefixes": (3, 11, N)}),
    "no tokens": ("no tokens", {"prefixes": (3, N)}),
    "no entries": ("no entries", {"prefixes": (3, N)}),
    "full": ("full", {"prefixes": (3, 11, N)}),
    "full, budgets": ("full", {"budgets": (3, 11, N)}),
    "sampled": ("varying", {"prefixes": torch.tensor([2, 9, N])}),
    "sampled, fixed": ("fixed", {"prefixes": torch.tensor([2, 9, N], dtype=torch.int32)}),
}


def pattern_of(kind: str, generator: torch.Generator) -> Pattern:
    if kind == "varying":
        return ragged([0, 7, 2, 12, 1, 20], N, generator, spare=2)
    if kind == "overflowed":  # the last tokens have lost entries
        full = ragged([3, 5, 2, 4], N, generator)
        assert full.starts is not None
        return Pattern(full.latents[:9], N, full.starts.clamp_max(9), torch.tensor(14))
    if kind == "no entries":
        return ragged([0, 0, 0], N, generator, spare=2)
    if kind == "full":
        return Pattern.full(4, N)
    if kind == "repeats":
        return Pattern.topk(torch.randint(0, N, (5, 6), generator=generator), N)
    return fixed(0 if kind == "no tokens" else 5, 6, generator, ascends=kind != "not in order")


@pytest.mark.parametrize("case", CASES)
def test_t0_integers_are_bitwise_those_of_dense_autograd(case: str, device: str, generator: torch.Generator) -> None:
    kind, levels = CASES[case]
    pattern = pattern_of(kind, generator)
    inputs = inputs_of(pattern, generator)
    weights = torch.arange(1.0, 1 + len(next(iter(levels.values()))))
    exact = dense(pattern, as_float64(inputs), levels, weights)
    there = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in levels.items()}
    given: Tensor | list[float] = weights.to(device) if case == "sampled" else weights.tolist()
    found = ours(to(pattern, device), {n: t.to(device) for n, t in inputs.items()}, there, given)
    assert torch.equal(found.pop("loss").cpu().double(), (exact["losses"] * weights).sum())
    for key, expected in exact.items():
        value = found[key].cpu().double()
        assert torch.equal(used(key, value, pattern), used(key, expected, pattern)), key


@sparse
@pytest.mark.parametrize("kind", ["varying", "fixed", "budgets", "list of budgets"])
def test_t1_and_t3_as_accurate_as_dense_autograd_and_repeatable(
    kind: str, device: str, generator: torch.Generator
) -> None:
    n, k = 60, 13
    pattern = ragged([0, 40, 2, 1, 17, 3], n, generator, spare=4)
    levels: dict[str, Any] = {"prefixes": (4, 8, 15, 30, n)}
    if kind != "varying":
        pattern = fixed(6, k, generator, n=n, ascends=kind == "fixed")
    if "budgets" in kind:
        levels = {"budgets": range(1, k + 1) if kind == "budgets" else (2, 4, 8, k)}
    L = len(next(iter(levels.values())))
    weights = torch.full((L,), 1 / L)
    inputs = inputs_of(pattern, generator, integer=False)
    there = to(pattern, device), {name: t.to(device) for name, t in inputs.items()}
    first, again = (ours(*there, levels, None) for _ in range(2))  # type: ignore[arg-type]
    theirs = dense(pattern, inputs, levels, weights)
    exact = dense(pattern, as_float64(inputs), levels, weights.double())
    for key in exact:
        assert torch.equal(first[key], again[key]), key
        found = [used(key, result[key].cpu(), pattern) for result in (first, theirs, exact)]
        assert_as_accurate(found[0], found[1], found[2], key)


@sparse
@pytest.mark.parametrize("levels", [{"prefixes": (5, 12, N)}, {"budgets": (1, 2, 3, 4, 5, 6)}], ids=["prefixes", "k"])
@pytest.mark.parametrize("precision", [None, "bf16"])
def test_factors_are_the_ordinary_gradient(
    levels: dict[str, Any], precision: Any, device: str, generator: torch.Generator
) -> None:
    pattern = to(fixed(5, 6, generator), device)
    inputs = {name: t.to(device) for name, t in inputs_of(pattern, generator, integer=False).items()}
    grads = []
    for as_factor in (False, True):
        W = inputs["W_dec"].clone().requires_grad_()
        if as_factor:
            collect_factors(W)
        code = SparseCode(pattern, inputs["acts"])
        decode_loss(code, W, None, inputs["target"], **levels, precision=precision).loss.backward()
        grads.append(W.grad)
    assert isinstance(grads[1], FactoredGradient)
    assert torch.equal(grads[0], grads[1].materialize())


def test_one_level_is_the_plain_loss(device: str, generator: torch.Generator) -> None:
    pattern = to(fixed(5, 6, generator), device)
    inputs = {name: t.to(device) for name, t in inputs_of(pattern, generator, integer=False).items()}
    code = SparseCode(pattern, inputs["acts"])
    arguments = code, inputs["W_dec"], inputs["b_dec"], inputs["target"]
    plain = decode_loss(*arguments)
    for levels in ({"prefixes": [N]}, {"budgets": [6]}):
        found = decode_loss(*arguments, **levels)  # type: ignore[arg-type]
        assert all(torch.equal(a, b) for a, b in zip(found, plain))
        assert torch.equal(found.level_losses, plain.loss[None])


@sparse
def test_bfloat16_rows_are_rounded_once(device: str, generator: torch.Generator) -> None:
    pattern = to(ragged([0, 7, 2, 12], N, generator, spare=3), device)
    inputs = {name: t.to(device) for name, t in inputs_of(pattern, generator).items()}
    levels, weights = {"prefixes": (3, 11, N)}, [1.0, 2.0, 1.0]
    wide = ours(pattern, inputs, levels, weights)
    inputs["W_dec"], inputs["b_dec"] = inputs["W_dec"].bfloat16(), inputs["b_dec"].bfloat16()
    narrow = ours(pattern, inputs, levels, weights)
    for key in ("losses", "residual", "acts", "b_dec", "target"):
        assert torch.equal(narrow[key].float(), wide[key]), key
    assert narrow["W_dec"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("levels", "error", "message"),
    [
        ({"prefixes": (3, N), "budgets": (1, 2)}, ConfigError, "prefixes and budgets: expected one of them, got both"),
        ({"budgets": (1, 3)}, ConfigError, "budgets: expected ascending numbers of entries, the last 2 as k, got"),
        ({"budgets": (2, 1, 2)}, ConfigError, "budgets: expected ascending numbers of entries, the last 2 as k, got"),
        ({"budgets": ()}, ConfigError, "budgets: expected ascending numbers of entries, the last 2 as k, got"),
        ({"budgets": (1.0, 2)}, DtypeError, "budgets: expected an int, got float"),
        ({"budgets": torch.tensor([1, 2])}, DtypeError, "budgets: expected ints, got a tensor"),
        ({"prefixes": torch.tensor([3, 19])}, ConfigError, "prefixes: expected ascending numbers of latents, the last"),
        ({"prefixes": torch.tensor([3.0, N])}, DtypeError, "prefixes: expected int32 or int64"),
        ({"prefixes": torch.tensor(N)}, ShapeError, r"prefixes: expected the shape \[L\], got \[\]"),
        ({"level_weights": [1.0]}, ConfigError, "level_weights: expected prefixes or budgets"),
        ({"budgets": (1, 2), "level_weights": [1.0]}, ConfigError, "level_weights: expected 2 finite numbers"),
        ({"budgets": (1, 2), "level_weights": [1.0, float("nan")]}, ConfigError, "level_weights: expected 2 finite"),
        ({"budgets": (1, 2), "level_weights": torch.ones(3)}, ShapeError, r"level_weights: expected the shape \[2\]"),
        (
            {"budgets": (1, 2), "level_weights": torch.ones(2, requires_grad=True)},
            GradientError,
            "level_weights: it receives no gradient here",
        ),
    ],
)
def test_levels_that_are_none_are_refused(levels: dict[str, Any], error: type[FlashSAEError], message: str) -> None:
    code = SparseCode.topk(torch.ones(3, 2), torch.zeros(3, 2, dtype=torch.int64), N)
    with pytest.raises(error, match=message):
        decode_loss(code, torch.ones(N, 3), None, torch.ones(3, 3), **levels)


@pytest.mark.parametrize("prefixes", [(), (3, 3, N), (0, N), (5, 19), (5, 21), (N, 5)])
def test_prefixes_that_do_not_ascend_to_d_sae_are_refused(prefixes: tuple[int, ...]) -> None:
    code = SparseCode.topk(torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int64), N)
    with pytest.raises(ConfigError, match="prefixes: expected ascending numbers of latents, the last 20 as d_sae, got"):
        decode_loss(code, torch.ones(N, 3), None, torch.ones(2, 3), prefixes=prefixes)


def test_budgets_need_a_code_of_k_latents(generator: torch.Generator) -> None:
    pattern = ragged([1, 2], N, generator)
    with pytest.raises(ConfigError, match="budgets: expected a code of k latents for each token, got one whose"):
        decode_loss(SparseCode(pattern, torch.ones(3)), torch.ones(N, 3), None, torch.ones(2, 3), budgets=(1, 2))


def test_a_factor_of_many_levels_stays_one_beside_rows(generator: torch.Generator) -> None:
    pattern = fixed(30, 6, generator)
    inputs = inputs_of(pattern, generator, integer=False)
    W = inputs["W_dec"].requires_grad_()
    with collect_factors(W):
        slots = torch.full((N,), -1, dtype=torch.int32)
        slots[3] = 0
        loss = decode_loss(SparseCode(pattern, inputs["acts"]), W, None, inputs["target"], budgets=range(1, 7)).loss
        (loss + take_rows(W, torch.tensor([3]), slots).sum()).backward()
        assert isinstance(W.grad, FactoredGradient)
        assert sorted(type(factor).__name__ for factor in W.grad.factors or ()) == ["RowFactor", "SparseFactor"]
        expected = W.grad.materialize()
        decode_loss(SparseCode(pattern, inputs["acts"]), W, None, inputs["target"], budgets=range(1, 7)).loss.backward()
        assert [type(factor).__name__ for factor in W.grad.factors or ()] == ["RowFactor"]  # else memory grows
        first = expected.index_add(0, torch.tensor([3]), -torch.ones(1, D))
        torch.testing.assert_close(W.grad.materialize(), expected + first)


@pytest.mark.parametrize("device", ["sparse kernels"], indirect=True)
def test_rows_of_levels_without_entries_are_written_too(device: str, generator: torch.Generator) -> None:
    latents = torch.tensor([5, 6, 6, 0], dtype=torch.int32)
    rows = torch.tensor([1, 1, 5, 8], dtype=torch.int32)  # of 3 tokens at 4 levels
    starts = torch.searchsorted(rows, torch.arange(13, dtype=torch.int32)).int()
    weights, target = torch.full((4,), 0.25, dtype=torch.float64), torch.randn(3, D, generator=generator)
    W_dec = torch.randn(N, D, generator=generator)
    with poison_empty():
        found = torch.ops.flashsae.decode_levels(
            torch.rand(4, generator=generator), [latents, rows, starts], W_dec, None, target, None, weights, False
        )
    assert all(tensor.isfinite().all() for tensor in found)
    assert (found[5] != 0).any(1).nonzero().flatten().tolist() == [1, 5, 8]


@sparse
@pytest.mark.parametrize("levels", [{"prefixes": (5, 12, N)}, {"budgets": (1, 2, 3, 4, 5, 6)}], ids=["prefixes", "k"])
def test_the_latent_pass_takes_the_factor(levels: dict[str, Any], device: str, generator: torch.Generator) -> None:
    pattern = to(fixed(5, 6, generator), device)
    inputs = {name: t.to(device) for name, t in inputs_of(pattern, generator).items()}
    results = []
    for make in (FactoredAdam, torch.optim.Adam):
        W = torch.nn.Parameter(inputs["W_dec"].clone())
        optimizer = make([W], 1e-2, eps=1e-2)
        L = len(next(iter(levels.values())))
        code = SparseCode(pattern, inputs["acts"])
        decode_loss(code, W, None, inputs["target"], **levels, level_weights=[1.0] * L).loss.backward()
        if isinstance(optimizer, FactoredAdam):
            assert isinstance(W.grad, FactoredGradient)
            norm = optimizer.clip_grad_norm(1.0)
        else:
            norm = torch.nn.utils.clip_grad_norm_([W], 1.0)
        optimizer.step()
        results.append((norm, W.detach()))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)
