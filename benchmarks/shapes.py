"""The sizes that are measured, and the tensors of one size."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

L2_BYTES = 64 * 2**20  # more than the second-level cache of a Hopper GPU holds


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


SIZES = (
    Shape("S", 4096, 768, 24576, 32),
    Shape("M", 4096, 2048, 65536, 64),
    Shape("L", 8192, 4096, 131072, 64),
    Shape("XL", 8192, 4096, 524288, 64),
)
PAPER = tuple(Shape(f"n={d_sae}", 4096, 4096, d_sae, 128) for d_sae in (16384, 65536, 131072))
SWEEPS = {
    "d_sae": tuple(Shape(f"d_sae={n}k", 8192, 4096, n * 1024, 64) for n in (32, 64, 128, 256, 512)),
    "k": tuple(Shape(f"k={k}", 4096, 2304, 131072, k) for k in (16, 32, 64, 128, 256, 512)),
    "d_in": tuple(Shape(f"d_in={d}", 4096, d, 32768, 64) for d in (384, 768, 2304, 3584, 4096, 8192)),
}


def tiny(shapes: Iterable[Shape]) -> tuple[Shape, ...]:
    """Return the shapes scaled down until a CPU runs them at once; to test the benchmark, not to time anything."""
    return tuple(Shape(s.name, 32, 16 + s.d_in // 256, 128 + s.d_sae // 4096, min(16, 2 + s.k // 16)) for s in shapes)


@dataclass(frozen=True)
class Problem:
    """The tensors of one size.

    Args:
        shape: the size.
        xs: inputs to take turns with, so that a small one is not found in the cache; [B, d_in], unit scale.
        W_enc_T: [d_sae, d_in], equal to W_dec, so that pre-activations are about N(0, 1).
        W_dec: [d_sae, d_in], rows of norm 1.
        b_enc: [d_sae], small.
        b_dec: [d_in], small.
    """

    shape: Shape
    xs: tuple[Tensor, ...]
    W_enc_T: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor

    @property
    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """W_enc_T, b_enc, W_dec, b_dec."""
        return self.W_enc_T, self.b_enc, self.W_dec, self.b_dec

    def x(self, i: int) -> Tensor:
        """Input of iteration i."""
        return self.xs[i % len(self.xs)]


@dataclass(frozen=True)
class Code:
    """A sparse code that belongs to a problem: [B, k] values (float32) and latents (int64, ascending, distinct)."""

    top_acts: Tensor
    top_indices: Tensor


def make_problem(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Problem:
    """Draw the tensors of one size."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    x_bytes = shape.batch_tokens * shape.d_in * dtype.itemsize
    turns = min(4, -(-L2_BYTES // x_bytes)) if device.type == "cuda" else 2
    W_dec = torch.empty(shape.d_sae, shape.d_in, dtype=dtype, device=device)
    for rows in W_dec.split(65536):
        drawn = draw(len(rows), shape.d_in)
        rows.copy_(drawn / drawn.norm(dim=1, keepdim=True))
    return Problem(
        shape,
        tuple(draw(shape.batch_tokens, shape.d_in).to(dtype) for _ in range(turns)),
        W_dec.clone(),
        W_dec,
        (0.1 * draw(shape.d_sae)).to(dtype),
        (0.1 * draw(shape.d_in)).to(dtype),
    )


def dense_code(problem: Problem, i: int) -> Code:
    """Encode input i with torch.topk over dense pre-activations, a few rows at a time."""
    W_enc_T, b_enc, _, b_dec = problem.weights
    acts, indices = [], []
    for rows in problem.x(i).split(max(1, 2**29 // problem.shape.d_sae)):
        top = ((rows - b_dec) @ W_enc_T.T + b_enc).topk(problem.shape.k, dim=1)
        order = top.indices.argsort(dim=1)
        acts.append(top.values.gather(1, order).float().relu())
        indices.append(top.indices.gather(1, order))
    return Code(torch.cat(acts), torch.cat(indices))


def random_code(problem: Problem, i: int) -> Code:
    """Draw a code with every latent equally likely: the same access pattern as a trained one's bulk, at no cost."""
    shape, device = problem.shape, problem.W_dec.device
    generator = torch.Generator(device).manual_seed(1000 + i)
    size = (shape.batch_tokens, shape.k)
    # one latent from each of k equal ranges: distinct and ascending
    ranges = torch.arange(shape.k, device=device) * (shape.d_sae // shape.k)
    offsets = torch.randint(shape.d_sae // shape.k, size, generator=generator, device=device)
    return Code(1 + torch.rand(size, generator=generator, device=device), ranges + offsets)


def zipf_code(problem: Problem, i: int) -> Code:
    """Draw a code whose latents follow Zipf's law (latent of rank r as likely as 1/r), latent 0 on every token."""
    shape, device = problem.shape, problem.W_dec.device
    generator = torch.Generator(device).manual_seed(2000 + i)
    ranks = torch.randperm(shape.d_sae - 1, generator=generator, device=device) + 1.0
    chosen = torch.zeros(shape.batch_tokens, shape.k, dtype=torch.int64, device=device)
    for rows in chosen.split(max(1, 2**28 // shape.d_sae)):
        # the k - 1 first arrivals of processes with rate 1 / rank: k - 1 distinct draws
        arrivals = torch.empty(len(rows), shape.d_sae - 1, device=device).exponential_(generator=generator)
        rows[:, 1:] = arrivals.mul_(ranks).topk(shape.k - 1, dim=1, largest=False).indices.sort(dim=1).values + 1
    return Code(1 + torch.rand(chosen.shape, generator=generator, device=device), chosen)
