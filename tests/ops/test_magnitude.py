"""Selection by absolute value: the reference against dense float64, the kernels against both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flashsae.ops import SparseCode, by_value, encode_batch_topk, encode_topk
from flashsae.testing import assert_as_accurate, chosen, dense_pre_acts, integer_inputs, poison_empty, stable_topk
from helpers.selection import HARD, hard_inputs, selection_mistakes
from helpers.steps import Tensors

NAMES = ("x", "W_enc_T", "b_enc", "b_dec")
B, D_IN, D_SAE = 6, 13, 101


@pytest.fixture(autouse=True)
def _sparse_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHSAE_DENSE_ABOVE", "1")


def _integers(generator: torch.Generator, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensors:
    shapes = {"x": (B, D_IN), "W_enc_T": (D_SAE, D_IN), "b_enc": (D_SAE,), "b_dec": (D_IN,)}
    made = {n: integer_inputs(*s, generator=generator, largest=1, dtype=dtype) for n, s in shapes.items()}
    made["scale"] = torch.randint(0, 4, (D_SAE,), generator=generator).to(dtype)
    return {name: tensor.to(device) for name, tensor in made.items()}


def _pre_acts(p: Tensors) -> Tensor:
    return dense_pre_acts(*(p[name].double() for name in NAMES))


def _encode(p: Tensors, k: int, precision: str | None = None, *, scaled: bool = False) -> SparseCode:
    scale = p["scale"] if scaled else None
    with poison_empty():
        return encode_topk(
            *(p[name] for name in NAMES[:3]), k, b_dec=p["b_dec"], key_scale=scale, magnitude=True, precision=precision
        )


@pytest.mark.parametrize(
    ("k", "precision", "scaled"),
    [(1, "float32", False), (5, "float32", True), (D_SAE, "float32", False), (5, "bf16", True), (40, "bf16", True)],
)  # by groups, from whole rows, and all
def test_t0_the_largest_by_magnitude_with_their_signs(
    k: int, precision: str, scaled: bool, device: str, generator: torch.Generator
) -> None:
    p = _integers(generator, device)
    code, pre_acts = _encode(p, k, precision, scaled=scaled), _pre_acts(p)
    expected = stable_topk(pre_acts.abs() * (p["scale"] if scaled else 1.0), k)[1]  # integers tie all the time
    assert torch.equal(code.top_indices, expected)
    assert torch.equal(code.top_acts.double(), pre_acts.gather(1, expected))
    assert k == 1 or bool((code.top_acts < 0).any())


def test_t0_gradients_go_through_the_selected(device: str, generator: torch.Generator) -> None:
    p = {name: tensor.requires_grad_() for name, tensor in _integers(generator, device).items() if name != "scale"}
    code = _encode(p, 5)
    upstream = integer_inputs(B, 5, generator=generator).to(device)
    ours = torch.autograd.grad(code.acts, [p[n] for n in NAMES], upstream)
    dense = dense_pre_acts(*(p[n] for n in NAMES)).gather(1, code.top_indices)
    theirs = torch.autograd.grad(dense, [p[n] for n in NAMES], upstream)
    for name, a, b in zip(NAMES, ours, theirs):
        assert torch.equal(a, b), name


def test_t1_as_accurate_as_dense_autograd(device: str, generator: torch.Generator) -> None:
    p = {n: torch.randn(t.shape, generator=generator).to(device) for n, t in _integers(generator).items()}
    q = {n: p[n].requires_grad_() for n in NAMES}
    code = _encode(q, 5)
    upstream = torch.randn(B, 5, generator=generator).to(device)
    ours = code.acts, *torch.autograd.grad(code.acts, [q[n] for n in NAMES], upstream)

    def dense(dtype: torch.dtype) -> tuple[Tensor, ...]:
        r = [q[n].detach().to(dtype).requires_grad_() for n in NAMES]
        acts, _ = chosen(code.top_indices)(dense_pre_acts(*r), 5)
        return acts, *torch.autograd.grad(acts, r, upstream.to(dtype))

    for name, a, b, c in zip(("acts", *NAMES), ours, dense(torch.float32), dense(torch.float64)):
        assert_as_accurate(a, b, c, name)


@pytest.mark.parametrize("kind", HARD[1:4])
def test_t2_certified_where_rounding_is_hard(kind: str, device: str, generator: torch.Generator) -> None:
    x, W, bias = (tensor.to(device) for tensor in hard_inputs(kind, 6, 16, 150, generator))
    code = encode_topk(x, W, bias, 9, magnitude=True)
    wrong, _ = selection_mistakes(x, W, bias, code.top_indices, magnitude=True)
    assert wrong == 0


@pytest.mark.parametrize("scaled", [False, True])
def test_t0_a_row_with_too_many_candidates_is_redone(
    scaled: bool, device: str, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    if device != "cpu" or torch.cuda.is_available():
        pytest.importorskip("triton")
    from flashsae.ops.encode.launch import Layout

    monkeypatch.setattr(Layout, "capacity", property(lambda self: 16))
    p = _integers(generator, device)
    p["W_enc_T"][:, 0], p["W_enc_T"][::2, 0], p["b_enc"][:] = 2.0, -2.0, 0.0
    p["x"][:2] = p["b_dec"]  # all tie, exactly
    p["x"][2:4] = p["b_dec"] + torch.eye(D_IN, device=device)[0]  # all tie by magnitude, which bounds cannot know
    code, pre_acts = _encode(p, 5, scaled=scaled), _pre_acts(p)
    expected = stable_topk(pre_acts.abs() * (p["scale"] if scaled else 1.0), 5)[1]
    assert torch.equal(code.top_indices, expected)
    assert torch.equal(code.top_acts.double(), pre_acts.gather(1, expected))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy, in the interpreter
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("d_sae", [7, 101])
def test_what_is_not_finite_is_large(d_sae: int, precision: str, device: str) -> None:
    x, W = torch.ones(1, 2, device=device), torch.ones(d_sae, 2, device=device)
    bias = torch.zeros(d_sae, device=device)
    bias[2], bias[3], bias[5] = -torch.inf, torch.nan, torch.inf
    for k, expected in ((1, [3]), (2, [2, 3]), (3, [2, 3, 5]), (4, [0, 2, 3, 5])):
        code = encode_topk(x, W, bias, k, magnitude=True, precision=precision)
        assert code.top_indices.tolist() == [expected]
    assert code.top_acts[0, 1] == -torch.inf


def test_of_opposite_values_the_lowest_latent_wins(device: str) -> None:
    W = torch.tensor([[1.0], [-3.0], [3.0], [-3.0], [2.0]], device=device)
    for sign in (1.0, -1.0):
        code = encode_topk(torch.full((1, 1), sign, device=device), W, torch.zeros(5, device=device), 2, magnitude=True)
        assert code.top_indices.tolist() == [[1, 2]]
        assert code.top_acts.tolist() == [[-3.0 * sign, 3.0 * sign]]


def test_t3_two_runs_and_any_workspace_give_the_same_bits(device: str, generator: torch.Generator) -> None:
    x, W = torch.randn(9, 8, generator=generator).to(device), torch.randn(70, 8, generator=generator).to(device)
    bias = torch.zeros(70, device=device)
    sizes = (3 * 72 * 4, 1 << 20, 1 << 20)
    runs = [encode_topk(x, W, bias, 3, magnitude=True, workspace_bytes=size) for size in sizes]
    for code in runs[1:]:
        assert torch.equal(code.top_indices, runs[0].top_indices)
        assert torch.equal(code.acts, runs[-1].acts) or device == "cpu"  # the order of a product's sums is PyTorch's


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("way_out", [False, True])
def test_t0_the_largest_of_a_batch(
    precision: str, way_out: bool, device: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way_out:
        pytest.importorskip("triton")
        from flashsae.ops.select import batch

        monkeypatch.setattr(batch, "capacity_of", lambda *_: 1)
    p = _integers(generator, device)
    with poison_empty():
        code = encode_batch_topk(
            *(p[name] for name in NAMES[:3]), 4, b_dec=p["b_dec"], key_scale=p["scale"], magnitude=True,
            precision=precision, workspace_bytes=4 * 2 * 101 * 4,
        )  # fmt: skip
    pre_acts = _pre_acts(p)
    _, best = stable_topk((pre_acts.abs() * p["scale"]).flatten(), 4 * B)
    assert torch.equal(code.pattern.latents.long(), best % D_SAE)
    assert torch.equal(code.pattern.tokens.long(), best // D_SAE)
    assert torch.equal(code.acts.double(), pre_acts.flatten()[best])


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
@pytest.mark.parametrize("k", [32, 300])
def test_gpu_t0_at_real_sizes_and_in_a_graph(k: int, precision: Any, generator: torch.Generator) -> None:
    x, W = (integer_inputs(*shape, generator=generator, largest=1).cuda() for shape in ((1000, 96), (16384, 96)))
    bias = torch.zeros(16384, device="cuda")

    def run() -> SparseCode:
        return by_value(encode_topk(x, W, bias, k, magnitude=True, precision=precision), magnitude=True)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(2):
        x.copy_(integer_inputs(1000, 96, generator=generator, largest=1))
        graph.replay()
        pre_acts = x.double() @ W.double().T
        places = pre_acts.abs().sort(dim=1, descending=True, stable=True).indices[:, :k]
        assert torch.equal(captured.top_indices, places)
        assert torch.equal(captured.top_acts.double(), pre_acts.gather(1, places))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", HARD)
def test_gpu_t2_certified_at_real_sizes(kind: str, generator: torch.Generator) -> None:
    x, W, bias = (tensor.cuda() for tensor in hard_inputs(kind, 512, 768, 16384, generator))
    code = encode_topk(x, W, bias, 32, magnitude=True)
    assert selection_mistakes(x, W, bias, code.top_indices, magnitude=True)[0] == 0
