from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flashsae.errors import ConfigError, DtypeError, ShapeError
from flashsae.ops import LatentIndex, SparseCode, decode, decode_loss, encode_topk, inference_memory
from flashsae.ops.encode.reference import select_topk
from flashsae.testing import assert_as_accurate, chosen, dense_topk, integer_inputs, poison_empty, stable_topk

SHAPES = [(0, 5, 7, 3), (1, 1, 1, 1), (1, 8, 16, 16), (37, 13, 101, 1), (37, 13, 101, 7), (64, 24, 96, 33)]
NAMES = ("x", "W_enc_T", "b_enc", "b_dec")


def _integers(B: int, d_in: int, d_sae: int, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
    shapes = {"x": (B, d_in), "W_enc_T": (d_sae, d_in), "b_enc": (d_sae,), "b_dec": (d_in,)}
    return {name: integer_inputs(*shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}


def _relu(code: SparseCode) -> tuple[Tensor, Tensor]:
    """Return the code as a TopK SAE has it."""
    return code.top_acts.relu(), code.top_indices


def _normals(B: int, d_in: int, d_sae: int, generator: torch.Generator) -> dict[str, Tensor]:
    shapes = {"x": (B, d_in), "W_enc_T": (d_sae, d_in), "b_enc": (d_sae,), "b_dec": (d_in,)}
    return {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("B", "d_in", "d_sae", "k"), SHAPES)
def test_t0_integers_are_bitwise_equal(
    B: int, d_in: int, d_sae: int, k: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    p = _integers(B, d_in, d_sae, generator, dtype)
    with poison_empty():
        code = encode_topk(p["x"], p["W_enc_T"], p["b_enc"], k, b_dec=p["b_dec"])
    pre_acts = (p["x"] - p["b_dec"]).float() @ p["W_enc_T"].float().T + p["b_enc"].float()
    expected = stable_topk(pre_acts, k)[1]  # integers tie all the time
    assert torch.equal(code.top_indices, expected)
    assert torch.equal(code.top_acts.float(), pre_acts.gather(1, expected))  # of any sign


@pytest.mark.parametrize("largest", [2, 9, 1000])
@pytest.mark.parametrize(("d_sae", "k"), [(101, 1), (128, 7), (135, 7), (127, 7), (1031, 33)])
def test_t0_long_rows_are_searched_by_groups(d_sae: int, k: int, largest: int, generator: torch.Generator) -> None:
    keys = torch.randint(0, largest, (150, d_sae), generator=generator).float()
    keys[50:100, : d_sae // 2] -= largest  # the largest lie together
    keys[100:, : -(d_sae // 6)] -= largest
    assert torch.equal(select_topk(keys, k), stable_topk(keys, k)[1])


@pytest.mark.parametrize(("B", "d_in", "d_sae", "k"), SHAPES)
def test_t0_gradients_of_integers_are_bitwise_equal(
    B: int, d_in: int, d_sae: int, k: int, generator: torch.Generator
) -> None:
    p = {n: t.requires_grad_() for n, t in _integers(B, d_in, d_sae, generator, torch.float32).items()}
    upstream = integer_inputs(B, k, generator=generator)
    with poison_empty():
        top_acts, top_indices = _relu(encode_topk(p["x"], p["W_enc_T"], p["b_enc"], k, b_dec=p["b_dec"]))
        ours = torch.autograd.grad(top_acts, [p[n] for n in NAMES], upstream)
    dense = dense_topk(
        p["x"], p["W_enc_T"], p["b_enc"], top_indices.shape[1], p["b_dec"], topk=chosen(top_indices)
    ).gather(1, top_indices)
    theirs = torch.autograd.grad(dense, [p[n] for n in NAMES], upstream)
    for name, a, b in zip(NAMES, ours, theirs):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("k", [1, 5, 32])
def test_t1_as_accurate_as_dense_autograd(k: int, generator: torch.Generator) -> None:
    p = {n: t.requires_grad_() for n, t in _normals(200, 48, 160, generator).items()}
    top_acts, top_indices = _relu(encode_topk(p["x"], p["W_enc_T"], p["b_enc"], k, b_dec=p["b_dec"]))
    upstream = torch.randn(200, k, generator=generator)
    ours = torch.autograd.grad(top_acts, [p[n] for n in NAMES], upstream)

    def dense(dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
        q = {n: t.detach().to(dtype).requires_grad_() for n, t in p.items()}
        acts = dense_topk(
            q["x"], q["W_enc_T"], q["b_enc"], top_indices.shape[1], q["b_dec"], topk=chosen(top_indices)
        ).gather(1, top_indices)
        return acts, torch.autograd.grad(acts, [q[n] for n in NAMES], upstream.to(dtype))

    acts32, grads32 = dense(torch.float32)
    acts64, grads64 = dense(torch.float64)
    assert_as_accurate(top_acts, acts32, acts64, "top_acts")
    for name, a, b, c in zip(NAMES, ours, grads32, grads64):
        assert_as_accurate(a, b, c, f"grad {name}")


def test_t1_bfloat16_beats_a_dense_bfloat16_product(generator: torch.Generator) -> None:
    p = {n: t.bfloat16() for n, t in _normals(64, 128, 256, generator).items()}
    top_acts, top_indices = _relu(encode_topk(p["x"], p["W_enc_T"], p["b_enc"], 8))
    exact = (p["x"].double() @ p["W_enc_T"].double().T + p["b_enc"].double()).gather(1, top_indices).relu()
    dense = (p["x"] @ p["W_enc_T"].T + p["b_enc"]).gather(1, top_indices).relu()
    assert top_acts.dtype == torch.float32
    assert (top_acts.double() - exact).abs().max() < (dense.double() - exact).abs().max() / 50


def test_t2_selection_differs_from_float64_only_inside_rounding(generator: torch.Generator) -> None:
    p = _normals(500, 64, 512, generator)
    _, top_indices = _relu(encode_topk(p["x"], p["W_enc_T"], p["b_enc"], 16))
    exact = p["x"].double() @ p["W_enc_T"].double().T + p["b_enc"].double()
    kth = exact.topk(16, dim=1).values[:, -1:]
    margin = 64 * torch.finfo(torch.float32).eps * p["x"].double().norm(dim=1, keepdim=True) * 8
    assert bool((exact.gather(1, top_indices) >= kth - margin).all())


def test_t3_two_runs_and_any_workspace_give_the_same_bits(generator: torch.Generator) -> None:
    p = _integers(37, 16, 64, generator, torch.float32)
    runs = [
        _relu(encode_topk(p["x"], p["W_enc_T"], p["b_enc"], 5, workspace_bytes=size))
        for size in (1, 5000, 1 << 20, 1 << 20)
    ]
    for acts, indices in runs[1:]:
        assert torch.equal(acts, runs[0][0])
        assert torch.equal(indices, runs[0][1])


def test_the_workspace_bounds_the_largest_tensor(generator: torch.Generator) -> None:
    p = _normals(512, 16, 1024, generator)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes())
            return result

    weights = [p[n].requires_grad_() for n in ("W_enc_T", "b_enc")]
    with Watch():
        top_acts, _ = _relu(encode_topk(p["x"], *weights, 4, workspace_bytes=100_000))
        top_acts.backward(torch.ones_like(top_acts))
    assert largest <= 100_000  # [B, d_sae] would be 2 MiB


def test_ties_go_to_the_lowest_index() -> None:
    x, ones = torch.ones(3, 2), torch.ones(9, 2)
    _, top_indices = _relu(encode_topk(x, ones, torch.zeros(9), 4))
    assert top_indices.tolist() == [[0, 1, 2, 3]] * 3
    weights = torch.tensor([[1.0], [3.0], [2.0], [2.0], [2.0], [3.0], [0.0]])
    _, top_indices = _relu(encode_topk(torch.ones(1, 1), weights, torch.zeros(7), 3))
    assert top_indices.tolist() == [[1, 2, 5]]


def test_fewer_positive_than_k_gives_zeros_without_gradient() -> None:
    W_enc_T = torch.tensor([[1.0], [-1.0], [-2.0], [0.0]], requires_grad=True)
    b_enc = torch.zeros(4, requires_grad=True)
    top_acts, top_indices = _relu(encode_topk(torch.ones(1, 1), W_enc_T, b_enc, 3))
    assert top_indices.tolist() == [[0, 1, 3]]
    assert top_acts.tolist() == [[1.0, 0.0, 0.0]]
    top_acts.backward(torch.ones(1, 3))
    assert b_enc.grad is not None
    assert b_enc.grad.tolist() == [1.0, 0.0, 0.0, 0.0]


def test_a_row_with_nan_shows_and_harms_no_other(generator: torch.Generator) -> None:
    p = _normals(3, 4, 20, generator)
    clean, _ = _relu(encode_topk(p["x"], p["W_enc_T"], p["b_enc"], 5))
    p["x"][1, 2] = torch.nan
    top_acts, top_indices = _relu(encode_topk(p["x"], p["W_enc_T"], p["b_enc"], 5))
    assert bool(top_acts[1].isnan().all())
    assert bool(((top_indices >= 0) & (top_indices < 20)).all())
    assert top_indices[1].unique().numel() == 5
    torch.testing.assert_close(top_acts[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("k", range(1, 6))
def test_rows_with_infinity_give_valid_distinct_indices(k: int) -> None:
    weights = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 1.0]])
    x = torch.tensor([[torch.inf, 0.0], [-torch.inf, 1.0], [1.0, 2.0]])
    top_acts, top_indices = _relu(encode_topk(x, weights, torch.zeros(5), k))
    assert all(len(set(row)) == k and 0 <= min(row) <= max(row) < 5 for row in top_indices.tolist())
    assert top_acts[0].isfinite().logical_not().any()
    assert torch.equal(top_acts[2], (weights @ x[2])[top_indices[2]])


def test_a_weight_that_is_nan_is_not_passed_over() -> None:
    weights = torch.zeros(5, 2)
    weights[3, 0] = torch.nan
    for k in range(1, 6):
        top_acts, top_indices = _relu(encode_topk(torch.ones(1, 2), weights, torch.zeros(5), k))
        assert 3 in top_indices[0].tolist()
        assert bool(top_acts.isnan().any())


def test_t0_key_scale_changes_the_choice_but_not_the_values(generator: torch.Generator) -> None:
    p = _integers(23, 6, 40, generator, torch.float32)
    scale = 2.0 ** torch.randint(-3, 4, (40,), generator=generator)
    scale[7] = 0
    top_acts, top_indices = _relu(encode_topk(p["x"], p["W_enc_T"], p["b_enc"], 5, key_scale=scale))
    pre_acts = p["x"] @ p["W_enc_T"].T + p["b_enc"]
    assert torch.equal(top_indices, stable_topk(pre_acts * scale, 5)[1])
    assert torch.equal(top_acts, pre_acts.gather(1, top_indices).relu())
    assert not torch.equal(top_indices, stable_topk(pre_acts, 5)[1])


def test_one_index_serves_a_whole_step(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    built, of_entries = [], LatentIndex.of_entries

    def count(*args: Any, **settings: Any) -> LatentIndex:
        built.append(of_entries(*args, **settings))
        return built[-1]

    monkeypatch.setattr(LatentIndex, "of_entries", count)
    p = {n: t.requires_grad_() for n, t in _integers(23, 6, 40, generator, torch.float32).items()}
    code = encode_topk(p["x"], p["W_enc_T"], p["b_enc"], 5)
    code = code.replace(code.acts.relu())
    W_dec = p["W_enc_T"].detach().clone().requires_grad_()
    (decode(code, W_dec).sum() + decode_loss(code, W_dec, None, p["x"]).loss).backward()
    assert len(built) == 1
    assert code.pattern.index is built[0]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": 0}, ConfigError, r"k: expected 1 <= k <= 6, .* got 0"),
        ({"k": 7}, ConfigError, r"k: expected 1 <= k <= 6, .* got 7"),
        ({"k": 2.0}, DtypeError, r"k: expected an int, got float"),
        ({"x": torch.zeros(2, 5)}, ShapeError, r"x: expected the shape \[B, 4\], got \[2, 5\]"),
        ({"x": torch.zeros(4)}, ShapeError, r"x: expected the shape \[B, 4\], got \[4\]"),
        ({"x": torch.zeros(2, 4, dtype=torch.int64)}, DtypeError, r"x: expected a float tensor, got torch.int64"),
        ({"x": torch.zeros(2, 4, dtype=torch.float64)}, DtypeError, r"W_enc_T: expected torch.float64, the dtype of x"),
        ({"b_enc": torch.zeros(5)}, ShapeError, r"b_enc: expected the shape \[6\], got \[5\]"),
        ({"b_dec": torch.zeros(6)}, ShapeError, r"b_dec: expected the shape \[4\], got \[6\]"),
        ({"key_scale": torch.zeros(4)}, ShapeError, r"key_scale: expected the shape \[6\], got \[4\]"),
        (
            {"precision": "fp8"},
            ConfigError,
            r"precision: expected one of float32, tf32, bf16, bf16-int8, float32-int8, got ",
        ),
        ({"noise": 3}, DtypeError, r"noise: expected a tensor, got int"),
        ({"noise": torch.zeros(1, dtype=torch.int64)}, ShapeError, r"noise: expected the shape \[\], got \[1\]"),
        ({"noise": torch.tensor(3.0)}, DtypeError, r"noise: expected an int64 tensor, got torch.float32"),
        ({"noise": torch.zeros((), dtype=torch.int64, device="meta")}, DtypeError, r"noise: expected the device of x"),
        ({"workspace_bytes": 0}, ConfigError, r"workspace_bytes: expected a positive number"),
        ({"weight_bytes": -1}, ConfigError, r"weight_bytes: expected a number of bytes, or 0 for no bound, got -1"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], error: type[Exception], message: str) -> None:
    good = {"x": torch.zeros(2, 4), "W_enc_T": torch.zeros(6, 4), "b_enc": torch.zeros(6), "k": 2}
    with pytest.raises(error, match=message):
        encode_topk(**{**good, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [4096, 16384, 65536])
def test_inference_takes_less_than_a_tenth_of_what_dense_codes_would(tokens: int, dtype: torch.dtype) -> None:
    d_in, d_sae = 4096, 131072
    x, W = torch.empty(tokens, d_in, dtype=dtype, device="meta"), torch.empty(d_sae, d_in, dtype=dtype, device="meta")
    memory = inference_memory(x, W)
    rounded = memory.get("weight_bytes") or 2 * d_sae * d_in
    copies = tokens * d_in * (6 if dtype == torch.float32 else 2)  # centred, and in float16
    used = memory["workspace_bytes"] * 9 / 8 + (rounded if dtype == torch.float32 else 0) + copies
    assert used < 0.1 * 2 * tokens * d_sae * dtype.itemsize
    assert memory["workspace_bytes"] >= 256 * d_sae * dtype.itemsize  # and still multiplies many tokens at once


def test_memory_of_inference_has_a_floor_and_is_that_of_training_on_the_cpu() -> None:
    x, W = torch.empty(1, 64), torch.empty(512, 64)
    assert inference_memory(x, W) == {}
    few = inference_memory(x.to("meta"), W.to("meta"))
    assert few == {"workspace_bytes": 64 << 20, "weight_bytes": 32 << 20}


def test_memory_of_a_graph_for_any_number_of_tokens_does_not_go_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert inference_memory(torch.empty(9, 64, device="meta"), torch.empty(512, 64, device="meta")) == {}
