"""Every public operation as a function of named tensors, forward and backward, for tests that go through all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashsae import SAE, SAEConfig, ops
from flashsae.ops import Pattern, SparseCode
from flashsae.ops.adam_rows import AdamRule, adam_rows, row_squares
from flashsae.ops.factors import RowGradient, SparseFactor
from flashsae.optim import FactoredAdam
from flashsae.testing import integer_inputs
from helpers.codes import index_of, topk_of
from helpers.steps import Tensors

B, K, D_SAE, D_IN = 6, 3, 20, 5
"""Sizes of `inputs`; no two are equal, so that none can stand for another."""

FLOATS = {
    "x": (B, D_IN), "W_enc_T": (D_SAE, D_IN), "b_enc": (D_SAE,), "b_dec": (D_IN,), "W_dec": (D_SAE, D_IN),
    "top_acts": (B, K), "target": (B, D_IN), "coeffs": (B, K), "rows": (B, D_IN), "grad_acts": (B, K),
    "grad_x_hat": (B, D_IN), "grad_taken": (4, D_IN), "dense": (D_SAE, D_IN), "latent_values": (D_SAE,),
    "thresholds": (D_SAE,), "row_acts": (17,), "grad_row_acts": (17,), "grad_y": (B, D_SAE),
}  # fmt: skip


def inputs(device: str, dtype: torch.dtype = torch.float32) -> Tensors:
    """Return arguments that fit every operation: small integers, so that every order of sums gives the same bits."""
    generator = torch.Generator().manual_seed(11)
    p = {n: integer_inputs(*s, generator=generator, largest=2, dtype=dtype) for n, s in FLOATS.items()}
    p["key_scale"] = torch.randint(0, 4, (D_SAE,), generator=generator).to(dtype)
    p["token_weights"] = torch.randint(0, 3, (B,), generator=generator).to(dtype)
    p["top_indices"] = torch.rand(B, D_SAE, dtype=torch.float32, generator=generator).topk(K).indices.sort().values
    counts, starts = [3, 0, 5, 1, 2, 4], [0]  # of the tokens of a code of varying length; two places are left over
    rows = [torch.randperm(D_SAE, generator=generator, device="cpu")[:n].sort().values for n in counts]
    p["row_latents"] = torch.cat([*rows, torch.full((2,), D_SAE, dtype=torch.int64, device="cpu")]).int()
    for count in counts:
        starts.append(starts[-1] + count)
    p["row_starts"] = torch.tensor(starts, dtype=torch.int32, device="cpu")
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
    code = ops.encode_topk(q["x"], q["W_enc_T"], q["b_enc"], K, b_dec=q["b_dec"], key_scale=p["key_scale"])
    result = _with_gradients({"acts": code.acts}, {"acts": p["grad_acts"]}, q)
    return result | {"indices": code.top_indices} | _lists(code.pattern)


def _encode_batch(p: Tensors) -> Tensors:
    q = _leaves(p, "x", "W_enc_T", "b_enc", "b_dec")
    code = ops.encode_batch_topk(q["x"], q["W_enc_T"], q["b_enc"], K, b_dec=q["b_dec"], key_scale=p["key_scale"])
    result = _with_gradients({"acts": code.acts}, {"acts": p["grad_acts"].flatten()}, q)
    return result | _lists(code.pattern)


def _encode_above(p: Tensors) -> Tensors:
    q = _leaves(p, "x", "W_enc_T", "b_enc", "b_dec")
    code = ops.encode_above(q["x"], q["W_enc_T"], q["b_enc"], p["thresholds"], b_dec=q["b_dec"], capacity=17)
    result = _with_gradients({"acts": code.acts}, {"acts": p["grad_row_acts"]}, q)
    assert code.pattern.count is not None
    return result | _lists(code.pattern) | {"count": code.pattern.count}


def _full(p: Tensors) -> Tensors:
    found = {}
    for capacity in ("full", "any"):
        q = _leaves(p, "x", "W_enc_T", "b_enc", "b_dec", "W_dec")
        operands = q["x"], q["W_enc_T"], q["b_enc"], p["thresholds"] * 0 - 99  # which all exceed
        code = ops.encode_above(*operands, b_dec=q["b_dec"], capacity=capacity)  # type: ignore[arg-type]
        looked = code.acts * ops.per_latent(p["latent_values"], code.pattern)
        outputs = {
            "loss": ops.decode_loss(code, q["W_dec"], q["b_dec"], p["x"], token_weights=p["token_weights"]).loss,
            "x_hat": ops.decode(code.replace(looked), q["W_dec"]),
            "sums": ops.latent_sums(code.acts, code.pattern),
            "again": ops.pre_acts(*operands[:3], code.pattern, b_dec=q["b_dec"]),
        }
        upstream = {"loss": torch.ones_like(outputs["loss"]), "x_hat": p["grad_x_hat"], "sums": p["latent_values"]}
        part = _with_gradients(outputs, upstream, q)
        if code.pattern.count is not None:
            part["count"] = code.pattern.count
        found |= {f"{capacity} {key}": tensor for key, tensor in part.items()}
    return found


def _lists(pattern: Pattern) -> Tensors:
    index = pattern.index
    lists = {"entries": index.entries, "latents": index.latents, "offsets": index.offsets}
    return lists | ({} if index.tokens is None else {"tokens": index.tokens})


def _rows(p: Tensors) -> Pattern:
    return Pattern.rows(p["row_latents"], p["row_starts"], D_SAE)


def _by_value(p: Tensors) -> Tensors:
    q = _leaves(p, "top_acts")
    code = ops.by_value(topk_of(q["top_acts"], p["top_indices"], p["W_dec"]), magnitude=True)
    return _with_gradients({"acts": code.acts}, {"acts": p["grad_acts"]}, q) | _lists(code.pattern)


def _decode(p: Tensors) -> Tensors:
    q = _leaves(p, "top_acts", "W_dec", "b_dec")
    x_hat = ops.decode(topk_of(q["top_acts"], p["top_indices"], q["W_dec"]), q["W_dec"], q["b_dec"])
    return _with_gradients({"x_hat": x_hat}, {"x_hat": p["grad_x_hat"]}, q)


def _decode_loss(p: Tensors) -> Tensors:
    q = _leaves(p, "top_acts", "W_dec", "b_dec", "target")
    code = topk_of(q["top_acts"], p["top_indices"], q["W_dec"])
    found = ops.decode_loss(code, q["W_dec"], q["b_dec"], q["target"], token_weights=p["token_weights"])
    return _with_gradients(found._asdict(), {"loss": torch.ones_like(found.loss)}, q)


def _latent_rows(p: Tensors) -> Tensors:
    return {"sums": ops.latent_rows(index_of(p["top_indices"], D_SAE), p["coeffs"], p["rows"])}


def _take_rows(p: Tensors) -> Tensors:
    q = _leaves(p, "W_dec")
    rows = ops.take_rows(q["W_dec"], p["latents"], p["slots"])
    return _with_gradients({"rows": rows}, {"rows": p["grad_taken"]}, q)


def _pattern(p: Tensors) -> Tensors:
    return _lists(Pattern.topk(p["top_indices"], D_SAE))


def _pattern_rows(p: Tensors) -> Tensors:
    return _lists(_rows(p))


def _decode_rows(p: Tensors) -> Tensors:
    q = _leaves(p, "row_acts", "W_dec", "b_dec")
    code = SparseCode(_rows(p), q["row_acts"])
    found = _with_gradients(
        {"x_hat": ops.decode(code, q["W_dec"], q["b_dec"])}, {"x_hat": p["grad_x_hat"]}, q
    )  # fmt: skip
    return found | {"dense": code.to_dense().detach()}


def _decode_loss_rows(p: Tensors) -> Tensors:
    q = _leaves(p, "row_acts", "W_dec", "b_dec", "target")
    found = ops.decode_loss(
        SparseCode(_rows(p), q["row_acts"]), q["W_dec"], q["b_dec"], q["target"],
        token_weights=p["token_weights"], prefixes=(7, D_SAE),
    )  # fmt: skip
    return _with_gradients(found._asdict(), {"loss": torch.ones_like(found.loss)}, q)


def _latent_rows_rows(p: Tensors) -> Tensors:
    return {"sums": ops.latent_rows(_rows(p).index, p["row_acts"], p["rows"])}


def _pre_acts(p: Tensors) -> Tensors:
    q, found = _leaves(p, "x", "W_enc_T", "b_enc", "b_dec"), {}
    arguments = q["x"], q["W_enc_T"], q["b_enc"]
    for name, pattern in (("grad_acts", Pattern.topk(p["top_indices"], D_SAE)), ("grad_row_acts", _rows(p))):
        values = ops.pre_acts(*arguments, pattern, b_dec=q["b_dec"])
        part = _with_gradients({"values": values}, {"values": p[name]}, q)
        found |= {f"{name} {key}": tensor for key, tensor in part.items()}
    return found


def _per_latent(p: Tensors) -> Tensors:
    q, found = _leaves(p, "latent_values"), {}
    for name, pattern in (("grad_acts", Pattern.topk(p["top_indices"], D_SAE)), ("grad_row_acts", _rows(p))):
        part = _with_gradients({"values": ops.per_latent(q["latent_values"], pattern)}, {"values": p[name]}, q)
        found |= {f"{name} {key}": tensor for key, tensor in part.items()}
    return found


def _latent_sums(p: Tensors) -> Tensors:
    found = {}
    for name, pattern in (("top_acts", Pattern.topk(p["top_indices"], D_SAE)), ("row_acts", _rows(p))):
        q = _leaves(p, name)
        part = _with_gradients({"sums": ops.latent_sums(q[name], pattern)}, {"sums": p["latent_values"]}, q)
        found |= {f"{name} {key}": tensor for key, tensor in part.items()}
    return found


def _linear(p: Tensors) -> Tensors:
    q = _leaves(p, "x", "W_enc_T")
    return _with_gradients({"y": ops.linear(q["x"], q["W_enc_T"])}, {"y": p["grad_y"]}, q)


def _block_norms(p: Tensors) -> Tensors:
    q = _leaves(p, "W_dec")
    norms = ops.block_norms(q["W_dec"], (2, D_IN - 2))
    return _with_gradients({"norms": norms}, {"norms": p["dense"][:, :2]}, q)


def _gradient(p: Tensors) -> RowGradient:
    sparse = SparseFactor(index_of(p["top_indices"], D_SAE), p["coeffs"], p["rows"])
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
        code = ops.encode_topk(p["x"], W_enc_T, b_enc, K, b_dec=b_dec)
        code = code.replace(code.acts.relu())
        ops.decode_loss(code, W_dec, b_dec, p["x"]).loss.backward()  # type: ignore[no-untyped-call]
    optimizer.clip_grad_norm(100.0)
    optimizer.step()
    optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in zip(names, parameters)}


OPERATIONS: dict[str, Callable[[Tensors], Tensors]] = {
    "encode_topk": _encode,
    "encode_batch_topk": _encode_batch,
    "encode_above": _encode_above,
    "full code": _full,
    "pre_acts": _pre_acts,
    "per_latent": _per_latent,
    "latent_sums": _latent_sums,
    "by_value": _by_value,
    "decode": _decode,
    "decode, rows": _decode_rows,
    "decode_loss": _decode_loss,
    "decode_loss, rows": _decode_loss_rows,
    "latent_rows": _latent_rows,
    "latent_rows, rows": _latent_rows_rows,
    "take_rows": _take_rows,
    "linear": _linear,
    "block_norms": _block_norms,
    "pattern": _pattern,
    "pattern, rows": _pattern_rows,
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
