"""Forward and backward of other implementations, and ours alike, without optimiser: a case for each.

All hold float32 weights and run their products in bfloat16 (or what their own recipe takes), squared error, no
auxiliary loss. All start from the same weights, so that their losses can be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from benchmarks.checks import TOLERANCE
from benchmarks.measure import Case
from benchmarks.operations import tflops
from flashsae import ops
from flashsae.bench.dense import Step
from flashsae.bench.peers import DENSE, LIBRARIES
from flashsae.bench.problem import Problem, dense_code


def flashsae_master(problem: Problem) -> Step:
    """Ours with float32 weights: rounded to bfloat16 inside, gradients in float32."""
    weights = tuple(weight.clone().requires_grad_() for weight in problem.weights)

    def loss(x: Tensor) -> Tensor:
        W_enc_T, b_enc, W_dec, b_dec = weights
        top_acts, top_indices, index = ops.encode_topk(
            x, W_enc_T, b_enc, problem.shape.k, b_dec=b_dec, precision="bf16", return_index=True
        )
        return ops.decode_loss(top_acts, top_indices, W_dec, b_dec, x, index=index, precision="bf16")[0]

    return Step(loss, lambda: None, weights, lambda value, x: value)


def builders(peers: bool) -> dict[str, Callable[[Problem], Step]]:
    """Return ours and, if wanted, the peers that are installed, by name."""
    others = (DENSE, *LIBRARIES) if peers else ()
    return {"forward_backward_master": flashsae_master} | {p.name: p.build for p in others if p.is_installed}


def step_case(name: str, problem: Problem, step: Step, ours_ms: Callable[[], float | None]) -> Case:
    """Return forward and backward of one implementation; a loss unlike that of the dense float32 code is an error."""
    trained = [t for t in step.state if t.requires_grad]

    def run(i: int) -> Tensor:
        for parameter in trained:
            parameter.grad = None
        loss = step.loss(problem.x(i))
        step.backward(loss)
        return loss

    def settled(i: int) -> Tensor:
        with step.settings():
            return run(i)

    def check() -> str:
        x = problem.xs[0]
        code = dense_code(problem, 0)
        x_hat = F.embedding_bag(code.top_indices, problem.W_dec, per_sample_weights=code.top_acts, mode="sum")
        want = float((x_hat + problem.b_dec - x).square().sum())
        got = step.squared_error(float(settled(0).detach()), x)
        missing = [tuple(p.shape) for p in trained if p.grad is None or not bool(p.grad.isfinite().all())]
        wrong = f"no finite gradient for parameters of shapes {missing}. " if missing else ""
        close = abs(got - want) <= 4 * TOLERANCE["bf16"] * want
        return wrong + ("" if close else f"squared error: expected about {want:.6g}, got {got:.6g}. ")

    def figures(ms: float) -> dict[str, Any]:
        shape, ours = problem.shape, ours_ms()
        found = tflops(2.0 * shape.batch_tokens * shape.d_in * (shape.d_sae + 4 * shape.k))(ms)
        return found if ours is None else found | {"ratio_to_ours": ms / ours}

    return Case(name, settled, check, (problem.xs[0], *step.state), figures)
