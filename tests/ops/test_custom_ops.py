"""The operators as PyTorch sees them: schemas, shapes without values, autograd, and torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flashsae.ops import Pattern, SparseCode, decode, decode_loss, encode_topk, latent_sums, per_latent, pre_acts
from flashsae.ops.decode.levels import levels_of

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


def _rows(device: str) -> Pattern:
    """Return a pattern of varying length, with a token that has none and two places that are not used."""
    latents = torch.tensor([1, 4, 0, 2, 9, 11, 3, 5, 8, 12, 12], device=device)
    return Pattern.rows(latents, torch.tensor([0, 2, 2, 6, 8, 9], device=device), 12)


def _operands(name: str, device: str) -> list[tuple[Any, ...]]:
    """Return arguments that between them take every path of an operator."""
    x, W, b = (_normal(*s, device=device) for s in ((5, 4), (12, 4), (12,)))
    acts, indices, bias, rows = _normal(5, 3, device=device), _indices(device), _normal(4, device=device), x.detach()
    pattern, rows_pattern = Pattern.topk(indices, 12), _rows(device)
    fixed, varying = pattern.tensors, rows_pattern.tensors
    lists, row_lists = pattern.index.lists, rows_pattern.index.lists
    row_acts, full_acts = _normal(11, device=device), _normal(5, 12, device=device)
    weights = torch.rand(5, device=device)
    halves = torch.full((2,), 0.5, dtype=torch.float64, device=device)
    budgets, prefixes, full = (
        levels.lists
        for levels in (
            levels_of(SparseCode(pattern, acts), None, (1, 3), None),
            levels_of(SparseCode(rows_pattern, row_acts), (3, 12), None, None),
            levels_of(SparseCode(Pattern.full(5, 12, device=device), full_acts), (3, 12), None, None),
        )
        if levels is not None
    )
    half = [t.detach().bfloat16().requires_grad_() for t in (W, bias)]
    noise = torch.tensor(7, device=device)
    return {
        "encode_topk": [
            (x, W, b, None, None, [3, 0, 1 << 20, 0], "float32", None),
            (x, W, b, bias, weights.new_ones(12), [3, 1, 1 << 20, 0], "float32", None),
            (x, W, b, bias, None, [3, 0, 1 << 20, 0], "bf16", None),
            (x, W, b, bias, None, [3, 0, 1 << 20, 0], "bf16-int8", noise),
        ],
        "encode_batch_topk": [
            (x, W, b, None, None, [3, 0, 1 << 20, 0], "float32", None),
            (x, W, b, bias, weights.new_ones(12), [3, 1, 1 << 20, 0], "float32-int8", noise),
        ],
        "encode_above": [
            (x, W, b, bias, weights.new_zeros(1), [40, 1 << 20, 0], "float32", None),
            (x, W, b, None, weights.new_zeros(12), [5, 1 << 20, 0], "float32", None),
            (x, W, b, None, weights.new_zeros(1), [-1, 1 << 20, 0], "float32", None),
            (x, W, b, bias, weights.new_zeros(1), [40, 1 << 20, 0], "bf16-int8", noise),
        ],
        "encode_any": [
            (x, W, b, bias, weights.new_zeros(1), [60, 1 << 20, 0], "float32", None),
            (x, W, b, None, weights.new_zeros(12), [3, 1 << 20, 0], "float32-int8", noise),
        ],
        "pre_acts": [
            (x, W, b, None, fixed, "float32"),
            (x, W, b, bias, varying, "float32"),
            (x, W, b, bias, [], "float32"),
        ],
        "per_latent": [(b, fixed), (b, varying)],
        "decode": [
            (acts, fixed, W, None, False, torch.float32),
            (acts, fixed, W, bias, True, torch.bfloat16),
            (acts, [indices.int()], *half, False, torch.bfloat16),
            (row_acts, varying, W, bias, False, torch.float32),
            (acts, fixed, half[0], None, False, torch.float32),
            (full_acts, [], W, bias, False, torch.float32),
            (full_acts, [], half[0], None, False, torch.float32),
        ],
        "decode_grad_acts": [
            (rows, fixed, W.detach(), torch.float32),
            (rows, fixed, W.detach(), torch.float64),
            (rows, varying, W.detach(), torch.float32),
            (rows, [], W.detach(), torch.float32),
        ],
        "decode_loss": [
            (acts, fixed, W, None, rows, None, False),
            (acts, fixed, W, bias, x, weights, True),
            (acts, fixed, *half, x, weights, False),
            (acts, fixed, *half, x.detach().double().requires_grad_(), weights, False),
            (row_acts, varying, W, bias, x, weights, False),
            (full_acts, [], W, bias, x, weights, False),
        ],
        "decode_levels": [
            (acts, budgets, W, None, rows, None, halves, False),
            (acts, budgets, W, bias, x, weights, halves, True),
            (acts, budgets, *half, x, weights, halves, False),
            (row_acts, prefixes, W, bias, x, weights, halves, False),
            (full_acts, full, W, bias, x, weights, halves, False),
        ],
        "latent_rows": [
            (lists, acts.detach(), rows, torch.float32),
            (lists, acts.detach(), rows, torch.bfloat16),
            (row_lists, row_acts.detach(), rows, torch.float32),
        ],
        "latent_sums": [(lists, acts), (lists, acts.detach().bfloat16().requires_grad_()), (row_lists, row_acts)],
        "column_sums": [(weights, rows, torch.float32), (weights, rows.bfloat16(), torch.bfloat16)],
        "take_rows": [(W, torch.tensor([7, 2, 0], device=device), _slots(device))],
        "block_norms": [(W, [1, 3]), (half[0], [4])],
        "linear": [(x, W, "float32"), (rows, half[0], "bf16")],
        "center": [(rows, bias.detach(), False), (rows, bias.detach(), True)],
    }[name]


OPERATORS = [
    "encode_topk", "encode_batch_topk", "encode_above", "encode_any", "pre_acts", "per_latent", "center", "decode",
    "decode_grad_acts", "decode_loss", "decode_levels", "latent_rows", "column_sums", "latent_sums", "take_rows",
    "linear", "block_norms",
]  # fmt: skip


PARTS = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]


@pytest.mark.parametrize("name", OPERATORS)
def test_the_operator_keeps_its_promises(name: str, device: str) -> None:
    for operands in _operands(name, device):
        # encode_any is for the host alone to look at what it returned: whoever traces calls encode_above
        parts = [part for part in PARTS if name != "encode_any" or "aot" not in part]
        results = torch.library.opcheck(getattr(torch.ops.flashsae, name), operands, test_utils=parts)
        assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", OPERATORS)
def test_where_no_gradient_comes_from_above_none_goes_on(name: str, device: str) -> None:
    undefined = torch._C._functions.UndefinedGrad()  # type: ignore[attr-defined]  # as gradcheck has it
    for operands in _operands(name, device):
        outputs = getattr(torch.ops.flashsae, name)(*operands)
        outputs = [outputs] if isinstance(outputs, Tensor) else outputs
        outputs = [output for output in outputs if output.requires_grad]
        wanted = [operand for operand in operands if isinstance(operand, Tensor) and operand.requires_grad]
        if outputs:
            upstream = [torch.ones_like(output) for output in outputs]
            found = torch.autograd.grad([undefined(o) for o in outputs], wanted, upstream, allow_unused=True)
            assert not any(grad is not None and grad.any() for grad in found)


def _step(x: Tensor, W_enc_T: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor) -> tuple[Tensor, ...]:
    code = encode_topk(x, W_enc_T, b_enc, 3, b_dec=b_dec)
    code = code.replace(code.acts.relu())
    loss, x_hat, residual = decode_loss(code, W_dec, b_dec, x)
    again = pre_acts(x, W_enc_T, b_enc, code.pattern, b_dec=b_dec) - per_latent(b_enc, code.pattern)
    residual_hat = decode(code.replace(again), W_dec)
    mass = latent_sums(code.acts, code.pattern).square().sum()
    return loss + (residual - residual_hat).square().sum() + mass, x_hat, code.top_indices


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


def test_operators_have_few_arguments() -> None:
    for name in OPERATORS:
        arguments = getattr(torch.ops.flashsae, name).default._schema.arguments
        assert len(arguments) <= 8, name
