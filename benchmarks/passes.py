"""Forward and backward of whole implementations, without optimiser: ours and the peers.

All hold float32 weights and run their products in bfloat16 (or what their own recipe takes), squared error, no
auxiliary loss. All start from the same weights, so that their losses can be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.cases import Case, Size
from benchmarks.openai import OPENAI
from benchmarks.operations import tflops
from flashsae import ops
from flashsae.bench.dense import AutogradStep, dense_pytorch
from flashsae.bench.measure import OF_SQUARES, TOLERANCE, Record, Subject
from flashsae.bench.peers import LIBRARIES, PYTORCH
from flashsae.bench.problem import Problem, dense_squared_error

MASTER = "forward_backward_master"
NOT_AT_XL = ("S", "M", "L")


def flashsae_master(problem: Problem) -> AutogradStep:
    """Ours with float32 weights: rounded to bfloat16 inside, gradients in float32."""
    weights, k = tuple(weight.clone().requires_grad_() for weight in problem.weights), problem.shape.k

    def loss(x: Tensor) -> Tensor:
        W_enc_T, b_enc, W_dec, b_dec = weights
        code = ops.encode_topk(x, W_enc_T, b_enc, k, b_dec=b_dec, precision="bf16")
        return ops.decode_loss(code.replace(code.acts.relu()), W_dec, b_dec, x, precision="bf16").loss

    return AutogradStep(loss, lambda: None, weights, lambda value, x: value)


def both_passes(size: Size, build: Callable[[Problem], AutogradStep]) -> Subject:
    """Return forward and backward of one implementation; a loss unlike that of the dense float32 code is an error."""
    problem = size.problem(torch.float32)
    step = build(problem)
    trained = [t for t in step.state if t.requires_grad]

    def run(i: int) -> Tensor:
        for parameter in trained:
            parameter.grad = None
        loss = step.loss(problem.x(i))
        step.backward(loss)
        return loss

    def check() -> str:
        x, want = problem.xs[0], dense_squared_error(problem)
        got = step.squared_error(float(run(0).detach()), x)
        missing = [tuple(p.shape) for p in trained if p.grad is None or not bool(p.grad.isfinite().all())]
        wrong = f"no finite gradient for parameters of shapes {missing}. " if missing else ""
        close = abs(got - want) <= OF_SQUARES * TOLERANCE["bf16"] * want
        return wrong + ("" if close else f"squared error: expected about {want:.6g}, got {got:.6g}. ")

    shape = size.shape
    flops = 2.0 * shape.batch_tokens * shape.d_in * (shape.d_sae + 4 * shape.k)

    def figures(record: Record) -> Record:
        return tflops(flops)(record)

    return Subject(run, check, (problem.xs[0], *step.state), figures, step.settings)


def _case(name: str, build: Callable[[Problem], AutogradStep], **more: object) -> Case:
    return Case(name, "autocast", partial(both_passes, build=build), ours=MASTER, **more)  # type: ignore[arg-type]


CASES = (
    Case(MASTER, "autocast", partial(both_passes, build=flashsae_master)),
    *(_case(peer.name, peer.build, at=NOT_AT_XL, peer=peer) for peer in (PYTORCH, *LIBRARIES, OPENAI)),
)
PAPER_CASES = (
    Case(
        PYTORCH.name,
        "float32",
        partial(both_passes, build=partial(dense_pytorch, precision="float32")),
        ours="forward_backward",
    ),
)
