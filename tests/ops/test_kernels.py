"""The Triton kernels: on a CUDA device compiled, elsewhere in Triton's interpreter on the CPU."""

from __future__ import annotations

import logging
from typing import get_args

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from flashsae import backend
from flashsae.ops import SparseCode, decode, decode_loss, encode_topk, latent_rows
from flashsae.ops.decode.launch import LARGEST_FUSED_K
from flashsae.ops.encode.keys import Keys
from flashsae.ops.encode.launch import Layout, launch_encode_topk
from flashsae.ops.latent_rows.op import latent_sums
from flashsae.ops.latent_rows.reference import RUN
from flashsae.precision import Precision
from flashsae.testing import assert_as_accurate, integer_inputs, poison_empty, stable_topk
from helpers.codes import index_of, topk_of
from helpers.on_both import DEVICE, as_float64, assert_same, on_kernels, on_reference
from helpers.selection import HARD, hard_inputs, selection_mistakes
from helpers.steps import Tensors, leaves, step_inputs, whole_step

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.fixture(autouse=True)
def _sparse_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHSAE_BACKEND", "triton")
    monkeypatch.setenv("FLASHSAE_DENSE_ABOVE", "1")


def encode_inputs(
    B: int, d_in: int, d_sae: int, k: int, generator: torch.Generator, dtype: torch.dtype = F32
) -> Tensors:
    shapes = {"x": (B, d_in), "W_enc_T": (d_sae, d_in), "b_enc": (d_sae,), "b_dec": (d_in,), "grad_acts": (B, k)}
    return {n: integer_inputs(*s, generator=generator, largest=1, dtype=dtype) for n, s in shapes.items()}


WEIGHTS = ("x", "W_enc_T", "b_enc", "b_dec")


def dense_encode(inputs: Tensors, k: int, scale: Tensor | None = None) -> Tensors:
    """Encode with plain autograd."""
    p = leaves(inputs)
    pre_acts = (p["x"] - p["b_dec"]) @ p["W_enc_T"].T + p["b_enc"]
    chosen = stable_topk(pre_acts.detach() if scale is None else pre_acts.detach() * scale, k)[1]
    acts = pre_acts.gather(1, chosen)
    grads = torch.autograd.grad(acts, [p[n] for n in WEIGHTS], p["grad_acts"])
    return {"top_indices": chosen, "acts": acts.detach(), **{f"grad {n}": g for n, g in zip(WEIGHTS, grads)}}


def _with_gradients(code: SparseCode, p: Tensors) -> Tensors:
    grads = torch.autograd.grad(code.acts, [p[n] for n in WEIGHTS], p["grad_acts"].to(code.acts.dtype))
    result = {"top_indices": code.top_indices, "acts": code.acts.detach()}
    return {**result, **{f"grad {n}": g for n, g in zip(WEIGHTS, grads)}}


# the last is float16 input, which is widened
MODES = [*((F32, precision) for precision in get_args(Precision)), (BF16, None), (F16, None)]
MODE_NAMES = [*get_args(Precision), "bfloat16 tensors", "float16 tensors"]


@pytest.mark.parametrize(("dtype", "precision"), MODES, ids=MODE_NAMES)
@pytest.mark.parametrize(
    ("B", "d_in", "d_sae", "k"),
    [(0, 5, 7, 3), (1, 1, 1, 1), (2, 13, 33, 33), (5, 13, 101, 1), (7, 16, 256, 8), (3, 20, 301, 40)],
)
def test_t0_encode(
    B: int, d_in: int, d_sae: int, k: int, dtype: torch.dtype, precision: str | None, generator: torch.Generator
) -> None:
    inputs = encode_inputs(B, d_in, d_sae, k, generator, dtype)

    def run(inputs: Tensors) -> Tensors:
        p = leaves(inputs)
        code = encode_topk(p["x"], p["W_enc_T"], p["b_enc"], k, b_dec=p["b_dec"], precision=precision)
        return _with_gradients(code, p)

    exact = dense_encode(as_float64(inputs), k)
    assert_same(on_kernels(run, inputs), on_reference(run, inputs), exact)


@pytest.mark.parametrize("k", [5, 40])  # by groups, and from whole rows
@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
def test_t0_encode_by_a_key_scale(precision: str, k: int, generator: torch.Generator) -> None:
    d_sae, B = 101, 37 if (k, precision) == (5, "bf16") else 6  # more than a block of tokens, and fewer
    inputs = encode_inputs(B, 13, d_sae, k, generator)
    inputs["scale"] = torch.randint(0, 4, (d_sae,), generator=generator).float()

    def run(inputs: Tensors) -> Tensors:
        p = leaves(inputs)
        code = encode_topk(
            p["x"], p["W_enc_T"], p["b_enc"], k,
            b_dec=p["b_dec"], key_scale=p["scale"].detach(), precision=precision,
        )  # fmt: skip
        return _with_gradients(code, p)

    exact = dense_encode(as_float64(inputs), k, inputs["scale"].double())
    assert_same(on_kernels(run, inputs), on_reference(run, inputs), exact)


@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
def test_t0_any_workspace_gives_the_same_bits(precision: str, generator: torch.Generator) -> None:
    inputs = encode_inputs(10, 13, 120, 3, generator)

    def run(inputs: Tensors, workspace_bytes: int, weight_bytes: int = 0) -> Tensors:
        code = encode_topk(
            inputs["x"], inputs["W_enc_T"], inputs["b_enc"], 3,
            precision=precision, workspace_bytes=workspace_bytes, weight_bytes=weight_bytes,
        )  # fmt: skip
        index = code.pattern.index
        return {"acts": code.acts, "indices": code.top_indices, "entries": index.entries, "offsets": index.offsets}

    exact = on_reference(lambda q: run(q, 1 << 20), as_float64(inputs))
    # one row, then four (float16: eight) at a time, all; weights rounded 32 rows at a time, 64, all
    for sizes in ((1, 0), (4 * 120 * 4, 0), (1 << 20, 0), (4 * 120 * 4, 1), (1 << 20, 70 * 13 * 2), (1 << 20, 1 << 20)):
        ours = on_kernels(lambda q, sizes=sizes: run(q, *sizes), inputs)
        assert all(torch.equal(ours[name].double(), exact[name].double()) for name in exact)


@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
@pytest.mark.parametrize("k", [1, 7, 64])
def test_t0_all_equal_rows_and_heavy_ties_choose_the_lowest(k: int, precision: str) -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    weights = torch.ones(150, 2)
    weights[:, 1] = torch.arange(150) % 3 // 2  # every third latent is larger for the last row
    with poison_empty():
        code = encode_topk(x.to(DEVICE), weights.to(DEVICE), torch.zeros(150, device=DEVICE), k, precision=precision)
    larger = list(range(2, 150, 3))
    expected = sorted((larger + [i for i in range(150) if i not in larger])[:k])
    assert code.top_indices.tolist() == [list(range(k)), list(range(k)), expected]


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("k", [1, 6])
def test_t0_a_row_with_too_many_candidates_is_redone(
    k: int, scaled: bool, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    monkeypatch.setattr(Layout, "capacity", property(lambda self: 16))
    p = encode_inputs(9, 13, 211, k, generator)
    p["x"][:2] = 0.0  # all latents tie, exactly
    p["x"][2:4] = torch.eye(13)[0]  # all latents tie, which the bounds cannot know
    p["b_enc"][:] = 0.0
    p["W_enc_T"][100] = 20.0
    p["W_enc_T"][:, 0] = 2.0
    p["x"][4:6] = 1.0  # latent 100 wins by far
    scale = torch.randint(1, 4, (211,), generator=generator).float() if scaled else None
    counts = torch.full((9,), -1, dtype=torch.int32, device=DEVICE)
    with poison_empty():
        acts, indices = launch_encode_topk(
            p["x"].to(DEVICE), p["W_enc_T"].to(DEVICE),
            Keys(p["b_enc"].to(DEVICE), None if scale is None else scale.to(DEVICE)), k,
            "float32", [1 << 20, 0], candidate_counts=counts,
        )  # fmt: skip
    assert bool((counts[2:4] > 16).all())
    assert bool((counts >= 1).all())
    assert counts[:2].tolist() == [k, k]
    if k == 1 and not scaled:
        assert counts[4:6].tolist() == [1, 1]
    pre_acts = p["x"].double() @ p["W_enc_T"].double().T
    keys = pre_acts if scale is None else pre_acts * scale
    expected = stable_topk(keys, k)[1]
    assert torch.equal(indices.cpu(), expected)
    assert torch.equal(acts.cpu().double(), pre_acts.gather(1, expected))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy, in the interpreter
@pytest.mark.parametrize(
    ("precision", "capacity", "k"),
    [("float32", None, 5), ("float32", 16, 5), ("tf32", None, 5), ("bf16", None, 5), ("bf16", None, 20)],
)
def test_nan_and_infinity_show_and_harm_no_other_row(
    precision: str, capacity: int | None, k: int, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    if capacity:
        monkeypatch.setattr(Layout, "capacity", property(lambda self: capacity))
    d_sae = 90
    p = {"x": torch.randn(6, 13, generator=generator), "W": torch.randn(d_sae, 13, generator=generator)}

    def run(inputs: Tensors) -> Tensors:
        code = encode_topk(inputs["x"], inputs["W"], inputs["W"].new_zeros(d_sae), k, precision=precision)
        return {"acts": code.acts, "indices": code.top_indices}

    clean = on_kernels(run, p)
    p["x"][1, 12] = torch.nan
    p["x"][2, 0] = torch.inf
    p["x"][4] = -torch.inf
    ours = on_kernels(run, p)
    assert bool(((ours["indices"] >= 0) & (ours["indices"] < d_sae)).all())
    assert bool((ours["indices"].diff(dim=1) > 0).all())  # distinct, ascending
    assert bool(ours["acts"][1].isnan().all())
    assert bool(ours["acts"][2].isfinite().logical_not().all())
    for row in (0, 3, 5):
        assert torch.equal(ours["acts"][row], clean["acts"][row])
        assert torch.equal(ours["indices"][row], clean["indices"][row])


@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
def test_a_weight_that_is_nan_is_not_passed_over(precision: str) -> None:
    weights = torch.randn(70, 3, generator=torch.Generator().manual_seed(1))
    weights[41, 2] = torch.nan
    code = encode_topk(
        torch.ones(2, 3, device=DEVICE), weights.to(DEVICE), torch.zeros(70, device=DEVICE), 4, precision=precision
    )
    acts, indices = code.acts, code.top_indices
    assert bool((indices == 41).sum(1).eq(1).all())
    assert acts[indices == 41].isnan().all()
    assert acts[indices != 41].isfinite().all()


@pytest.mark.parametrize("kind", HARD)
def test_t2_certified_float32_selects_as_float64_does(kind: str, generator: torch.Generator) -> None:
    x, W, bias = hard_inputs(kind, 15, 29, 300, generator)
    with poison_empty():
        indices = encode_topk(x.to(DEVICE), W.to(DEVICE), bias.to(DEVICE), 12, precision="float32").top_indices
    wrong, excused = selection_mistakes(x, W, bias, indices.cpu())
    assert wrong == 0
    if kind in ("normal", "cancellation"):
        assert excused <= 1
    print(f"{kind}: {excused} of {indices.numel()} picks differ inside rounding")


def test_t2_the_count_of_mistakes_can_fail(generator: torch.Generator) -> None:
    x, W, bias = hard_inputs("normal", 15, 29, 300, generator)
    indices = stable_topk(x.double() @ W.double().T + bias.double(), 12)[1]
    assert selection_mistakes(x, W, bias, indices) == (0, 0)
    indices[3, 0] = (indices[3, 0] + 1) % 300
    assert selection_mistakes(x, W, bias, indices)[0] == 1


def test_t1_encode_is_as_accurate_as_dense_autograd(generator: torch.Generator) -> None:
    k, shapes = 9, {"x": (37, 24), "W_enc_T": (150, 24), "b_enc": (150,), "b_dec": (24,)}
    inputs = {n: torch.randn(*s, generator=generator) for n, s in shapes.items()}
    upstream = torch.randn(37, k, generator=generator)

    def ours(inputs: Tensors) -> Tensors:
        p = leaves(inputs)
        code = encode_topk(p["x"], p["W_enc_T"], p["b_enc"], k, b_dec=p["b_dec"])
        grads = torch.autograd.grad(code.acts, [p[n] for n in WEIGHTS], upstream.to(code.acts))
        return {"indices": code.top_indices, "acts": code.acts.detach(), **dict(zip(WEIGHTS, grads))}

    result = on_kernels(ours, inputs)
    indices = result.pop("indices")

    def dense(inputs: Tensors) -> Tensors:
        p = leaves(inputs)
        acts = ((p["x"] - p["b_dec"]) @ p["W_enc_T"].T + p["b_enc"]).gather(1, indices)
        grads = torch.autograd.grad(acts, [p[n] for n in WEIGHTS], upstream.to(acts))
        return {"acts": acts.detach(), **dict(zip(WEIGHTS, grads))}

    theirs, exact = dense(inputs), dense(as_float64(inputs))
    for name in result:
        assert_as_accurate(result[name], theirs[name], exact[name], name)


def dense_decode(p: Tensors) -> Tensor:
    code = p["W_dec"].new_zeros(len(p["top_acts"]), len(p["W_dec"]))
    x_hat = code.scatter_add(1, p["top_indices"].long(), p["top_acts"].to(code.dtype)) @ p["W_dec"]
    return x_hat + p["b_dec"] if "b_dec" in p else x_hat


def decode_inputs(
    B: int, k: int, d_sae: int, d_in: int, generator: torch.Generator, dtype: torch.dtype, bias: bool, weighted: bool
) -> Tensors:
    shapes = {"top_acts": (B, k), "W_dec": (d_sae, d_in), "target": (B, d_in), "upstream": (B, d_in)}
    shapes |= {"b_dec": (d_in,)} if bias else {}
    p = {n: integer_inputs(*s, generator=generator, largest=1, dtype=dtype) for n, s in shapes.items()}
    p["top_acts"] = p["top_acts"].float()
    p["top_indices"] = torch.randint(0, d_sae, (B, k), generator=generator)  # with repeats, which add up
    if weighted:
        p["weights"] = torch.randint(0, 3, (B,), generator=generator).float()
    return p


DECODE_SHAPES = [(0, 2, 5, 3), (1, 1, 1, 1), (37, 3, 101, 13), (5, 33, 140, 70), (2, LARGEST_FUSED_K + 4, 300, 6)]
DECODE_MODES = [(F32, None), (F32, "bf16"), (BF16, None)]


@pytest.mark.parametrize(("dtype", "precision"), DECODE_MODES, ids=["float32", "bf16", "bfloat16 tensors"])
@pytest.mark.parametrize(("B", "k", "d_sae", "d_in"), DECODE_SHAPES)
@pytest.mark.parametrize("extra", [False, True], ids=["plain", "bias, weights, int32"])
def test_t0_decode_and_loss(
    B: int, k: int, d_sae: int, d_in: int, dtype: torch.dtype, precision: str | None, extra: bool,
    generator: torch.Generator,
) -> None:  # fmt: skip
    inputs = decode_inputs(B, k, d_sae, d_in, generator, dtype, bias=extra, weighted=extra)
    wanted = [name for name in ("top_acts", "W_dec", "b_dec", "target") if name in inputs]

    def run(inputs: Tensors) -> Tensors:
        p = leaves(inputs)
        indices = p["top_indices"].int() if extra else p["top_indices"]
        code, decoder = topk_of(p["top_acts"], indices, p["W_dec"]), (p["W_dec"], p.get("b_dec"))
        x_hat = decode(code, *decoder, precision=precision)
        grads = torch.autograd.grad(x_hat, [p[n] for n in wanted if n != "target"], p["upstream"].to(x_hat.dtype))
        result = {"x_hat": x_hat.detach(), **{f"decode {n}": g for n, g in zip(wanted, grads)}}
        weights = p["weights"].detach() if extra else None
        loss = decode_loss(code, *decoder, p["target"], token_weights=weights, precision=precision)
        grads = torch.autograd.grad(2 * loss.loss, [p[n] for n in wanted])
        result |= {"loss": loss.loss.detach(), "loss x_hat": loss.x_hat, "residual": loss.residual}
        return {**result, **{f"loss {n}": g for n, g in zip(wanted, grads)}}

    def dense(inputs: Tensors) -> Tensors:
        p = leaves(inputs)
        x_hat = dense_decode(p)
        grads = torch.autograd.grad(x_hat, [p[n] for n in wanted if n != "target"], p["upstream"], retain_graph=True)
        result = {"x_hat": x_hat.detach(), **{f"decode {n}": g for n, g in zip(wanted, grads)}}
        errors = (p["target"] - x_hat).square().sum(1)
        loss = (errors * p["weights"].detach() if extra else errors).sum()
        grads = torch.autograd.grad(2 * loss, [p[n] for n in wanted])
        result |= {"loss": loss.detach(), "loss x_hat": x_hat.detach(), "residual": (p["target"] - x_hat).detach()}
        return {**result, **{f"loss {n}": g for n, g in zip(wanted, grads)}}

    assert_same(on_kernels(run, inputs), on_reference(run, inputs), dense(as_float64(inputs)))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_t1_decode_and_loss_are_as_accurate_as_dense_autograd(dtype: torch.dtype, generator: torch.Generator) -> None:
    inputs = decode_inputs(40, 9, 60, 33, generator, dtype, bias=True, weighted=False)
    for name, tensor in inputs.items():
        if tensor.is_floating_point():
            inputs[name] = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
    wanted = ["top_acts", "W_dec", "b_dec", "target"]

    def run(inputs: Tensors, sparse: bool) -> Tensors:
        p = leaves(inputs)
        if sparse:
            code, decoder = topk_of(p["top_acts"], p["top_indices"], p["W_dec"]), (p["W_dec"], p["b_dec"])
            x_hat, loss = decode(code, *decoder), decode_loss(code, *decoder, p["target"]).loss
        else:
            x_hat = dense_decode(p)
            loss = (p["target"] - x_hat).square().sum()
            loss = loss if loss.dtype == F64 else loss.float()
        grads = torch.autograd.grad(x_hat, [p[n] for n in wanted[:3]], p["upstream"], retain_graph=True)
        result = {"x_hat": x_hat.detach(), **{f"decode {n}": g for n, g in zip(wanted, grads)}}
        grads = torch.autograd.grad(loss, [p[n] for n in wanted])
        return {**result, "loss": loss.detach(), **{f"loss {n}": g for n, g in zip(wanted, grads)}}

    ours = on_kernels(lambda q: run(q, sparse=True), inputs)
    theirs, exact = run(inputs, sparse=False), run(as_float64(inputs), sparse=False)
    for name in exact:
        assert_as_accurate(ours[name], theirs[name], exact[name], name)


def test_t0_rows_that_are_not_contiguous(generator: torch.Generator) -> None:
    inputs = decode_inputs(6, 3, 40, 13, generator, F32, bias=False, weighted=False)
    wide = integer_inputs(40, 26, generator=generator).to(DEVICE)
    p = {name: tensor.to(DEVICE) for name, tensor in inputs.items()}
    for W_dec in (wide[:, :13], wide[:, ::2], wide.T.contiguous().T[:, :13]):
        x_hat = decode(topk_of(p["top_acts"].T.contiguous().T, p["top_indices"], W_dec), W_dec)
        expected = dense_decode({**inputs, "W_dec": W_dec.cpu()})
        assert torch.equal(x_hat.cpu(), expected)
        code = encode_topk(p["target"], W_dec, torch.zeros(40, device=DEVICE), 4)
        assert torch.equal(code.top_indices.cpu(), stable_topk(inputs["target"] @ W_dec.cpu().T, 4)[1])


def dense_latent_rows(inputs: Tensors, d_sae: int) -> Tensor:
    coeffs = inputs["coeffs"]
    code = coeffs.new_zeros(len(coeffs), d_sae).scatter_add(1, inputs["top_indices"], coeffs)
    return code.T @ inputs["rows"].to(coeffs.dtype)


@pytest.mark.parametrize(("dtype", "result"), [(F32, None), (BF16, None), (BF16, F32), (F32, BF16)])
@pytest.mark.parametrize(
    ("B", "k", "d_sae", "d"), [(0, 2, 5, 3), (1, 1, 1, 1), (37, 3, 50, 7), (3, 30, 40, 600), (2 * RUN + 1, 2, 3, 5)]
)
def test_t0_latent_rows(
    B: int, k: int, d_sae: int, d: int, dtype: torch.dtype, result: torch.dtype | None, generator: torch.Generator
) -> None:
    inputs = {
        "top_indices": torch.randint(0, d_sae, (B, k), generator=generator),
        "coeffs": integer_inputs(B, k, generator=generator, largest=1),
        "rows": integer_inputs(B, d, generator=generator, largest=1, dtype=dtype),
    }

    def run(q: Tensors) -> Tensors:
        return {"rows": latent_rows(index_of(q["top_indices"], d_sae), q["coeffs"], q["rows"], dtype=result)}

    ours, theirs = on_kernels(run, inputs), on_reference(run, inputs)
    assert ours["rows"].dtype == (result or dtype)
    assert_same(ours, theirs, {"rows": dense_latent_rows(as_float64(inputs), d_sae)})


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("B", [RUN, RUN + 1, 600])
def test_t0_and_t3_a_latent_active_on_every_token(B: int, k: int, generator: torch.Generator) -> None:
    top_indices = torch.randint(0, 5, (B, k), generator=generator)
    top_indices[:, 0] = 3
    inputs = {
        "top_indices": top_indices,
        "coeffs": integer_inputs(B, k, generator=generator),
        "rows": integer_inputs(B, 6, generator=generator),
    }

    def run(q: Tensors) -> Tensors:
        index = index_of(q["top_indices"], 6)
        return {"rows": latent_rows(index, q["coeffs"], q["rows"]), "sums": latent_sums(index, q["coeffs"])}

    ones = torch.ones(B, 1, dtype=F64)
    exact = {"rows": dense_latent_rows(as_float64(inputs), 6)}
    exact["sums"] = dense_latent_rows(as_float64({**inputs, "rows": ones}), 6)[:, 0]
    assert_same(on_kernels(run, inputs), on_reference(run, inputs), exact)
    inputs["coeffs"] = torch.randn(B, k, generator=generator)
    inputs["rows"] = torch.randn(B, 6, generator=generator)
    first, second = on_kernels(run, inputs), on_kernels(run, inputs)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert_as_accurate(first["rows"], dense_latent_rows(inputs, 6), dense_latent_rows(as_float64(inputs), 6))


def test_t3_two_whole_steps_give_the_same_bits(generator: torch.Generator) -> None:
    inputs = step_inputs(20 if DEVICE == "cuda" else 7, 13, 70, generator, integer=False)
    first, second = (on_kernels(lambda q: whole_step(q, 4), inputs) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_dense_dispatch_gives_the_same_integers_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, generator: torch.Generator
) -> None:
    inputs = step_inputs(5, 6, 50, generator, integer=True)
    sparse = on_kernels(lambda q: whole_step(q, 3), inputs)
    backend.log_once.cache_clear()
    monkeypatch.setenv("FLASHSAE_DENSE_ABOVE", "0")
    with caplog.at_level(logging.INFO, "flashsae"):
        dense = [on_kernels(lambda q: whole_step(q, 3), inputs) for _ in range(2)]
    for name in sparse:
        assert torch.equal(sparse[name], dense[0][name]), name
    said = [record.getMessage() for record in caplog.records if "dense matrix products" in record.getMessage()]
    assert sorted(message.split(" latents a token")[0] for message in said) == ["1 of 50", "3 of 50"]


@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
def test_t0_rows_are_sorted_for_more_latents_than_a_program_can_hold(
    precision: str, magnitude: bool, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flashsae.ops.encode.launch.LARGEST_K", 6)
    inputs = encode_inputs(10, 13, 120, 7, generator)
    inputs["scale"] = torch.randint(0, 4, (120,), generator=generator).float()

    def run(inputs: Tensors, workspace_bytes: int = 3 * 120 * 32) -> Tensors:  # three rows at a time
        p = leaves(inputs)
        code = encode_topk(
            p["x"], p["W_enc_T"], p["b_enc"], 7, b_dec=p["b_dec"], key_scale=p["scale"].detach(), magnitude=magnitude,
            precision=precision, workspace_bytes=workspace_bytes,
        )  # fmt: skip
        return _with_gradients(code, p)

    ours, theirs = on_kernels(run, inputs), on_reference(run, inputs)
    for name in ours:
        assert torch.equal(ours[name].double(), theirs[name].double()), name


@pytest.mark.parametrize("problem", HARD)
def test_t2_rows_that_are_sorted_are_certified(
    problem: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flashsae.ops.encode.launch.LARGEST_K", 6)
    x, W, bias = hard_inputs(problem, 12, 24, 150, generator)
    code = encode_topk(x.to(DEVICE), W.to(DEVICE), bias.to(DEVICE), 7, precision="float32")
    assert selection_mistakes(x, W, bias, code.top_indices.cpu())[0] == 0


def test_kernels_run_where_expected(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else everything above compared the reference with itself."""

    def launched(*_: object, **__: object) -> None:
        raise RuntimeError("launched")

    from flashsae.ops.decode import launch as decode_launch
    from flashsae.ops.encode import launch as encode_launch
    from flashsae.ops.latent_rows import launch as rows_launch

    inputs = step_inputs(5, 4, 20, generator, integer=False)
    theirs = on_reference(lambda q: whole_step(q, 3), as_float64(inputs))
    for module, name in (
        (encode_launch, "launch_encode_topk"),
        (decode_launch, "launch_decode_loss"),
        (rows_launch, "launch_latent_rows"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, launched)
            with pytest.raises(RuntimeError, match="launched"):
                on_kernels(lambda q: whole_step(q, 3), inputs)
            on_reference(lambda q: whole_step(q, 3), inputs)
            ours = on_kernels(lambda q: whole_step(q, 3), as_float64(inputs))  # the kernels accumulate in float32
            for result in ours:
                torch.testing.assert_close(ours[result], theirs[result], rtol=1e-12, atol=1e-12)
