"""The cases of `flashsae.ops` and the dense products and ceilings that they stand beside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import checks
from benchmarks.measure import Case
from benchmarks.shapes import random_code, zipf_code
from flashsae import ops
from flashsae.bench.ceilings import copy_run, gather_run, gemm_run
from flashsae.bench.problem import Code, Problem, dense_code


def tflops(flops: float) -> Callable[[float], dict[str, Any]]:
    """Return a function from milliseconds to TFLOP/s."""
    return lambda ms: {"flops": flops, "tflops": flops / ms / 1e9}


def streamed(name: str, moved: float) -> Callable[[float], dict[str, Any]]:
    """Return a function from milliseconds to GB/s."""
    return lambda ms: {"bytes": moved, "bytes_count": name, "gbs": moved / ms / 1e6}


def ceiling_cases(device: torch.device) -> Iterator[Case]:
    """Yield what the memory can do: a device copy and gathers from the second-level cache."""
    copy, moved = copy_run(device)
    yield Case("copy", copy, figures=streamed("read + written", moved))
    if (gather := gather_run(device)) is not None:
        yield Case("gather", gather[0], figures=streamed("gathered from cache", gather[1]))


def gemm_case(problem: Problem) -> Case:
    """Return the encode as PyTorch's dense product alone, in row chunks where the result is large."""
    run, flops = gemm_run(problem.xs[0], problem.W_enc_T)
    return Case("gemm", run, figures=tflops(flops), capturable=True)


def encode_case(problem: Problem, precision: str, gemm: Case | None) -> Case:
    """Return `encode_topk`, in turn with the dense product where that is given."""
    shape = problem.shape
    W_enc_T, b_enc, _, b_dec = problem.weights

    def run(i: int) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return ops.encode_topk(problem.x(i), W_enc_T, b_enc, shape.k, b_dec=b_dec, precision=precision)[:2]

    return Case(
        "encode_topk",
        run,
        lambda: checks.check_encode(problem, *run(0), precision),
        held=(problem.xs[0], W_enc_T, b_enc, b_dec),
        figures=tflops(2.0 * shape.batch_tokens * shape.d_in * shape.d_sae),
        capturable=True,
        reference=gemm,
    )


def index_case(problem: Problem, codes: list[Code]) -> Case:
    """Return `build_index`."""
    d_sae = problem.shape.d_sae

    def run(i: int) -> ops.LatentIndex:
        return ops.build_index(codes[i % len(codes)].top_indices, d_sae)

    return Case(
        "index", run, lambda: checks.check_index(run(0), codes[0], d_sae), (codes[0].top_indices,), capturable=True
    )


def decode_case(problem: Problem, codes: list[Code], precision: str, gather_gbs: float | None) -> Case:
    """Return `decode_loss`: reconstruction, loss, residual and the gradient of the activations."""
    shape, (_, _, W_dec, b_dec) = problem.shape, problem.weights
    acts = [code.top_acts.clone().requires_grad_() for code in codes]

    def run(i: int) -> tuple[Tensor, Tensor, Tensor]:
        n = i % len(codes)
        return ops.decode_loss(acts[n], codes[n].top_indices, W_dec, b_dec, problem.x(n))

    def check() -> str:
        result = run(0)
        (grad,) = torch.autograd.grad(result[0], acts[0])
        return checks.check_decode_loss(problem, codes[0], tuple(t.detach() for t in result), grad, precision)

    gathered = float(shape.batch_tokens * shape.k * shape.d_in * W_dec.element_size())

    def figures(ms: float) -> dict[str, Any]:
        found = streamed("rows of W_dec gathered once", gathered)(ms)
        return found if gather_gbs is None else found | {"share_of_ceiling": found["gbs"] / gather_gbs}

    return Case("decode_loss", run, check, (problem.xs[0], W_dec, b_dec, codes[0].top_acts), figures, capturable=True)


def weight_grads_case(
    problem: Problem,
    codes: list[Code],
    ceilings: dict[str, float],
    name: str,
    uniform_ms: Callable[[], float | None],
    dtype: torch.dtype = torch.float32,
) -> Case:
    """Return both weight gradients, results in `dtype`: two calls of `latent_rows`.

    Its share of the ceiling is that of a floor: results written at the speed of a copy, rows gathered at the speed of
    the cache.
    """
    shape, device = problem.shape, problem.W_dec.device
    indices = [ops.build_index(code.top_indices, shape.d_sae) for code in codes]
    generator = torch.Generator(device).manual_seed(7)
    residuals, grads = [], []
    for code in codes:
        residuals.append(torch.randn(problem.xs[0].shape, generator=generator, device=device).to(problem.xs[0].dtype))
        grads.append(torch.randn(code.top_acts.shape, generator=generator, device=device))

    def run(i: int) -> tuple[Tensor, Tensor]:
        n = i % len(codes)
        grad_W_dec = ops.latent_rows(indices[n], codes[n].top_acts, residuals[n], dtype=dtype)
        return grad_W_dec, ops.latent_rows(indices[n], grads[n], problem.x(n), dtype=dtype)

    def check() -> str:
        grad_W_dec, grad_W_enc_T = run(0)
        bound = 1e-5 if dtype == torch.float32 else 2.0**-8
        wrong = checks.check_rows(grad_W_dec, codes[0], codes[0].top_acts, residuals[0], bound)
        return wrong + checks.check_rows(grad_W_enc_T, codes[0], grads[0], problem.xs[0], bound)

    gathered = 2.0 * shape.batch_tokens * shape.k * shape.d_in * problem.xs[0].element_size()
    written = 2.0 * dtype.itemsize * shape.d_sae * shape.d_in

    def figures(ms: float) -> dict[str, Any]:
        found = streamed("rows gathered + results written", gathered + written)(ms)
        uniform = uniform_ms()
        if uniform is not None:
            found["ratio_to_uniform"] = ms / uniform
        if {"copy", "gather"} <= ceilings.keys():
            floor = written / ceilings["copy"] / 1e6 + gathered / ceilings["gather"] / 1e6
            found |= {"floor_ms": floor, "share_of_ceiling": floor / ms}
        return found

    return Case(name, run, check, (problem.xs[0], residuals[0]), figures, capturable=True)


def forward_backward_case(problem: Problem, precision: str) -> Case:
    """Return the complete idiom: encode, decode with loss, backward; gradients in the dtype of the weights."""
    weights = tuple(weight.detach().requires_grad_() for weight in problem.weights)
    W_enc_T, b_enc, W_dec, b_dec = weights

    def run(i: int) -> tuple[Tensor, ...]:
        for weight in weights:
            weight.grad = None
        x, k = problem.x(i), problem.shape.k
        top_acts, top_indices, index = ops.encode_topk(
            x, W_enc_T, b_enc, k, b_dec=b_dec, precision=precision, return_index=True
        )
        loss, _, residual = ops.decode_loss(top_acts, top_indices, W_dec, b_dec, x, index=index)
        loss.backward()
        return top_acts.detach(), top_indices, residual.detach()

    def check() -> str:
        top_acts, top_indices, residual = run(0)
        grads = (W_enc_T.grad, W_dec.grad)
        wrong = checks.check_encode(problem, top_acts, top_indices, precision)
        tolerance = 2 * checks.TOLERANCE[precision]
        return wrong + checks.check_gradients(problem, Code(top_acts, top_indices), residual, grads, tolerance)

    flops = 2.0 * problem.shape.batch_tokens * problem.shape.d_in * (problem.shape.d_sae + 4 * problem.shape.k)
    return Case("forward_backward", run, check, (problem.xs[0], *weights), tflops(flops), capturable=True)


def dense_decode_case(problem: Problem, codes: list[Code]) -> Case:
    """Return what decode_loss and both weight gradients do, with dense products on the scattered code."""
    shape, (_, _, W_dec, b_dec) = problem.shape, problem.weights

    def run(i: int) -> tuple[Tensor, Tensor]:
        code, x = codes[i % len(codes)], problem.x(i)
        latents = torch.zeros(shape.batch_tokens, shape.d_sae, dtype=x.dtype, device=x.device)
        latents.scatter_(1, code.top_indices, code.top_acts.to(x.dtype))
        residual = x - (latents @ W_dec + b_dec)
        residual.float().square().sum()
        grad_x_hat = -2 * residual
        grad_W_dec = latents.T @ grad_x_hat
        grad_acts = (grad_x_hat @ W_dec.T).gather(1, code.top_indices)
        grad_pre = latents.zero_().scatter_(1, code.top_indices, grad_acts)
        return grad_W_dec, grad_pre.T @ x

    flops = 8.0 * shape.batch_tokens * shape.d_in * shape.d_sae
    return Case("dense_decode_and_grads", run, held=(problem.xs[0], W_dec), figures=tflops(flops), capturable=True)


def codes_of(problem: Problem, kind: str) -> list[Code]:
    """Return one code for each input of the problem: "dense" from torch.topk, "random" or "zipf"."""
    draw = {"dense": dense_code, "random": random_code, "zipf": zipf_code}[kind]
    return [draw(problem, i) for i in range(len(problem.xs))]
