"""Every public operation as a function of named tensors, forward and backward, for tests that go through all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashsae import SAE, SAEConfig, ops
from flashsae.ops.adam_rows import AdamRule, adam_rows, row_squares
from flashsae.ops.factors import RowGradient, SparseFactor
from flashsae.optim import FactoredAdam
from flashsae.testing import integer_inputs
from helpers.steps import Tensors

B, K, D_SAE, D_IN = 6, 3, 20, 5
"""Sizes of `inputs`; no two are equal, so that none can stand for another."""

FLOATS = {
    "x": (B, D_IN), "W_enc_T": (D_SAE, D_IN), "b_enc": (D_SAE,), "b_dec": (D_IN,), "W_dec": (D_SAE, D_IN),
    "top_acts": (B, K), "target": (B, D_IN), "coeffs": (B, K), "rows": (B, D_IN), "grad_acts": (B, K),
    "grad_aux": (B, 2), "grad_x_hat": (B, D_IN), "grad_taken": (4, D_IN), "dense": (D_SAE, D_IN),
}  # fmt: skip


def inputs(device: str, dtype: torch.dtype = torch.float32) -> Tensors:
    """Return arguments that fit every operation: small integers, so that every order of sums gives the same bits."""
    generator = torch.Generator().manual_seed(11)
    p = {n: integer_inputs(*s, generator=generator, largest=2, dtype=dtype) for n, s in FLOATS.items()}
    p["key_scale"] = torch.randint(0, 4, (D_SAE,), generator=generator).to(dtype)
    p["weights"] = torch.randint(0, 3, (B,), generator=generator).to(dtype)
    p["top_indices"] = torch.rand(B, D_SAE, dtype=torch.float32, generator=generator).topk(K).indices.sort().values
    p["aux_mask"] = torch.arange(D_SAE, dtype=torch.int64, device="cpu") % 3 == 0
    p["latents"] = torch.tensor([7, 2, 11, 0], dtype=torch.int64, device="cpu")
    p["slots"] = torch.full((D_SAE,), -1, dtype=torch.int32, device="cpu")
    p["slots"][[7, 2, 11]] = torch.arange(3, dtype=torch.int32, device="cpu")
    p["lr"] = torch.tensor(0.125, dtype=torch.float64, device="cpu")
    p["step"] = torch.tensor(2.0, dtype=torch.float64, device="cpu")
    p["bias_correction"] = torch.tensor([0.25, 0.5], dtype=torch.float64, device="cpu")
    return {name: tensor.to(device) for name, tensor in p.items()}


def _with_gradients(outputs: dict[str, Tensor], upstream: dict[str, Tensor], wanted: dict[str, Tensor]) -> Tensors:
    """Return outputs, and gradients where they are on."""
    result = {name: tensor.detach() for name, tensor in outputs.items()}
    if torch.is_grad_enabled() and all(outputs[name].requires_grad for name in upstream):
        tensors = [outputs[name] for name in upstream]
        grads = [grad.to(tensor.dtype) for grad, tensor in zip(upstream.values(), tensors)]
        found = torch.autograd.grad(tensors, list(wanted.values()), grads)
        result |= {f"grad {name}": grad for name, grad in zip(wanted, found)}
    return result


def _leaves(p: Tensors, *names: str) -> Tensors:
    return {name: p[name].detach().requires_grad_() for name in names}


def _encode(p: Tensors) -> Tensors:
    q = _leaves(p, "x", "W_enc_T", "b_enc", "b_dec")
    acts, indices, index = ops.encode_topk(
        q["x"], q["W_enc_T"], q["b_enc"], K, b_dec=q["b_dec"], key_scale=p["key_scale"], return_index=True
    )
    result = _with_gradients({"acts": acts}, {"acts": p["grad_acts"]}, q)
    return result | {"indices": indices, "entries": index.entries, "latents": index.latents, "offsets": index.offsets}


def _encode_aux(p: Tensors) -> Tensors:
    q = _leaves(p, "x", "W_enc_T", "b_enc", "b_dec")
    codes = ops.encode_topk_aux(
        q["x"], q["W_enc_T"], q["b_enc"], K, p["aux_mask"], 2, b_dec=q["b_dec"], key_scale=p["key_scale"]
    )
    upstream = {"top_acts": p["grad_acts"], "aux_acts": p["grad_aux"]}
    return _with_gradients({n: codes._asdict()[n] for n in upstream}, upstream, q) | {
        "top_indices": codes.top_indices, "aux_indices": codes.aux_indices,
    }  # fmt: skip


def _decode(p: Tensors) -> Tensors:
    q = _leaves(p, "top_acts", "W_dec", "b_dec")
    x_hat = ops.decode_sparse(q["top_acts"], p["top_indices"], q["W_dec"], q["b_dec"])
    return _with_gradients({"x_hat": x_hat}, {"x_hat": p["grad_x_hat"]}, q)


def _decode_loss(p: Tensors) -> Tensors:
    q = _leaves(p, "top_acts", "W_dec", "b_dec", "target")
    index = ops.build_index(p["top_indices"], D_SAE)
    found = ops.decode_loss(
        q["top_acts"], p["top_indices"], q["W_dec"], q["b_dec"], q["target"], weights=p["weights"], index=index
    )
    return _with_gradients(found._asdict(), {"loss": torch.ones_like(found.loss)}, q)


def _latent_rows(p: Tensors) -> Tensors:
    return {"sums": ops.latent_rows(ops.build_index(p["top_indices"], D_SAE), p["coeffs"], p["rows"])}


def _take_rows(p: Tensors) -> Tensors:
    q = _leaves(p, "W_dec")
    rows = ops.take_rows(q["W_dec"], p["latents"], p["slots"])
    return _with_gradients({"rows": rows}, {"rows": p["grad_taken"]}, q)


def _build_index(p: Tensors) -> Tensors:
    index = ops.build_index(p["top_indices"], D_SAE)
    return {"entries": index.entries, "latents": index.latents, "offsets": index.offsets}


def _gradient(p: Tensors) -> RowGradient:
    sparse = SparseFactor(ops.build_index(p["top_indices"], D_SAE), p["coeffs"], p["rows"])
    return RowGradient(sparse, p["grad_taken"], p["slots"])


def _adam_rows(p: Tensors) -> Tensors:
    weights, moments = p["W_dec"].clone(memory_format=torch.contiguous_format), []
    for number in (1, 2):
        moments.append(torch.full_like(weights, number / 4, memory_format=torch.contiguous_format))
    adam_rows(weights, (moments[0], moments[1]), _gradient(p), p["lr"], p["step"], p["bias_correction"], AdamRule())
    return {"weights": weights, "exp_avg": moments[0], "exp_avg_sq": moments[1]}


def _row_squares(p: Tensors) -> Tensors:
    weights = p["W_dec"].clone(memory_format=torch.contiguous_format)
    return {"squares": row_squares(weights, _gradient(p), False)}


def _sae(p: Tensors) -> Tensors:
    sae = SAE(SAEConfig(D_IN, D_SAE, K)).to(p["x"].device, p["W_dec"].dtype)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_((parameter * 4).round())
    x = p["x"].detach().requires_grad_()
    code = sae.encode(x)
    outputs = {"x_hat": sae(x), "acts": code.top_acts, "decoded": sae.decode(code)}
    found = _with_gradients(outputs, {"x_hat": p["grad_x_hat"]}, {"x": x, **dict(sae.named_parameters())})
    sae.normalize_decoder()
    return found | {"indices": code.top_indices, "dense": code.to_dense().detach(), "unit": sae.W_dec.detach()}


def _train(p: Tensors) -> Tensors:
    names = ("W_enc_T", "b_enc", "W_dec", "b_dec")
    with torch.inference_mode(False), torch.enable_grad():
        W_enc_T, b_enc, W_dec, b_dec = parameters = [
            p[name].detach().clone(memory_format=torch.contiguous_format).requires_grad_() for name in names
        ]
        groups = [{"params": [W_dec], "unit_norm": True}, {"params": [W_enc_T, b_enc, b_dec]}]
        optimizer = FactoredAdam(groups, lr=0.125)
        acts, indices, index = ops.encode_topk(p["x"], W_enc_T, b_enc, K, b_dec=b_dec, return_index=True)
        ops.decode_loss(acts, indices, W_dec, b_dec, p["x"], index=index).loss.backward()  # type: ignore[no-untyped-call]
    optimizer.clip_grad_norm(100.0)
    optimizer.step()
    optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in zip(names, parameters)}


OPERATIONS: dict[str, Callable[[Tensors], Tensors]] = {
    "encode_topk": _encode,
    "encode_topk_aux": _encode_aux,
    "decode_sparse": _decode,
    "decode_loss": _decode_loss,
    "latent_rows": _latent_rows,
    "take_rows": _take_rows,
    "build_index": _build_index,
    "adam_rows": _adam_rows,
    "row_squares": _row_squares,
    "SAE": _sae,
    "FactoredAdam": _train,
}


class Recorder(dict[str, Any]):
    """A dict of tensors that remembers which were asked for."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__(tensors)
        self.used: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.used.add(name)
        return super().__getitem__(name)
