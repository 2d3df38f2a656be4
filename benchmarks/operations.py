"""The operations of `flashsae.ops`, and the dense products and ceilings that they stand beside."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks import checks
from benchmarks.cases import Case, Size
from flashsae import ops
from flashsae.bench.ceilings import copy_run, gather_run, gemm_run
from flashsae.bench.dense import backward
from flashsae.bench.measure import TOLERANCE, Record, Subject
from flashsae.errors import MissingExtraError
from flashsae.precision import Precision, has_screen, operand_of

Figures = Callable[[Record], Record]
BF16 = torch.bfloat16


def tflops(flops: float) -> Figures:
    """Return a function that adds TFLOP/s."""
    return lambda record: {"flops": flops, "tflops": flops / record["median_ms"] / 1e9}


def streamed(name: str, moved: float) -> Figures:
    """Return a function that adds GB/s."""
    return lambda record: {"bytes": moved, "bytes_count": name, "gbs": moved / record["median_ms"] / 1e6}


def copy(size: Size) -> Subject:
    """Return a copy in the memory of the device."""
    run, moved = copy_run(size.device)
    return Subject(run, figures=streamed("read + written", moved))


def gather(size: Size) -> Subject:
    """Return gathers from the second-level cache."""
    if (made := gather_run(size.device)) is None:
        raise MissingExtraError("gathers are measured on a GPU, with Triton")
    return Subject(made[0], figures=streamed("gathered from cache", made[1]))


def gemm(size: Size, dtype: torch.dtype) -> Subject:
    """Return the encode as PyTorch's dense product alone, in row chunks where the result is large."""
    problem = size.problem(dtype)
    run, flops = gemm_run(problem.xs[0], problem.W_enc_T)
    return Subject(run, figures=tflops(flops), capturable=True)


def encode(size: Size, dtype: torch.dtype, precision: Precision, *, beside_gemm: bool) -> Subject:
    """Return `encode_topk`, in turn with the dense product where that is wanted."""
    shape, problem = size.shape, size.problem(dtype)
    W_enc_T, b_enc, _, b_dec = problem.weights

    def run(i: int) -> ops.SparseCode:
        with torch.no_grad():
            return ops.encode_topk(problem.x(i), W_enc_T, b_enc, shape.k, b_dec=b_dec, precision=precision)

    return Subject(
        run,
        lambda: checks.check_encode(problem, run(0), precision),
        held=(problem.xs[0], W_enc_T, b_enc, b_dec),
        figures=tflops(2.0 * shape.batch_tokens * shape.d_in * shape.d_sae),
        capturable=True,
        reference=("gemm", gemm(size, dtype).run) if beside_gemm else None,
    )


def encode_batch(size: Size, dtype: torch.dtype, precision: Precision) -> Subject:
    """Return `encode_batch_topk`, in turn with the dense product."""
    shape, problem = size.shape, size.problem(dtype)
    W_enc_T, b_enc, _, b_dec = problem.weights

    def run(i: int) -> ops.SparseCode:
        with torch.no_grad():
            return ops.encode_batch_topk(problem.x(i), W_enc_T, b_enc, shape.k, b_dec=b_dec, precision=precision)

    return Subject(
        run,
        lambda: checks.check_batch(problem, run(0), precision),
        held=(problem.xs[0], W_enc_T, b_enc, b_dec),
        figures=tflops(2.0 * shape.batch_tokens * shape.d_in * shape.d_sae),
        capturable=True,
        reference=("gemm", gemm(size, dtype).run),
    )


def index(size: Size, dtype: torch.dtype, kind: str = "dense") -> Subject:
    """Return the index of a pattern."""
    codes, d_sae = size.codes(dtype, kind), size.shape.d_sae

    def run(i: int) -> ops.LatentIndex:
        return ops.Pattern(codes[i % len(codes)].top_indices, d_sae).index

    return Subject(run, lambda: checks.check_index(run(0), codes[0], d_sae), (codes[0].top_indices,), capturable=True)


def decode(size: Size, dtype: torch.dtype, precision: str, kind: str = "dense") -> Subject:
    """Return `decode_loss`: reconstruction, loss, residual and the gradient of the activations."""
    problem, codes = size.problem(dtype), size.codes(dtype, kind)
    shape, (_, _, W_dec, b_dec) = problem.shape, problem.weights
    codes = [code.replace(code.acts.clone().requires_grad_()) for code in codes]

    def run(i: int) -> tuple[Tensor, Tensor, Tensor]:
        n = i % len(codes)
        return ops.decode_loss(codes[n], W_dec, b_dec, problem.x(n))

    def check() -> str:
        loss, x_hat, residual = run(0)
        (grad,) = torch.autograd.grad(loss, codes[0].acts)
        result = loss.detach(), x_hat.detach(), residual.detach()
        code = codes[0].replace(codes[0].acts.detach())
        return checks.check_decode_loss(problem, code, result, grad, precision)

    gathered = float(shape.batch_tokens * shape.k * shape.d_in * W_dec.element_size())

    def figures(record: Record) -> Record:
        found = streamed("rows of W_dec gathered once", gathered)(record)
        limit = size.memory_gbs.get("gather")
        return found if limit is None else found | {"share_of_ceiling": found["gbs"] / limit}

    return Subject(run, check, (problem.xs[0], W_dec, b_dec, codes[0].top_acts), figures, capturable=True)


def weight_grads(
    size: Size, dtype: torch.dtype, kind: str = "dense", written: torch.dtype = torch.float32, uniform: str = ""
) -> Subject:
    """Return both weight gradients: two calls of `latent_rows`.

    Its share of the ceiling is that of a floor: results written at the speed of a copy, rows gathered at the speed of
    the cache.

    Args:
        size: where.
        dtype: of the problem.
        kind: of the code.
        written: dtype of the results.
        uniform: name of the case whose time this one stands beside.
    """
    problem, codes = size.problem(dtype), size.codes(dtype, kind)
    shape, indices = problem.shape, [code.pattern.index for code in codes]
    generator = torch.Generator(size.device).manual_seed(7)
    residuals, grads = [], []
    for code in codes:
        residuals.append(_normal(problem.xs[0], generator).to(problem.xs[0].dtype))
        grads.append(_normal(code.top_acts, generator))

    def run(i: int) -> tuple[Tensor, Tensor]:
        n = i % len(codes)
        grad_W_dec = ops.latent_rows(indices[n], codes[n].top_acts, residuals[n], dtype=written)
        return grad_W_dec, ops.latent_rows(indices[n], grads[n], problem.x(n), dtype=written)

    def check() -> str:
        grad_W_dec, grad_W_enc_T = run(0)
        bound = 1e-5 if written == torch.float32 else 2.0**-8
        wrong = checks.check_rows(grad_W_dec, codes[0], codes[0].top_acts, residuals[0], bound)
        return wrong + checks.check_rows(grad_W_enc_T, codes[0], grads[0], problem.xs[0], bound)

    gathered_bytes = 2.0 * shape.batch_tokens * shape.k * shape.d_in * problem.xs[0].element_size()
    written_bytes = 2.0 * written.itemsize * shape.d_sae * shape.d_in

    def figures(record: Record) -> Record:
        ms = record["median_ms"]
        found = streamed("rows gathered + results written", gathered_bytes + written_bytes)(record)
        if uniform in size.medians:
            found["ratio_to_uniform"] = ms / size.medians[uniform]
        if {"copy", "gather"} <= size.memory_gbs.keys():
            floor = written_bytes / size.memory_gbs["copy"] / 1e6 + gathered_bytes / size.memory_gbs["gather"] / 1e6
            found |= {"floor_ms": floor, "share_of_ceiling": floor / ms}
        return found

    return Subject(run, check, (problem.xs[0], residuals[0]), figures, capturable=True)


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float32, device=like.device)


def forward_backward(size: Size, dtype: torch.dtype, precision: Precision) -> Subject:
    """Return the complete idiom: encode, decode with loss, backward; gradients in the dtype of the weights.

    With a screen it takes turns with the same without one.
    """
    problem = size.problem(dtype)
    weights = tuple(weight.detach().requires_grad_() for weight in problem.weights)
    W_enc_T, b_enc, W_dec, b_dec = weights

    def run(i: int) -> tuple[ops.SparseCode, ops.SparseCode, Tensor]:
        for weight in weights:
            weight.grad = None
        x, k = problem.x(i), problem.shape.k
        selected = ops.encode_topk(x, W_enc_T, b_enc, k, b_dec=b_dec, precision=precision)
        code = selected.replace(selected.acts.relu())
        loss, _, residual = ops.decode_loss(code, W_dec, b_dec, x)
        backward(loss)
        return selected, code, residual.detach()

    def check() -> str:
        selected, code, residual = run(0)
        assert W_enc_T.grad is not None
        assert W_dec.grad is not None
        grads = W_enc_T.grad, W_dec.grad
        wrong = checks.check_encode(problem, selected, precision)
        tolerance = 2 * TOLERANCE[precision]
        return wrong + checks.check_gradients(problem, code.replace(code.acts.detach()), residual, grads, tolerance)

    flops = 2.0 * problem.shape.batch_tokens * problem.shape.d_in * (problem.shape.d_sae + 4 * problem.shape.k)
    operand, reference = operand_of(precision), None
    if has_screen(precision):
        reference = operand, forward_backward(size, dtype, operand).run
    return Subject(run, check, (problem.xs[0], *weights), tflops(flops), capturable=True, reference=reference)


def dense_decode_and_grads(size: Size, dtype: torch.dtype, kind: str) -> Subject:
    """Return what decode_loss and both weight gradients do, with dense products on the scattered code."""
    problem, codes = size.problem(dtype), size.codes(dtype, kind)
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
    return Subject(run, held=(problem.xs[0], W_dec), figures=tflops(flops), capturable=True)


def _stages(dtype: torch.dtype, precision: Precision) -> tuple[Case, ...]:
    """Return the operations one after another, each beside its ceiling."""
    builds = {
        "gemm": partial(gemm, dtype=dtype),
        "encode_topk": partial(encode, dtype=dtype, precision=precision, beside_gemm=True),
        "index": partial(index, dtype=dtype),
        "decode_loss": partial(decode, dtype=dtype, precision=precision),
        "weight_grads": partial(weight_grads, dtype=dtype),
    }
    return tuple(Case(name, precision, build) for name, build in builds.items())


_OTHERS: tuple[Precision, ...] = ("tf32", "bf16", "bf16-int8", "float32-int8")
_FLOAT32: tuple[Precision, ...] = ("float32", "float32-int8")
CEILING_CASES = (Case("copy", "", copy), Case("gather", "", gather))
CASES = (
    *_stages(BF16, "bf16"),
    Case("encode_topk", "bf16-int8", partial(encode, dtype=BF16, precision="bf16-int8", beside_gemm=True)),
    Case("encode_batch_topk", "bf16", partial(encode_batch, dtype=BF16, precision="bf16")),
    Case("encode_batch_topk", "bf16-int8", partial(encode_batch, dtype=BF16, precision="bf16-int8")),
    Case("weight_grads_bf16", "bf16", partial(weight_grads, dtype=BF16, written=BF16)),
    Case("weight_grads_zipf", "bf16", partial(weight_grads, dtype=BF16, kind="zipf", uniform="weight_grads")),
    Case("forward_backward", "bf16", partial(forward_backward, dtype=BF16, precision="bf16")),
)
PAPER_CASES = (
    *_stages(torch.float32, "float32"),
    *(
        Case("forward_backward", precision, partial(forward_backward, dtype=torch.float32, precision=precision))
        for precision in _FLOAT32
    ),
    *(
        Case("encode_topk", precision, partial(encode, dtype=torch.float32, precision=precision, beside_gemm=False))
        for precision in _OTHERS
    ),
)
SWEEP_CASES = (
    Case("decode_loss", "bf16", partial(decode, dtype=BF16, precision="bf16", kind="random")),
    Case("weight_grads", "bf16", partial(weight_grads, dtype=BF16, kind="random")),
    Case("dense_decode_and_grads", "bf16", partial(dense_decode_and_grads, dtype=BF16, kind="random")),
)
