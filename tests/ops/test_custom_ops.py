"""The operators as PyTorch sees them: schemas, shapes without values, autograd, and torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flashsae.ops import build_index, decode_loss, decode_sparse, encode_topk, encode_topk_aux

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FLASHSAE_DENSE_ABOVE", "1")  # the kernels, however small the problem
    return str(request.param)


def _normal(*shape: int, device: str, dtype: torch.dtype = torch.float32, grad: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_(grad)


def _indices(device: str) -> Tensor:
    return torch.rand(5, 12, generator=torch.Generator().manual_seed(3)).topk(3).indices.to(device)


def _slots(device: str) -> Tensor:
    """Return rows of latents 7 and 2; a third row stands for none."""
    slots = torch.full((12,), -1, dtype=torch.int32)
    slots[7], slots[2] = 0, 1
    return slots.to(device)


def _operands(name: str, device: str) -> list[tuple[Any, ...]]:
    """Return arguments that between them take every path of an operator."""
    x, W, b = (_normal(*s, device=device) for s in ((5, 4), (12, 4), (12,)))
    acts, indices, bias, rows = _normal(5, 3, device=device), _indices(device), _normal(4, device=device), x.detach()
    index = build_index(indices, 12)
    lists = [index.entries, index.latents, index.offsets]
    weights = torch.rand(5, device=device)
    half = [t.detach().bfloat16().requires_grad_() for t in (W, bias)]
    mask = torch.arange(12, device=device) % 2 == 0
    return {
        "encode_topk": [
            (x, W, b, None, None, None, 3, 0, "float32", 1 << 20, False),
            (x, W, b, bias, weights.new_ones(12), mask, 3, 2, "float32", 1 << 20, False),
            (x, W, b, bias, None, None, 3, 0, "bf16", 1 << 20, True),
        ],
        "decode_sparse": [
            (acts, indices, W, None, [], False, torch.float32),
            (acts, indices, W, bias, lists, True, torch.bfloat16),
            (acts, indices.int(), *half, [], False, torch.bfloat16),
            (acts, indices, half[0], None, [], False, torch.float32),
        ],
        "decode_grad_acts": [(rows, indices, W.detach(), torch.float32), (rows, indices, W.detach(), torch.float64)],
        "decode_loss": [
            (acts, indices, W, None, rows, None, [], False),
            (acts, indices, W, bias, x, weights, lists, True),
            (acts, indices, *half, x, weights, lists, False),
            (acts, indices, *half, x.detach().double().requires_grad_(), weights, lists, False),
        ],
        "latent_rows": [
            (*lists, acts.detach(), rows, torch.float32),
            (*lists, acts.detach(), rows, torch.bfloat16),
        ],
        "latent_sums": [(*lists, acts.detach()), (*lists, acts.detach().bfloat16())],
        "column_sums": [(weights, rows, torch.float32), (weights, rows.bfloat16(), torch.bfloat16)],
        "take_rows": [(W, torch.tensor([7, 2, 0], device=device), _slots(device))],
        "center": [(rows, bias.detach(), False), (rows, bias.detach(), True)],
    }[name]


OPERATORS = [
    "encode_topk", "center", "decode_sparse", "decode_grad_acts", "decode_loss", "latent_rows", "column_sums",
    "latent_sums", "take_rows",
]  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_the_operator_keeps_its_promises(name: str, device: str) -> None:
    for operands in _operands(name, device):
        results = torch.library.opcheck(getattr(torch.ops.flashsae, name), operands)
        assert set(results.values()) == {"SUCCESS"}


def _step(x: Tensor, W_enc_T: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor) -> tuple[Tensor, ...]:
    top_acts, top_indices, index = encode_topk(x, W_enc_T, b_enc, 3, b_dec=b_dec, return_index=True)
    loss, x_hat, residual = decode_loss(top_acts, top_indices, W_dec, b_dec, x, index=index)
    mask = torch.arange(12, device=x.device) % 2 == 0
    aux = encode_topk_aux(x, W_enc_T, b_enc, 3, mask, 2, b_dec=b_dec)
    residual_hat = decode_sparse(aux.aux_acts, aux.aux_indices, W_dec)
    return loss + (residual - residual_hat).square().sum(), x_hat, top_indices


def _run_step(step: Any, device: str) -> list[Tensor]:
    shapes = (5, 4), (12, 4), (12,), (12, 4), (4,)
    parameters = [_normal(*shape, device=device) for shape in shapes]
    loss, *others = step(*parameters)
    return [loss.detach(), *others, *torch.autograd.grad(loss, parameters)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own
def test_a_compiled_step_equals_an_eager_one(device: str) -> None:
    backend = "aot_eager" if device == "cpu" else "inductor"
    compiled = torch.compile(_step, fullgraph=True, backend=backend)
    for ours, eager in zip(_run_step(compiled, device), _run_step(_step, device)):
        if device == "cpu":
            assert torch.equal(ours, eager)
        else:  # inductor sums its own part, the AuxK loss, in another order
            torch.testing.assert_close(ours, eager)
