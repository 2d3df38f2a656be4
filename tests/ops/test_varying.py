"""Codes whose tokens have different numbers of latents: every operation beside dense autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flashsae.errors import ConfigError, ShapeError
from flashsae.ops import (
    FactoredGradient,
    Pattern,
    SparseCode,
    collect_factors,
    decode,
    decode_loss,
    latent_rows,
    latent_sums,
    per_latent,
    pre_acts,
)
from flashsae.ops.adam_rows import AdamRule, adam_rows, row_squares
from flashsae.ops.encode import varying
from flashsae.ops.factors import RowGradient, SparseFactor
from flashsae.ops.latent_rows.reference import RUN
from flashsae.optim import FactoredAdam
from flashsae.testing import assert_as_accurate, integer_inputs, poison_empty
from helpers.codes import dense_of, ragged, to
from helpers.on_both import DEVICE, as_float64
from helpers.steps import Tensors, leaves

D_SAE, D = 200, 13
CODES: dict[str, tuple[list[int], int]] = {
    "none at all": ([], 0),
    "no tokens but places": ([], 5),
    "empty tokens": ([0, 0, 0], 5),
    "a few": ([3, 0, 7, 1, 0, 12], 0),
    "some above a tile": ([0, 40, 2, 150, 1, 0, 17, 47, 60, 3, 80, 110, 0, 5], 5),
    "one of all": ([200], 0),
}
"""Latents of each token, and places that are not used. Of "some above a tile" a tile is 32, with 8 or 16 more
beside it or twice as large, or 3 or 4 times where a kernel of its own does them; the rest goes in pieces."""


@pytest.fixture(params=["reference", "sparse kernels", "dense products"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test in three ways; where its tensors are to lie."""
    if request.param == "reference":
        monkeypatch.setenv("FLASHSAE_BACKEND", "reference")
        return "cpu"
    pytest.importorskip("triton")
    monkeypatch.setenv("FLASHSAE_BACKEND", "triton")
    monkeypatch.setenv("FLASHSAE_DENSE_ABOVE", "0" if request.param == "dense products" else "1")
    return DEVICE


sparse = pytest.mark.parametrize("device", ["reference", "sparse kernels"], indirect=True)


def inputs_of(pattern: Pattern, generator: torch.Generator, *, integer: bool, d: int = D) -> Tensors:
    B, n = pattern.B, pattern.d_sae
    shapes = {"acts": (pattern.capacity,), "W_dec": (n, d), "b_dec": (d,), "target": (B, d), "upstream": (B, d)}
    shapes |= {"x": (B, d), "W_enc_T": (n, d), "b_enc": (n,), "b_in": (d,), "grad": (pattern.capacity,)}
    if not integer:
        return {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    p = {name: integer_inputs(*shape, generator=generator, largest=1) for name, shape in shapes.items()}
    p["token_weights"] = torch.randint(0, 3, (B,), generator=generator).float()
    return p


def with_gradients(result: Tensor, wanted: Tensors, upstream: Tensor) -> Tensors:
    grads = torch.autograd.grad(result, list(wanted.values()), upstream.to(result.dtype))
    return {"result": result.detach(), **dict(zip(wanted, grads))}


def decoded(pattern: Pattern, inputs: Tensors, *, dense: bool) -> Tensors:
    p = leaves(inputs)
    x_hat = (
        dense_of(pattern, p["acts"]) @ p["W_dec"] + p["b_dec"]
        if dense
        else decode(SparseCode(pattern, p["acts"]), p["W_dec"], p["b_dec"])
    )
    return with_gradients(x_hat, {n: p[n] for n in ("acts", "W_dec", "b_dec")}, inputs["upstream"])


def compared(pattern: Pattern, inputs: Tensors, *, dense: bool) -> Tensors:
    p = leaves(inputs)
    weights = p["token_weights"].detach() if "token_weights" in p else None
    if dense:
        errors = (p["target"] - dense_of(pattern, p["acts"]) @ p["W_dec"] - p["b_dec"]).square().sum(1)
        loss = (errors if weights is None else errors * weights).sum()
    else:
        code = SparseCode(pattern, p["acts"])
        loss = decode_loss(code, p["W_dec"], p["b_dec"], p["target"], token_weights=weights).loss
    return with_gradients(loss, {n: p[n] for n in ("acts", "W_dec", "b_dec", "target")}, torch.tensor(2.0))


def encoded(pattern: Pattern, inputs: Tensors, *, dense: bool) -> Tensors:
    p = leaves(inputs)
    if dense:
        assert pattern.starts is not None
        whole, used = (p["x"] - p["b_in"]) @ p["W_enc_T"].T + p["b_enc"], int(pattern.starts[-1])
        values = whole[pattern.tokens[:used].long(), pattern.latents[:used].long()]
        values = torch.nn.functional.pad(values, (0, pattern.capacity - used))
    else:
        values = pre_acts(p["x"], p["W_enc_T"], p["b_enc"], pattern, b_dec=p["b_in"], precision="float32")
    return with_gradients(values, {n: p[n] for n in ("x", "W_enc_T", "b_enc", "b_in")}, inputs["grad"])


def looked_up(pattern: Pattern, inputs: Tensors, *, dense: bool) -> Tensors:
    p = leaves(inputs)
    if dense:
        values = torch.cat([p["b_enc"], p["b_enc"].new_zeros(1)])[pattern.latents.long()]
    else:
        values = per_latent(p["b_enc"], pattern)
    return with_gradients(values, {"b_enc": p["b_enc"]}, inputs["grad"])


def summed(pattern: Pattern, inputs: Tensors, *, dense: bool) -> Tensors:
    p = leaves(inputs)
    sums = dense_of(pattern, p["acts"]).sum(0) if dense else latent_sums(p["acts"], pattern)
    return with_gradients(sums, {"acts": p["acts"]}, inputs["b_enc"])


OPERATIONS: dict[str, Callable[..., Tensors]] = {
    "decode": decoded,
    "decode_loss": compared,
    "pre_acts": encoded,
    "per_latent": looked_up,
    "latent_sums": summed,
}


def on(device: str, pattern: Pattern, inputs: Tensors) -> tuple[Pattern, Tensors]:
    return to(pattern, device), {name: tensor.to(device) for name, tensor in inputs.items()}


@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_t0_integers_are_bitwise_those_of_dense_autograd(
    name: str, kind: str, device: str, generator: torch.Generator
) -> None:
    counts, spare = CODES[kind]
    pattern = ragged(counts, D_SAE, generator, spare=spare)
    inputs = inputs_of(pattern, generator, integer=True, d=530 if kind == "some above a tile" else D)
    exact = OPERATIONS[name](pattern, as_float64(inputs), dense=True)
    for key in ("acts", "grad"):
        inputs[key][pattern.capacity - spare :] = torch.nan  # what stands in places that are not used is not read
    with poison_empty():
        ours = OPERATIONS[name](*on(device, pattern, inputs), dense=False)
    used = pattern.capacity - spare
    for key, expected in exact.items():
        found = ours[key].cpu().double()
        if expected.shape == (pattern.capacity,):
            assert not spare or name.startswith("decode") or not bool(found[used:].any()), key
            found, expected = found[:used], expected[:used]
        assert torch.equal(found, expected), key


@sparse
@pytest.mark.parametrize("name", OPERATIONS)
def test_t1_and_t3_as_accurate_as_dense_autograd_and_repeatable(
    name: str, device: str, generator: torch.Generator
) -> None:
    pattern = ragged([0, 40, 2, 90, 1, 0, 17, 33, 3], 100, generator, spare=4)
    inputs = inputs_of(pattern, generator, integer=False, d=40)
    ours, again = (OPERATIONS[name](*on(device, pattern, inputs), dense=False) for _ in range(2))
    theirs = OPERATIONS[name](pattern, inputs, dense=True)
    exact = OPERATIONS[name](pattern, as_float64(inputs), dense=True)
    for key in exact:
        assert torch.equal(ours[key], again[key]), key
        assert_as_accurate(ours[key].cpu(), theirs[key], exact[key], key)


@sparse
def test_t0_float64_and_bfloat16(device: str, generator: torch.Generator) -> None:
    pattern = ragged([0, 40, 2, 70], D_SAE, generator, spare=3)
    inputs = inputs_of(pattern, generator, integer=True)
    exact = compared(pattern, as_float64(inputs), dense=True)
    wide = compared(*on(device, pattern, as_float64(inputs)), dense=False)
    inputs["W_dec"], inputs["b_dec"] = inputs["W_dec"].bfloat16(), inputs["b_dec"].bfloat16()
    narrow = compared(*on(device, pattern, inputs), dense=False)
    for key, expected in exact.items():
        assert torch.equal(wide[key].cpu(), expected), key
        if key != "W_dec":  # sums over tokens may exceed what bfloat16 holds exactly
            assert torch.equal(narrow[key].cpu().double(), expected), key
    assert narrow["W_dec"].dtype == torch.bfloat16


@sparse
@pytest.mark.parametrize(("tokens", "spare"), [(3, 7), (RUN + 9, 0), (3 * RUN + 50, 7), (3 * RUN + 50, 2 * RUN)])
def test_t0_sums_of_latents_active_on_many_tokens(
    tokens: int, spare: int, device: str, generator: torch.Generator
) -> None:
    """Runs are cut into pieces; the last latents' runs end where places that are not used begin."""
    kept = torch.rand(tokens, 6, generator=generator) < torch.tensor([0.9, 0.0, 0.1, 0.5, 0.02, 0.95])
    starts = torch.tensor([0, *kept.sum(1).tolist()]).cumsum(0)
    pattern = Pattern.rows(torch.cat([kept.nonzero()[:, 1], torch.full((spare,), 6)]), starts, 6)
    coeffs = integer_inputs(pattern.capacity, generator=generator)
    rows = integer_inputs(tokens, 5, generator=generator)
    code = dense_of(pattern, coeffs)
    coeffs[pattern.capacity - spare :] = torch.nan
    there = to(pattern, device)
    with poison_empty():
        sums = latent_rows(there.index, coeffs.to(device), rows.to(device))
        alone = latent_sums(coeffs.to(device), there)
    assert torch.equal(sums.cpu(), code.T @ rows)
    assert torch.equal(alone.cpu(), code.sum(0))


def gradient_of(*factors: tuple[Pattern, Tensor, Tensor]) -> tuple[RowGradient, Tensor]:
    """Return joined factors, and their sum."""
    expected = torch.stack([dense_of(pattern, coeffs).T @ rows for pattern, coeffs, rows in factors]).sum(0)
    return RowGradient.of([SparseFactor(pattern.index, coeffs, rows) for pattern, coeffs, rows in factors]), expected


@sparse
def test_t0_codes_of_both_kinds_are_joined(device: str, generator: torch.Generator) -> None:
    n = 12
    parts = []
    for pattern in (
        ragged([3, 0, 7], n, generator, spare=4),
        Pattern.topk(torch.randint(0, n, (5, 4), generator=generator), n),  # with repeats, which add up
        ragged([], n, generator, spare=2),
        ragged([12, 1], n, generator),
        Pattern.topk(torch.randint(0, n, (0, 2), generator=generator), n),
    ):
        coeffs = integer_inputs(*pattern.latents.shape, generator=generator)
        parts.append((pattern, coeffs, integer_inputs(pattern.B, 5, generator=generator)))
    gradient, expected = gradient_of(*((to(p, device), c.to(device), r.to(device)) for p, c, r in parts))
    assert gradient.sparse is not None
    weights = torch.eye(5)[torch.randint(0, 5, (n,), generator=generator)].to(device)
    gradient.check(weights)
    assert torch.equal(gradient.total(weights), expected)
    assert torch.equal(gradient.part(3, 9).total(weights[3:9]), expected[3:9])
    with poison_empty():
        squares = row_squares(weights, gradient, False)
        moments = torch.zeros_like(weights), torch.zeros_like(weights)
        one = torch.ones((), dtype=torch.float64, device=device)
        adam_rows(weights.clone(), moments, gradient, one, one, one.expand(2) / 2, AdamRule(0.5, 0.5))
    assert torch.equal(squares, expected.square().sum(1))
    assert torch.equal(moments[0], expected / 2)


def test_factors_accumulate_to_the_sum_over_one_large_batch(generator: torch.Generator) -> None:
    counts = torch.randint(0, 9, (150,), generator=generator).tolist()
    whole = ragged(counts, 400, generator)
    assert whole.starts is not None
    acts, target = torch.randn(whole.capacity, generator=generator), torch.randn(150, 16, generator=generator)
    totals = []
    for size in (150, 40):
        W = torch.ones(400, 16).requires_grad_()
        collect_factors(W)
        for first in range(0, 150, size):
            starts = whole.starts[first : first + size + 1]
            part = slice(int(starts[0]), int(starts[-1]))
            pattern = Pattern.rows(whole.latents[part], starts - starts[0], 400)
            decode_loss(SparseCode(pattern, acts[part]), W, None, target[first : first + size]).loss.backward()
        assert isinstance(W.grad, FactoredGradient)
        totals.append(W.grad.materialize())
    assert torch.equal(*totals)


def test_a_training_is_that_with_dense_gradients(generator: torch.Generator) -> None:
    results = []
    pattern = ragged([3, 0, 5, 1], 20, generator, spare=2)
    start, target = torch.randn(20, 6, generator=generator).double(), torch.randn(4, 6, generator=generator).double()
    acts = torch.randn(10 + 1, generator=generator).double()
    for make in (FactoredAdam, torch.optim.Adam):
        W = torch.nn.Parameter(start.clone())
        optimizer = make([W], 1e-2, eps=1e-8)
        for _ in range(3):
            optimizer.zero_grad()
            decode_loss(SparseCode(pattern, acts), W, None, target).loss.backward()
            optimizer.step()
        results.append(W.detach())
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-14)


@sparse
def test_a_code_that_overflowed_is_that_of_its_first_entries(device: str, generator: torch.Generator) -> None:
    full = ragged([3, 5, 2, 4], 20, generator)
    assert full.starts is not None
    inputs = inputs_of(full, generator, integer=True)
    for capacity in (0, 3, 6, 9):
        cut = Pattern(full.latents[:capacity], 20, full.starts.clamp_max(capacity), torch.tensor(14))
        part = {**inputs, "acts": inputs["acts"][:capacity], "grad": inputs["grad"][:capacity]}
        for name, operation in OPERATIONS.items():
            exact = operation(cut, as_float64(part), dense=True)
            ours = operation(*on(device, cut, part), dense=False)
            assert all(torch.equal(ours[key].cpu().double(), exact[key]) for key in exact), name


def test_a_pattern_of_other_tokens_or_latents_is_refused(generator: torch.Generator) -> None:
    pattern = ragged([3, 0], 9, generator)
    with pytest.raises(ShapeError, match="pattern: expected 3 tokens and 9 latents, got 2 and 9"):
        pre_acts(torch.ones(3, 2), torch.ones(9, 2), torch.ones(9), pattern)
    with pytest.raises(ShapeError, match=r"W_dec: expected the shape \[9, d_in\], got \[8, 2\]"):
        decode(SparseCode(pattern, torch.ones(3)), torch.ones(8, 2))
    with pytest.raises(ShapeError, match=r"coeffs: expected the shape \[capacity\], got \[3, 1\]"):
        latent_rows(pattern.index, torch.ones(3, 1), torch.ones(2, 2))


def test_a_capture_that_has_no_capacity_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varying, "_is_capturing", lambda x: True)
    inputs = torch.randn(3, 4), torch.randn(5, 4), torch.zeros(5)
    with pytest.raises(ConfigError, match="capacity: expected a number while a CUDA graph is captured"):
        varying.encode_above(*inputs, 0.0)
    assert varying.encode_above(*inputs, 0.0, capacity=15).pattern.capacity == 15
