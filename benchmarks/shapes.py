"""The sizes that are measured, and sparse codes drawn for them."""

from __future__ import annotations

import torch

from flashsae.bench.problem import Problem
from flashsae.bench.setups import Shape
from flashsae.ops import SparseCode

SIZES = (
    Shape("S", 4096, 768, 24576, 32),
    Shape("M", 4096, 2048, 65536, 64),
    Shape("L", 8192, 4096, 131072, 64),
    Shape("XL", 8192, 4096, 524288, 64),
)
SCALE = tuple(Shape(f"d_sae={n}k", 8192, 4096, n * 1024, 64) for n in (32, 64, 128, 256, 512))
LARGEST = Shape("1M", 8192, 4096, 1048576, 64)
PAPER = tuple(Shape(f"n={d_sae}", 4096, 4096, d_sae, 128) for d_sae in (16384, 65536, 131072))
SWEEPS = {
    "d_sae": SCALE,
    "k": tuple(Shape(f"k={k}", 4096, 2304, 131072, k) for k in (16, 32, 64, 128, 256, 512)),
    "d_in": tuple(Shape(f"d_in={d}", 4096, d, 32768, 64) for d in (384, 768, 2304, 3584, 4096, 8192)),
}


def random_code(problem: Problem, i: int) -> SparseCode:
    """Draw a code with every latent equally likely: the same access pattern as a trained one's bulk, at no cost."""
    shape, device = problem.shape, problem.W_dec.device
    generator = torch.Generator(device).manual_seed(1000 + i)
    size = (shape.batch_tokens, shape.k)
    # one latent from each of k equal ranges: distinct and ascending
    ranges = torch.arange(shape.k, device=device) * (shape.d_sae // shape.k)
    offsets = torch.randint(shape.d_sae // shape.k, size, generator=generator, device=device)
    acts = 1 + torch.rand(size, generator=generator, device=device)
    return SparseCode.topk(acts, ranges + offsets, shape.d_sae)


def zipf_code(problem: Problem, i: int) -> SparseCode:
    """Draw a code whose latents follow Zipf's law (latent of rank r as likely as 1/r), latent 0 on every token."""
    shape, device = problem.shape, problem.W_dec.device
    generator = torch.Generator(device).manual_seed(2000 + i)
    ranks = torch.randperm(shape.d_sae - 1, generator=generator, device=device) + 1.0
    chosen = torch.zeros(shape.batch_tokens, shape.k, dtype=torch.int64, device=device)
    for rows in torch.split(chosen, max(1, 2**28 // shape.d_sae)):
        # the k - 1 first arrivals of processes with rate 1 / rank: k - 1 distinct draws
        arrivals = torch.empty(len(rows), shape.d_sae - 1, device=device).exponential_(generator=generator)
        rows[:, 1:] = arrivals.mul_(ranks).topk(shape.k - 1, dim=1, largest=False).indices.sort(dim=1).values + 1
    acts = 1 + torch.rand(chosen.shape, generator=generator, device=device)
    return SparseCode.topk(acts, chosen, shape.d_sae)
