"""The tensors of one size, the same for every implementation, and what the dense float32 code makes of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashsae.architecture import architecture_named, architecture_of, settings_of
from flashsae.bench.timing import float32_products
from flashsae.ops import SparseCode
from flashsae.testing import dense_decode, dense_pre_acts, oracle

L2_BYTES = 64 * 2**20  # more than the second-level cache of a Hopper GPU holds
DENSE_ELEMENTS = 2**29  # of pre-activations in memory at once, where a batch may be cut
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
    def params(self) -> dict[str, Tensor]:
        """The same by name."""
        return dict(zip(("W_enc_T", "b_enc", "W_dec", "b_dec"), self.weights))

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.W_dec.device

    def x(self, i: int) -> Tensor:
        """Input of iteration i."""
        return self.xs[i % len(self.xs)]


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


def arch_settings(arch: object, shape: Shape) -> Any:
    """Return the settings of an architecture at a size.

    Args:
        arch: its settings, or its name: then with the k of the size, if it has such a setting.
        shape: the size.
    """
    if not isinstance(arch, str):
        return arch
    names = [field.name for field in fields(architecture_named(arch).settings)]
    return settings_of(arch, **({"k": shape.k} if "k" in names else {}))


def dense_code(problem: Problem, i: int) -> SparseCode:
    """Encode input i with torch.topk over dense pre-activations, a few rows at a time; float32, latents ascending."""
    W_enc_T, b_enc, _, b_dec = problem.weights
    acts, indices = [], []
    for rows in torch.split(problem.x(i), max(1, DENSE_ELEMENTS // problem.shape.d_sae)):
        top = dense_pre_acts(rows, W_enc_T, b_enc, b_dec).topk(problem.shape.k, dim=1)
        order = top.indices.argsort(dim=1)
        acts.append(top.values.gather(1, order).float().relu())
        indices.append(top.indices.gather(1, order))
    return SparseCode.topk(torch.cat(acts), torch.cat(indices), problem.shape.d_sae)


def residual_of(problem: Problem, code: SparseCode, i: int) -> Tensor:
    """Return x − x_hat of input i, [B, d_in], decoded in the dtype of the weights."""
    x_hat = F.embedding_bag(
        code.top_indices, problem.W_dec, per_sample_weights=code.top_acts.to(problem.W_dec.dtype), mode="sum"
    )
    return problem.x(i) - (x_hat + problem.b_dec)


@torch.no_grad()
def dense_squared_error(problem: Problem, arch: object = "topk") -> float:
    """Return Σ‖x − x_hat‖² of the first input by the dense oracle, float32 products in IEEE arithmetic.

    Args:
        problem: whose weights and input.
        arch: an architecture, as in `arch_settings`.
    """
    settings = arch_settings(arch, problem.shape)
    encode, x = oracle(architecture_of(settings).name), problem.xs[0]
    rows = max(1, DENSE_ELEMENTS // problem.shape.d_sae) if encode.by_token else len(x)
    total = 0.0
    with float32_products("ieee"):
        for part in torch.split(x, rows):
            latent_acts = encode(part, problem.params, topk=torch.topk, **asdict(settings))
            total += float((part - dense_decode(latent_acts, problem.params)).double().square().sum())
    return total
