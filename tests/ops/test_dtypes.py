"""Every combination of dtypes that operations take gives the documented dtype, and no digit is lost on the way."""

from __future__ import annotations

import itertools
import os
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from flashsae.ops import decode, decode_loss, encode_topk, latent_rows
from flashsae.ops.validate import compute_dtype
from flashsae.testing import assert_as_accurate
from helpers.codes import index_of, topk_of
from helpers.on_both import DEVICE
from helpers.steps import Tensors, leaves

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
B, D_IN, D_SAE, K = 9, 12, 40, 4

ENCODE = [
    (x, W, b_enc, b_dec)
    for x in (F32, F64, BF16, F16)
    for W, b_enc, b_dec in itertools.product(*(dict.fromkeys((x, narrow)) for narrow in (BF16, F32, F32)))
]
DECODE = [
    (acts, W, b_dec, target)
    for acts, W, target in itertools.product((F32, F64, BF16), (F32, F64, BF16, F16), (F32, F64, BF16, F16))
    for b_dec in dict.fromkeys((W, F32))
]


def _normals(shapes: dict[str, tuple[int, ...]], dtypes: tuple[torch.dtype, ...]) -> Tensors:
    generator = torch.Generator().manual_seed(5)
    return {
        name: torch.randn(*shape, generator=generator).to(dtype) for (name, shape), dtype in zip(shapes.items(), dtypes)
    }


def _wide(inputs: Tensors, dtype: torch.dtype) -> Tensors:
    return leaves({name: tensor.to(dtype) for name, tensor in inputs.items()})


def _check_encode(dtypes: tuple[torch.dtype, ...]) -> None:
    inputs = _normals({"x": (B, D_IN), "W": (D_SAE, D_IN), "b_enc": (D_SAE,), "b_dec": (D_IN,)}, dtypes)
    p = leaves({name: tensor.to(DEVICE) for name, tensor in inputs.items()})
    code = encode_topk(p["x"], p["W"], p["b_enc"], K, b_dec=p["b_dec"], precision="float32")
    acts, indices = code.acts.relu(), code.top_indices
    wide = compute_dtype(dtypes[0])
    assert acts.dtype == wide
    upstream = torch.randn(B, K, generator=torch.Generator().manual_seed(6)).to(wide)
    grads = torch.autograd.grad(acts, list(p.values()), upstream.to(DEVICE))

    def dense(dtype: torch.dtype) -> list[Tensor]:
        q = _wide(inputs, dtype)
        values = ((q["x"] - q["b_dec"]) @ q["W"].T + q["b_enc"]).gather(1, indices.cpu()).relu()
        return [values.detach(), *torch.autograd.grad(values, list(q.values()), upstream.to(dtype))]

    for name, ours, theirs, exact in zip(("acts", *p), (acts.detach(), *grads), dense(wide), dense(F64)):
        expected = wide if name == "acts" else inputs[name].dtype
        assert_as_accurate(ours.cpu(), theirs.to(expected), exact, name)


@pytest.mark.parametrize("dtypes", ENCODE, ids=str)
def test_t1_encode(dtypes: tuple[torch.dtype, ...]) -> None:
    _check_encode(dtypes)


@pytest.mark.parametrize("dtypes", [(F32, BF16, F32, F32), (BF16, BF16, F32, BF16), (F64, BF16, F64, F32)], ids=str)
@pytest.mark.parametrize("dense_above", ["0", "1"])
def test_t1_encode_on_kernels(
    dtypes: tuple[torch.dtype, ...], dense_above: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    if dtypes[0] == BF16 and dense_above == "0":
        pytest.skip("the dense product rounds, as documented")
    monkeypatch.setenv("FLASHSAE_BACKEND", "triton")
    monkeypatch.setenv("FLASHSAE_DENSE_ABOVE", dense_above)
    _check_encode(dtypes)


def _check_decode(dtypes: tuple[torch.dtype, ...]) -> None:
    shapes = {"acts": (B, K), "W": (D_SAE, D_IN), "b_dec": (D_IN,), "target": (B, D_IN)}
    inputs, generator = _normals(shapes, dtypes), torch.Generator().manual_seed(7)
    indices = torch.rand(B, D_SAE, generator=generator).topk(K).indices
    weights = torch.rand(B, generator=generator)
    p = leaves({name: tensor.to(DEVICE) for name, tensor in inputs.items()})
    code = topk_of(p["acts"], indices.to(DEVICE), p["W"])
    found = decode_loss(code, p["W"], p["b_dec"], p["target"], token_weights=weights.to(DEVICE))
    x_hat = decode(code, p["W"], p["b_dec"])
    upstream = torch.randn(B, D_IN, generator=generator).to(dtypes[1])
    ours = {"loss": found.loss.detach(), "x_hat": found.x_hat, "residual": found.residual, "decoded": x_hat.detach()}
    ours |= zip(p, torch.autograd.grad(found.loss, list(p.values())))
    names = ("acts", "W", "b_dec")
    grads = torch.autograd.grad(x_hat, [p[name] for name in names], upstream.to(DEVICE))
    ours |= {f"decoded {name}": grad for name, grad in zip(names, grads)}

    def dense(dtype: torch.dtype, rounded: torch.dtype) -> Tensors:
        q = _wide(inputs, dtype)
        code = torch.zeros(B, D_SAE, dtype=dtype).scatter_add(1, indices, q["acts"])
        decoded = code @ q["W"] + q["b_dec"]
        residual = q["target"] - decoded
        loss = (weights.to(dtype)[:, None] * residual.square()).sum()
        result = {"loss": loss, "x_hat": decoded, "residual": residual, "decoded": decoded}
        result |= zip(q, torch.autograd.grad(loss, list(q.values()), retain_graph=True))
        # as documented, these two are of the residual as it is returned
        slope = -2 * weights.to(dtype)[:, None] * residual.to(rounded).to(dtype)
        result |= zip(("W", "b_dec"), torch.autograd.grad(decoded, [q["W"], q["b_dec"]], slope, retain_graph=True))
        grads = torch.autograd.grad(decoded, [q[name] for name in names], upstream.to(dtype))
        result |= {f"decoded {name}": grad for name, grad in zip(names, grads)}
        return {name: tensor.detach() for name, tensor in result.items()}

    acts, W, _, target = dtypes
    expected = {"loss": compute_dtype(acts, W, target), "x_hat": W, "residual": W, "decoded": W}
    wide, exact = compute_dtype(*dtypes), dense(F64, F64)
    theirs = dense(wide, W)
    for name, tensor in ours.items():
        dtype = expected.get(name) or inputs[name.removeprefix("decoded ")].dtype
        assert_as_accurate(tensor.cpu(), theirs[name].to(dtype), exact[name], name)


def test_t1_decode() -> None:
    with patch.dict(os.environ, {"FLASHSAE_BACKEND": "reference"}):
        for dtypes in DECODE:
            _check_decode(dtypes)


@pytest.mark.parametrize(
    "dtypes", [(F32, BF16, F32, F32), (F32, BF16, BF16, F16), (BF16, F32, F32, BF16), (F32, BF16, F32, F64)], ids=str
)
def test_t1_decode_on_kernels(dtypes: tuple[torch.dtype, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("FLASHSAE_BACKEND", "triton")
    monkeypatch.setenv("FLASHSAE_DENSE_ABOVE", "1")
    _check_decode(dtypes)


@pytest.mark.parametrize(("coeffs", "rows"), list(itertools.product((F32, F64, BF16), repeat=2)), ids=str)
def test_t1_latent_rows(coeffs: torch.dtype, rows: torch.dtype, device: str) -> None:
    inputs, generator = _normals({"coeffs": (B, K), "rows": (B, D_IN)}, (coeffs, rows)), torch.Generator()
    indices = torch.rand(B, 10, generator=generator).topk(K).indices
    p = {name: tensor.to(device) for name, tensor in inputs.items()}
    ours = latent_rows(index_of(indices.to(device), 10), p["coeffs"], p["rows"])

    def dense(dtype: torch.dtype) -> Tensor:
        code = torch.zeros(B, 10, dtype=dtype).scatter_add(1, indices, inputs["coeffs"].to(dtype))
        return code.T @ inputs["rows"].to(dtype)

    assert_as_accurate(ours.cpu(), dense(compute_dtype(coeffs, rows)).to(rows), dense(F64))
