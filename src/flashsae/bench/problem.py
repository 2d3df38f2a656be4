"""The tensors of one size, the same for every implementation, and what the dense float32 code makes of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from flashsae.bench.timing import float32_products

L2_BYTES = 64 * 2**20  # more than the second-level cache of a Hopper GPU holds
DEAD_SCALE = 0.01  # of the encoder rows of dead latents: they are never among the k largest


@dataclass(frozen=True)
class Shape:
    """One size.

    Args:
        name: as it stands in results.
        batch_tokens: tokens, B.
        d_in: width of the activations.
        d_sae: number of latents.
        k: active latents of each token.
    """

    name: str
    batch_tokens: int
    d_in: int
    d_sae: int
    k: int


@dataclass(frozen=True)
class Problem:
    """The tensors of one size.

    Args:
        shape: the size.
        xs: inputs to take turns with, so that a small one is not found in the cache; [B, d_in], unit scale.
        W_enc_T: [d_sae, d_in], equal to W_dec but for dead latents, so that pre-activations are about N(0, 1).
        W_dec: [d_sae, d_in], rows of norm 1.
        b_enc: [d_sae], small.
        b_dec: [d_in], small.
        dead: the first so many latents never fire.
    """

    shape: Shape
    xs: tuple[Tensor, ...]
    W_enc_T: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor
    dead: int = 0

    @property
    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """W_enc_T, b_enc, W_dec, b_dec."""
        return self.W_enc_T, self.b_enc, self.W_dec, self.b_dec

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.W_dec.device

    def x(self, i: int) -> Tensor:
        """Input of iteration i."""
        return self.xs[i % len(self.xs)]


@dataclass(frozen=True)
class Code:
    """A sparse code that belongs to a problem: [B, k] values (float32) and latents (int64, ascending, distinct)."""

    top_acts: Tensor
    top_indices: Tensor


def tiny(shape: Shape) -> Shape:
    """Return the shape scaled down until a CPU runs it at once; to test the benchmark, not to time anything."""
    return replace(
        shape,
        batch_tokens=32,
        d_in=16 + shape.d_in // 256,
        d_sae=128 + shape.d_sae // 4096,
        k=min(16, 2 + shape.k // 16),
    )


def make_problem(
    shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0, *, tied: bool = False, dead: int = 0
) -> Problem:
    """Draw the tensors of one size.

    Args:
        shape: the size.
        dtype: of all tensors.
        device: for them.
        seed: of the draw; the same for each implementation that is compared.
        tied: W_enc_T and W_dec may share memory, for callers that change neither.
        dead: the first so many latents are to be dead.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float32, device=device)

    x_bytes = shape.batch_tokens * shape.d_in * dtype.itemsize
    turns = min(4, -(-L2_BYTES // x_bytes)) if device.type == "cuda" else 2
    W_dec = torch.empty(shape.d_sae, shape.d_in, dtype=dtype, device=device)
    for rows in torch.split(W_dec, 65536):
        drawn = draw(len(rows), shape.d_in)
        rows.copy_(drawn / drawn.norm(dim=1, keepdim=True))
    W_enc_T = W_dec if tied and not dead else W_dec.clone()
    W_enc_T[:dead] *= DEAD_SCALE
    return Problem(
        shape,
        tuple(draw(shape.batch_tokens, shape.d_in).to(dtype) for _ in range(turns)),
        W_enc_T,
        W_dec,
        (0.1 * draw(shape.d_sae)).to(dtype),
        (0.1 * draw(shape.d_in)).to(dtype),
        dead,
    )


def dense_code(problem: Problem, i: int) -> Code:
    """Encode input i with torch.topk over dense pre-activations, a few rows at a time."""
    W_enc_T, b_enc, _, b_dec = problem.weights
    acts, indices = [], []
    for rows in torch.split(problem.x(i), max(1, 2**29 // problem.shape.d_sae)):
        top = ((rows - b_dec) @ W_enc_T.T + b_enc).topk(problem.shape.k, dim=1)
        order = top.indices.argsort(dim=1)
        acts.append(top.values.gather(1, order).float().relu())
        indices.append(top.indices.gather(1, order))
    return Code(torch.cat(acts), torch.cat(indices))


def residual_of(problem: Problem, code: Code, i: int) -> Tensor:
    """Return x − x_hat of input i, [B, d_in], decoded in the dtype of the weights."""
    x_hat = F.embedding_bag(
        code.top_indices, problem.W_dec, per_sample_weights=code.top_acts.to(problem.W_dec.dtype), mode="sum"
    )
    return problem.x(i) - (x_hat + problem.b_dec)


@torch.no_grad()
def dense_squared_error(problem: Problem) -> float:
    """Return Σ‖x − x_hat‖² of the first input by the dense code, float32 products in IEEE arithmetic."""
    with float32_products("ieee"):
        residual = residual_of(problem, dense_code(problem, 0), 0)
    return float(residual.double().square().sum())


def total_variance(x: Tensor) -> float:
    """Return Σ‖x − mean x‖², what a fraction of variance is relative to."""
    return float((x.float() - x.float().mean(0)).square().sum(dtype=torch.float64))
