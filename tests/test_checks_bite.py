"""Proof that the checkers can fail: operations with the bugs that such code has, and the tier that catches each."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from flashsae.ops import Pattern, SparseCode, decode, decode_loss, encode_topk, latent_rows
from flashsae.ops.adam_rows import AdamRule, adam_rows, row_squares
from flashsae.ops.factors import RowGradient, SparseFactor
from flashsae.ops.latent_rows.reference import RUN
from flashsae.testing import assert_as_accurate, chosen, dense_topk, integer_inputs, poison_empty, stable_topk
from helpers.codes import dense_of, index_of, ragged, to, topk_of
from helpers.selection import hard_inputs, selection_mistakes
from helpers.steps import step_inputs, whole_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _code(generator: torch.Generator, B: int = 33, k: int = 4, d_sae: int = 20, d_in: int = 9) -> tuple[Tensor, ...]:
    top_indices = torch.rand(B, d_sae, generator=generator).topk(k, dim=1).indices
    top_acts = torch.rand(B, k, generator=generator) + 0.1
    return top_acts, top_indices, torch.randn(d_sae, d_in, generator=generator)


def test_t1_passes_the_real_decode_and_catches_a_sum_in_bfloat16(generator: torch.Generator) -> None:
    top_acts, top_indices, W_dec = _code(generator)
    gathered = W_dec[top_indices]
    exact = (gathered.double() * top_acts.double()[..., None]).sum(1)
    theirs = (gathered * top_acts[..., None]).sum(1)
    assert_as_accurate(decode(topk_of(top_acts, top_indices, W_dec), W_dec), theirs, exact)
    low = (gathered.bfloat16() * top_acts.bfloat16()[..., None]).sum(1).float()
    with pytest.raises(AssertionError, match=r"x_hat: error .*, PyTorch's .*, bound"):
        assert_as_accurate(low, theirs, exact, "x_hat")


@pytest.mark.parametrize("bug", ["dropped tail", "two indices swapped", "a NaN", "another shape", "another dtype"])
def test_t1_catches(bug: str, generator: torch.Generator) -> None:
    exact = torch.randn(37, 5, generator=generator, dtype=torch.float64)
    theirs = exact.float()
    ours = theirs.clone()
    if bug == "dropped tail":
        ours[36:] = 0
    elif bug == "two indices swapped":
        ours[[3, 4]] = ours[[4, 3]]
    elif bug == "a NaN":
        ours[0, 0] = torch.nan
    ours = {"another shape": ours[:36], "another dtype": ours.double()}.get(bug, ours)
    with pytest.raises(AssertionError):
        assert_as_accurate(ours, theirs, exact)


def test_t0_catches_a_missing_relu_mask(generator: torch.Generator) -> None:
    x, weights, bias = (integer_inputs(*s, generator=generator) for s in ((8, 3), (10, 3), (10,)))
    weights.requires_grad_()
    code = encode_topk(x, weights, bias, 8)
    top_acts, top_indices = code.acts.relu(), code.top_indices
    upstream = integer_inputs(8, 8, generator=generator)
    dense = dense_topk(x, weights, bias, top_indices.shape[1], None, topk=chosen(top_indices)).gather(1, top_indices)
    (expected,) = torch.autograd.grad(dense, weights, upstream)
    assert bool((top_acts == 0).any())  # else the mask would not matter
    unmasked = latent_rows(index_of(top_indices, 10), upstream, x)
    masked = latent_rows(index_of(top_indices, 10), upstream * (top_acts.detach() > 0), x)
    assert torch.equal(masked, expected)
    assert not torch.equal(unmasked, expected)


def test_t0_catches_a_tie_broken_the_other_way(generator: torch.Generator) -> None:
    pre_acts = integer_inputs(20, 30, generator=generator)
    highest_first = 29 - stable_topk(pre_acts.flip(1), 7)[1].flip(1)
    assert bool((pre_acts.gather(1, highest_first) >= pre_acts.topk(7).values[:, -1:]).all())  # a valid top-k
    assert not torch.equal(highest_first, stable_topk(pre_acts, 7)[1])


def test_poison_shows_memory_that_was_never_written() -> None:
    def forgets_the_last_row(n: int) -> Tensor:
        out = torch.empty(n, 2)
        out[: n - 1] = 1.0
        return out

    with poison_empty():
        assert bool(forgets_the_last_row(3)[2].isnan().all())
        assert torch.empty_like(torch.zeros(2)).isnan().all()
        assert torch.zeros(3).new_empty(2).isnan().all()
        assert torch.empty(2, dtype=torch.int32).tolist() == [-(2**31)] * 2
        assert torch.zeros(2).tolist() == [0.0, 0.0]


def test_integer_inputs_make_sums_exact_in_any_order(generator: torch.Generator) -> None:
    a, b = integer_inputs(50, 300, generator=generator), integer_inputs(300, generator=generator)
    order = torch.randperm(300, generator=generator)
    assert torch.equal(a @ b, a[:, order] @ b[order])
    assert len(a.unique()) == 9


def test_shape_annotations_are_checked_in_tests() -> None:
    from flashsae.ops.adam_rows.reference import projected

    with pytest.raises(Exception, match="d_in"):
        projected(torch.zeros(3, 4), torch.zeros(3, 5))


def _wrong_kernels(operation: str, name: str, right: str, wrong: str, folder: Path) -> tuple[ModuleType, ModuleType]:
    """Return what launches an operation, its `launch` unless another is named, and kernels with a bug in them."""
    launch = importlib.import_module(f"flashsae.ops.{operation}{'' if '.' in operation else '.launch'}")
    source = Path(getattr(launch, name).__file__).read_text("utf-8")
    assert right in source, f"{operation}.{name} has changed: write this bug into it anew"
    path = folder / f"wrong_{name}.py"
    path.write_text(source.replace(right, wrong), "utf-8")
    spec = importlib.util.spec_from_file_location(f"wrong_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return launch, module


def _step_is_right() -> None:
    """Check T0 of all operations, as test_kernels.py does."""
    inputs = step_inputs(6, 13, 90, torch.Generator().manual_seed(0), integer=True)
    inputs["x"][0], inputs["b_enc"] = inputs["b_dec"], inputs["b_enc"] - 2  # ties, and fewer positive than k
    for precision in ("float32", "tf32"):
        with patch.dict(os.environ, {"FLASHSAE_BACKEND": "reference"}):
            expected = whole_step(inputs, 11)
        with poison_empty():
            ours = whole_step({name: tensor.to(DEVICE) for name, tensor in inputs.items()}, 11, precision)
        for name in expected:
            assert torch.equal(ours[name].cpu(), expected[name]), name


def _long_runs_are_right() -> None:
    generator = torch.Generator().manual_seed(0)
    top_indices = torch.randint(0, 2, (3 * RUN + 7, 1), generator=generator)
    coeffs = integer_inputs(len(top_indices), 1, generator=generator)
    index = index_of(top_indices.to(DEVICE), 3)
    with poison_empty():
        ours = latent_rows(index, coeffs.to(DEVICE), torch.ones(len(top_indices), 2, device=DEVICE))
    expected = torch.zeros(3).index_add(0, top_indices[:, 0], coeffs[:, 0])
    assert torch.equal(ours[:, 1].cpu(), expected)


def _decode_is_accurate() -> None:
    top_acts, top_indices, W_dec = _code(torch.Generator().manual_seed(0))
    gathered = W_dec[top_indices]
    exact = (gathered.double() * top_acts.double()[..., None]).sum(1)
    ours = decode(topk_of(top_acts.to(DEVICE), top_indices.to(DEVICE), W_dec), W_dec.to(DEVICE)).cpu()
    assert_as_accurate(ours, (gathered * top_acts[..., None]).sum(1), exact)


def _selection_is_certified() -> None:
    x, W, bias = hard_inputs("normal", 10, 29, 300, torch.Generator().manual_seed(0))
    W, bias = W[:1] + 1e-4 * W, torch.zeros(300)  # float16 cannot tell these apart, float32 can
    indices = encode_topk(x.to(DEVICE), W.to(DEVICE), bias.to(DEVICE), 12).top_indices
    assert selection_mistakes(x, W, bias, indices.cpu())[0] == 0


def _selection_is_screened() -> None:
    from flashsae.ops.encode import screen

    x, W, bias = hard_inputs("normal", 6, 29, 200, torch.Generator().manual_seed(0))
    W, bias = W[:1] + 1e-3 * W, torch.zeros(200)  # 8 bits cannot tell these apart, float32 can
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(screen, "pays", lambda *_, **__: True)
        code = encode_topk(x.to(DEVICE), W.to(DEVICE), bias.to(DEVICE), 3, precision="float32-int8")
    assert selection_mistakes(x, W, bias, code.top_indices.cpu())[0] == 0


def _rows_are_right() -> None:
    """Check T0 of codes of varying length, as test_varying.py does: tokens above a tile, places that are not used."""
    generator = torch.Generator().manual_seed(0)
    pattern = ragged([0, 150, 3, 33], 200, generator, spare=2)
    acts, W_dec = integer_inputs(pattern.capacity, generator=generator), integer_inputs(200, 530, generator=generator)
    target = integer_inputs(4, 530, generator=generator)
    code = dense_of(pattern, acts)
    residual, used = target - code @ W_dec, int(pattern.counts.sum())
    leaf = acts.to(DEVICE).requires_grad_()
    with poison_empty():
        found = decode_loss(SparseCode(to(pattern, DEVICE), leaf), W_dec.to(DEVICE), None, target.to(DEVICE))
        (grad,) = torch.autograd.grad(found.loss, leaf)
    assert torch.equal(found.residual.cpu(), residual)
    dots = (-2 * residual[pattern.tokens[:used].long()] * W_dec[pattern.latents[:used].long()]).sum(1)
    assert torch.equal(grad[:used].cpu(), dots)
    kept = torch.rand(2 * RUN, 3, generator=generator) < torch.tensor([0.2, 0.0, 0.9])
    starts = torch.tensor([0, *kept.sum(1).tolist()]).cumsum(0)
    pattern = Pattern.rows(torch.cat([kept.nonzero()[:, 1], torch.full((RUN,), 3)]), starts, 3)
    coeffs, rows = (
        integer_inputs(pattern.capacity, generator=generator),
        integer_inputs(2 * RUN, 2, generator=generator),
    )
    with poison_empty():
        sums = latent_rows(to(pattern, DEVICE).index, coeffs.to(DEVICE), rows.to(DEVICE))
    assert torch.equal(sums.cpu(), dense_of(pattern, coeffs).T @ rows)


def _moments_are_right() -> None:
    """Check T0 of the latent pass, as test_adam_rows.py does: sparse part, slots and projection."""
    generator = torch.Generator().manual_seed(0)
    n, d = 6, 5
    weights = torch.eye(d)[torch.randint(0, d, (n,), generator=generator)]
    rows, coeffs = integer_inputs(9, d, generator=generator), integer_inputs(9, 2, generator=generator)
    top_indices = torch.randint(0, n, (9, 2), generator=generator)
    dense, slots = integer_inputs(2, d, generator=generator), torch.tensor([-1, 1, -1, -1, 0, -1], dtype=torch.int32)
    gradient = latent_rows(index_of(top_indices, n), coeffs, rows)
    gradient[[1, 4]] += dense[[1, 0]]
    gradient -= (gradient * weights).sum(1, keepdim=True) * weights

    ours = weights.to(DEVICE)
    moments = torch.zeros_like(ours), torch.zeros_like(ours)
    sparse = SparseFactor(index_of(top_indices.to(DEVICE), n), coeffs.to(DEVICE), rows.to(DEVICE))
    factors = RowGradient(sparse, dense.to(DEVICE), slots.to(DEVICE))
    one = torch.ones((), dtype=torch.float64, device=DEVICE)
    with poison_empty():
        squares = row_squares(ours, factors, unit_norm=True)
        adam_rows(ours, moments, factors, one, one, one.expand(2) / 2, AdamRule(0.5, 0.5, unit_norm=True))
    assert torch.equal(squares.cpu(), gradient.square().sum(1))
    assert torch.equal(moments[0].cpu(), gradient / 2)
    assert torch.equal(moments[1].cpu(), gradient.square() / 2)


KERNEL_BUGS = {
    "dropped tail": ("decode", "kernels", "inside = column < d", "inside = column < d - 1", _step_is_right),
    "index of the latent beside": (
        "encode", "kernels", "position, latents.to(tl.int64)", "position, (latents ^ 1).to(tl.int64)",
        _step_is_right,
    ),
    "a bias forgotten": (
        "encode", "kernels", "values += tl.load(bias_ptr", "values += 0 * tl.load(bias_ptr", _step_is_right,
    ),
    "ties broken the other way": (
        "encode", "kernels", "tl.cumsum(tied.to(tl.int32)) <= room",
        "tl.cumsum(tied.to(tl.int32), reverse=True) <= room", _step_is_right,
    ),
    "the second run of a piece forgotten": (
        "latent_rows", "kernels", "tl.where(piece == begin, behind, 0)", "0", _long_runs_are_right,
    ),
    "latents above a tile forgotten": (
        "decode", "kernels", "BLOCK_K, BLOCK_K // 4, BOTH_D", "BLOCK_K, 0, BOTH_D", _rows_are_right,
    ),
    "dot products of the last columns alone": (
        "decode", "kernels", "grad_acts_ptr + chunk * capacity + first", "grad_acts_ptr + first", _rows_are_right,
    ),
    "the token of another entry": (
        "latent_rows", "kernels", "tl.load(tokens_ptr + at,", "tl.load(tokens_ptr + low + 0 * at,", _rows_are_right,
    ),
    "a reduction in bfloat16": (
        "decode", "kernels", "W.to(tl.float32)", "W.to(tl.bfloat16).to(tl.float32)", _decode_is_accurate,
    ),
    "a screen without bounds": (
        "encode", "certify_kernels", "low, high = _to_key(low, KEY_NONE + 1), _to_key(high, KEY_NAN)",
        "low, high = _to_key(0.5 * (low + high), KEY_NONE + 1), _to_key(0.5 * (low + high), KEY_NAN)",
        _selection_is_certified,
    ),
    "a screen of 8 bits without bounds": (
        "encode.onesided", "onesided_kernels", "high = _upper_keys(centres + error)", "high = _upper_keys(centres)",
        _selection_is_screened,
    ),
    "projection dropped": (
        "adam_rows", "kernels", "    if UNIT_NORM:\n        gradient -= tl.sum(gradient * weights) * weights",
        "    if UNIT_NORM:\n        gradient -= 0.0", _moments_are_right,
    ),
    "slot of another latent": (
        "adam_rows", "kernels", "tl.load(slots_ptr + latent)", "tl.load(slots_ptr + (latent ^ 1))", _moments_are_right,
    ),
}  # fmt: skip


@pytest.fixture
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("FLASHSAE_BACKEND", "triton")
    monkeypatch.setenv("FLASHSAE_DENSE_ABOVE", "1")


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("bug", KERNEL_BUGS)
def test_a_kernel_with_a_bug_is_caught(bug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    operation, name, right, wrong, check = KERNEL_BUGS[bug]
    launch, module = _wrong_kernels(operation, name, right, wrong, tmp_path)
    monkeypatch.setattr(launch, name, module)
    with pytest.raises(AssertionError):
        check()


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("check", sorted({bug[-1] for bug in KERNEL_BUGS.values()}, key=lambda f: f.__name__))
def test_the_real_kernels_pass_those_checks(check: Callable[[], None]) -> None:
    check()


def test_poison_reaches_inside_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashsae.ops.decode import reference

    monkeypatch.setattr(reference, "decode", lambda acts, pattern, W, bias: torch.empty(2, 3))
    with poison_empty():
        W_dec = torch.ones(4, 3)
        x_hat = decode(topk_of(torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int64), W_dec), W_dec)
    assert bool(x_hat.isnan().all())
