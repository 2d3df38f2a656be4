"""Full codes, every latent of every token: every operation beside dense autograd, and beside the same code sparse."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor

from flashsae.errors import ConfigError, DtypeError, ShapeError
from flashsae.metrics import LatentActivity, active_entries
from flashsae.ops import (
    FactoredGradient,
    Pattern,
    SparseCode,
    collect_factors,
    decode,
    decode_loss,
    encode_above,
    latent_rows,
    latent_sums,
    per_latent,
    pre_acts,
)
from flashsae.ops.factors import RowFactor
from flashsae.optim import FactoredAdam
from flashsae.precision import Precision, operand_of
from flashsae.testing import assert_as_accurate, integer_inputs, poison_empty
from helpers.on_both import DEVICE, as_float64
from helpers.steps import Tensors, leaves

D_SAE, D = 30, 13


@pytest.fixture(params=["reference", "kernels"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test in two ways, and let nobody build an index; where its tensors are to lie."""
    monkeypatch.setattr(Pattern, "index", property(lambda _: pytest.fail("somebody asked for the index")))
    monkeypatch.setenv("FLASHSAE_BACKEND", "reference" if request.param == "reference" else "triton")
    if request.param == "reference":
        return "cpu"
    pytest.importorskip("triton")
    monkeypatch.setenv("FLASHSAE_DENSE_ABOVE", "1")  # a full code is dense whatever is forced
    return DEVICE


def inputs_of(B: int, generator: torch.Generator, *, integer: bool) -> Tensors:
    shapes = {"acts": (B, D_SAE), "W_dec": (D_SAE, D), "b_dec": (D,), "target": (B, D), "upstream": (B, D)}
    shapes |= {"x": (B, D), "W_enc_T": (D_SAE, D), "b_enc": (D_SAE,), "b_in": (D,), "grad": (B, D_SAE)}
    if not integer:
        return {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    p = {name: integer_inputs(*shape, generator=generator, largest=1) for name, shape in shapes.items()}
    p["token_weights"] = torch.randint(0, 3, (B,), generator=generator).float()
    return p


def with_gradients(result: Tensor, wanted: Tensors, upstream: Tensor) -> Tensors:
    grads = torch.autograd.grad(result, list(wanted.values()), upstream.to(result.dtype))
    return {"result": result.detach(), **dict(zip(wanted, grads))}


def pattern_of(p: Tensors) -> Pattern:
    return Pattern.full(len(p["acts"]), D_SAE, device=p["acts"].device)


def decoded(inputs: Tensors, *, dense: bool) -> Tensors:
    p = leaves(inputs)
    if dense:
        x_hat = p["acts"] @ p["W_dec"] + p["b_dec"]
    else:
        x_hat = decode(SparseCode(pattern_of(p), p["acts"]), p["W_dec"], p["b_dec"])
    return with_gradients(x_hat, {n: p[n] for n in ("acts", "W_dec", "b_dec")}, inputs["upstream"])


def compared(inputs: Tensors, *, dense: bool) -> Tensors:
    p = leaves(inputs)
    weights = p["token_weights"].detach() if "token_weights" in p else None
    if dense:
        errors = (p["target"] - p["acts"] @ p["W_dec"] - p["b_dec"]).square().sum(1)
        loss = (errors if weights is None else errors * weights).sum()
    else:
        code = SparseCode(pattern_of(p), p["acts"])
        loss = decode_loss(code, p["W_dec"], p["b_dec"], p["target"], token_weights=weights).loss
    return with_gradients(loss, {n: p[n] for n in ("acts", "W_dec", "b_dec", "target")}, torch.tensor(2.0))


def encoded(inputs: Tensors, *, dense: bool) -> Tensors:
    p = leaves(inputs)
    if dense:
        values = (p["x"] - p["b_in"]) @ p["W_enc_T"].T + p["b_enc"]
    else:
        values = pre_acts(p["x"], p["W_enc_T"], p["b_enc"], pattern_of(p), b_dec=p["b_in"], precision="float32")
    return with_gradients(values, {n: p[n] for n in ("x", "W_enc_T", "b_enc", "b_in")}, inputs["grad"])


def looked_up(inputs: Tensors, *, dense: bool) -> Tensors:
    p = leaves(inputs)
    values = p["b_enc"].expand(len(p["acts"]), -1) if dense else per_latent(p["b_enc"], pattern_of(p))
    return with_gradients(values, {"b_enc": p["b_enc"]}, inputs["grad"])


def summed(inputs: Tensors, *, dense: bool) -> Tensors:
    p = leaves(inputs)
    sums = p["acts"].sum(0) if dense else latent_sums(p["acts"], pattern_of(p))
    return with_gradients(sums, {"acts": p["acts"]}, inputs["b_enc"])


OPERATIONS: dict[str, Callable[..., Tensors]] = {
    "decode": decoded,
    "decode_loss": compared,
    "pre_acts": encoded,
    "per_latent": looked_up,
    "latent_sums": summed,
}


def on(device: str, inputs: Tensors) -> Tensors:
    return {name: tensor.to(device) for name, tensor in inputs.items()}


@pytest.mark.parametrize("B", [0, 1, 7])
@pytest.mark.parametrize("name", OPERATIONS)
def test_t0_integers_are_bitwise_those_of_dense_autograd(
    name: str, B: int, device: str, generator: torch.Generator
) -> None:
    inputs = inputs_of(B, generator, integer=True)
    exact = OPERATIONS[name](as_float64(inputs), dense=True)
    with poison_empty():
        ours = OPERATIONS[name](on(device, inputs), dense=False)
    wide = OPERATIONS[name](on(device, as_float64(inputs)), dense=False)
    for key, expected in exact.items():
        assert torch.equal(ours[key].cpu().double(), expected), key
        assert torch.equal(wide[key].cpu(), expected), key


@pytest.mark.parametrize("name", OPERATIONS)
def test_t1_and_t3_as_accurate_as_dense_autograd_and_repeatable(
    name: str, device: str, generator: torch.Generator
) -> None:
    inputs = inputs_of(37, generator, integer=False)
    ours, again = (OPERATIONS[name](on(device, inputs), dense=False) for _ in range(2))
    theirs, exact = OPERATIONS[name](inputs, dense=True), OPERATIONS[name](as_float64(inputs), dense=True)
    for key in exact:
        assert torch.equal(ours[key], again[key]), key
        assert_as_accurate(ours[key].cpu(), theirs[key], exact[key], key)


@pytest.mark.parametrize("elements", [1 << 26, 2 * D_SAE])
@pytest.mark.parametrize("name", ["decode", "decode_loss", "pre_acts"])
def test_t0_of_bfloat16_weights_some_tokens_at_a_time(
    name: str, elements: int, device: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flashsae.ops.dense.op._CODE_ELEMENTS", elements)
    inputs = inputs_of(7, generator, integer=True)
    exact = OPERATIONS[name](as_float64(inputs), dense=True)
    if name == "pre_acts":
        inputs["W_enc_T"] = inputs["W_enc_T"].bfloat16()
    else:
        inputs["W_dec"], inputs["b_dec"] = inputs["W_dec"].bfloat16(), inputs["b_dec"].bfloat16()
    ours = OPERATIONS[name](on(device, inputs), dense=False)
    for key, expected in exact.items():
        assert torch.equal(ours[key].cpu().double(), expected), key


@pytest.mark.parametrize("precision", get_args(Precision))
def test_the_product_is_that_of_its_precision(
    precision: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("FLASHSAE_BACKEND", "triton")
    x, W, b = (torch.randn(*shape, generator=generator).to(DEVICE) for shape in ((7, D), (D_SAE, D), (D_SAE,)))
    options = {"capacity": 7 * D_SAE, "precision": precision}
    sparse = encode_above(x, W, b, -1e9, **options)  # type: ignore[arg-type]
    full = encode_above(x, W, b, -1e9, **{**options, "capacity": "full"})  # type: ignore[arg-type]
    if operand_of(precision) == "float32":  # recomputed in another order
        torch.testing.assert_close(full.acts.flatten(), sparse.acts)
    else:
        assert torch.equal(full.acts.flatten(), sparse.acts)
    assert full.acts.dtype == torch.float32


def test_weights_get_their_gradients_as_rows_of_numbers(device: str, generator: torch.Generator) -> None:
    p = leaves(on(device, inputs_of(5, generator, integer=True)))
    collect_factors(p["W_dec"], p["W_enc_T"])
    code = encode_above(p["x"], p["W_enc_T"], p["b_enc"], 0.0, b_dec=p["b_in"], capacity="full")
    decode_loss(code.replace(code.acts.relu()), p["W_dec"], p["b_dec"], p["x"].detach()).loss.backward()
    for name in ("W_dec", "W_enc_T"):
        grad = p[name].grad
        assert isinstance(grad, FactoredGradient)
        assert grad.factors is not None
        assert [type(factor) for factor in grad.factors] == [RowFactor]


def test_a_training_is_that_of_torch(generator: torch.Generator) -> None:
    results = []
    start, target = torch.randn(20, 6, generator=generator).double(), torch.randn(4, 6, generator=generator).double()
    acts = torch.randn(4, 20, generator=generator).double().relu()
    for make in (FactoredAdam, torch.optim.Adam):
        W = torch.nn.Parameter(start.clone())
        optimizer = make([W], 1e-2, eps=1e-8)
        for _ in range(3):
            optimizer.zero_grad()
            decode_loss(SparseCode(Pattern.full(4, 20), acts), W, None, target).loss.backward()
            optimizer.step()
        results.append(W.detach())
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-14)


def test_latents_take_no_memory_and_nobody_builds_an_index() -> None:
    pattern = Pattern.full(1 << 20, 1 << 14)  # 2**34 entries
    assert (pattern.B, pattern.k, pattern.capacity, pattern.is_full) == (1 << 20, 1 << 14, 1 << 34, True)
    assert pattern.latents.untyped_storage().nbytes() == 8 << 14
    pattern.check()
    assert pattern.tensors == []
    with pytest.raises(ShapeError, match=r"index: expected fewer than 2\*\*31 entries"):
        assert pattern.index


def test_whoever_asks_for_the_index_gets_it(generator: torch.Generator) -> None:
    coeffs, rows = (integer_inputs(*shape, generator=generator) for shape in ((5, 7), (5, 3)))
    full = Pattern.full(5, 7)
    listed = Pattern.topk(torch.arange(7).repeat(5, 1), 7).index
    assert full.index is full.index
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(full.index.lists, listed.lists))
    assert full.index.latents.dtype == listed.latents.dtype
    assert torch.equal(latent_rows(full.index, coeffs, rows), coeffs.T @ rows)
    assert len(Pattern.full(0, 7).index.entries) == 0


def test_a_full_code_as_others_read_it(generator: torch.Generator) -> None:
    acts = torch.randn(6, 9, generator=generator).relu()
    code = SparseCode(Pattern.full(6, 9), acts, (2, 3))
    assert code.to_dense().shape == code.top_acts.shape == code.top_indices.shape == (2, 3, 9)
    assert torch.equal(code.to_dense().view(6, 9), acts)
    assert code.pattern.counts.tolist() == [9] * 6
    listed = SparseCode.topk(acts, torch.arange(9).repeat(6, 1), 9)
    assert all(torch.equal(*pair) for pair in zip(active_entries(code), active_entries(listed)))
    ours, theirs = LatentActivity(9), LatentActivity(9)
    ours.update(code)
    theirs.update(listed)
    assert torch.equal(ours.latent_density(), theirs.latent_density())


def test_what_is_no_full_pattern_is_refused() -> None:
    with pytest.raises(ConfigError, match="d_sae: expected a positive int, got 0"):
        Pattern.full(3, 0)
    with pytest.raises(ConfigError, match="B: expected a number of tokens, got -1"):
        Pattern.full(-1, 3)
    with pytest.raises(DtypeError, match="B: expected an int, got float"):
        Pattern.full(1.0, 3)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"acts: expected the shape \[2, 3\], got \[6\]"):
        SparseCode(Pattern.full(2, 3), torch.zeros(6))


def step(p: Tensors, threshold: Tensor, capacity: object, *, dense: bool = False) -> Tensors:
    """Return loss and gradients of an SAE that keeps what exceeds its thresholds."""
    if dense:
        values = (p["x"] - p["b_dec"]) @ p["W_enc_T"].T + p["b_enc"]
        acts = torch.where(values > threshold, values, 0.0)
        loss = (p["x"].detach() - acts @ p["W_dec"] - p["b_dec"]).square().sum() + latent_mass(acts)
    else:
        code = encode_above(
            p["x"], p["W_enc_T"], p["b_enc"], threshold, b_dec=p["b_dec"], capacity=capacity  # type: ignore[arg-type]
        )  # fmt: skip
        bound = per_latent(threshold, code.pattern)
        code = code.replace(torch.where(code.acts > bound, code.acts, 0.0))
        loss = decode_loss(code, p["W_dec"], p["b_dec"], p["x"].detach()).loss + latent_mass(code.acts)
    return with_gradients(loss, {n: p[n] for n in ("x", "W_enc_T", "b_enc", "W_dec", "b_dec")}, torch.tensor(1.0))


def latent_mass(acts: Tensor) -> Tensor:
    return acts.square().sum() / 3


@pytest.mark.parametrize("density", ["none", "some", "all"])
def test_t1_sparse_and_full_codes_give_the_same_loss_and_gradients(
    density: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASHSAE_BACKEND", "reference")
    inputs = inputs_of(37, generator, integer=False)
    level = {"none": 1e3, "some": 1.0, "all": -1e3}[density]
    threshold = level + torch.rand(D_SAE, generator=generator)
    theirs = step(leaves(inputs), threshold, None, dense=True)
    exact = step(leaves(as_float64(inputs)), threshold.double(), None, dense=True)
    for capacity in (None, 37 * D_SAE, "any", "full"):
        ours = step(leaves(inputs), threshold, capacity)
        for key in exact:
            assert_as_accurate(ours[key], theirs[key], exact[key], f"{capacity}: {key}")


@pytest.mark.parametrize("limit", [0.2, 0.9])
@pytest.mark.parametrize("workspace_bytes", [1, 1 << 20])
def test_the_count_decides_which_kind_of_code_there_is(
    limit: float, workspace_bytes: int, device: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASHSAE_DENSE_ABOVE", str(limit))
    p = on(device, inputs_of(8, generator, integer=True))
    operands = p["x"], p["W_enc_T"], p["b_enc"]
    values = p["x"] @ p["W_enc_T"].T + p["b_enc"]
    for threshold in (-100.0, 0.0, 2.0):
        code = encode_above(*operands, threshold, capacity="any", workspace_bytes=workspace_bytes)
        count = int((values > threshold).sum())
        assert code.pattern.is_full == (count > int(limit * 8 * D_SAE))
        assert code.pattern.count is None
        assert torch.equal(code.to_dense(), torch.where((values > threshold) | code.pattern.is_full, values, 0))
        counted = encode_above(*operands, threshold, capacity="full").pattern
        assert counted.count is not None
        assert int(counted.count) == count
        assert counted.left_out is not None
        assert int(counted.left_out) == 0


def test_nan_counts_as_exceeding_in_a_full_code_too() -> None:
    x = torch.tensor([[torch.nan], [1.0]])
    code = encode_above(x, torch.ones(3, 1), torch.zeros(3), 5.0, capacity="full")
    assert code.pattern.count is not None
    assert int(code.pattern.count) == 3


def test_a_capacity_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match=r'capacity: expected a number, "any", "full" or None, got .all.'):
        encode_above(torch.ones(2, 3), torch.ones(4, 3), torch.zeros(4), 0.0, capacity="all")  # type: ignore[arg-type]
