"""The tensors of one size, the same for every implementation, and what the dense float32 code makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashsae.architecture import Progress, architecture_of
from flashsae.bench.setups import Shape, Sites, arch_settings, other_params, sites_of
from flashsae.bench.timing import float32_products
from flashsae.ops import SparseCode
from flashsae.sae.config import SAEConfig
from flashsae.testing import dense_pre_acts, oracle

L2_BYTES = 64 * 2**20  # more than the second-level cache of a Hopper GPU holds
DENSE_ELEMENTS = 2**29  # of pre-activations in memory at once, where a batch may be cut
DEAD_SCALE = 0.01  # of the encoder rows of dead latents: they are never among the k largest


@dataclass(frozen=True)
class Problem:
    """The tensors of one size.

    Args:
        shape: the size.
        xs: inputs to take turns with, so that a small one is not found in the cache; [B, d_in], unit scale; of an
            architecture of several sites these beside each other.
        W_enc_T: [d_sae, d_in], equal to W_dec but for dead latents, so that pre-activations are about N(0, 1).
        W_dec: [d_sae, d_out], rows of norm 1.
        b_enc: [d_sae], small.
        b_dec: [d_out], small.
        dead: the first so many latents are never active.
        arch: settings of the architecture.
        sites: of the architecture.
        others: parameters that it has beside these four, by name.
    """

    shape: Shape
    xs: tuple[Tensor, ...]
    W_enc_T: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor
    dead: int
    arch: Any
    sites: Sites
    others: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """W_enc_T, b_enc, W_dec, b_dec."""
        return self.W_enc_T, self.b_enc, self.W_dec, self.b_dec

    @property
    def params(self) -> dict[str, Tensor]:
        """All parameters by name."""
        return {**dict(zip(("W_enc_T", "b_enc", "W_dec", "b_dec"), self.weights)), **self.others}

    @property
    def arch_name(self) -> str:
        """Name of the architecture."""
        return architecture_of(self.arch).name

    @property
    def sae_config(self) -> SAEConfig:
        """What defines the SAE besides its weights."""
        return SAEConfig(self.sites.d_in, self.shape.d_sae, arch=self.arch, d_out=self.sites.d_out)

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the architecture by name, and the numbers of its schedule at the end of a training."""
        schedule = architecture_of(self.arch).schedule
        return {**asdict(self.arch), **(schedule(self.sae_config, Progress.end()) if schedule else {})}

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.W_dec.device

    def x(self, i: int) -> Tensor:
        """Input of iteration i."""
        return self.xs[i % len(self.xs)]


def make_problem(
    shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0, *, tied: bool = False, dead: int = 0,
    arch: object = "topk",
) -> Problem:  # fmt: skip
    """Draw the tensors of one size.

    Args:
        shape: the size.
        dtype: of all tensors.
        device: for them.
        seed: of the draw; the same for each implementation that is compared.
        tied: W_enc_T and W_dec may share memory, for callers that change neither.
        dead: the first so many latents are to be dead.
        arch: the architecture, as in `arch_settings`; about k latents are active for each token, whatever it is.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float32, device=device)

    settings = arch_settings(arch, shape)
    sites = sites_of(settings, shape)
    if not architecture_of(settings).sites:  # its settings tell them
        settings = replace(settings, sites=tuple(sites.widths), widths=tuple(sites.widths.values()))
    width = sum(sites.widths.values())
    x_bytes = shape.batch_tokens * width * dtype.itemsize
    turns = min(4, -(-L2_BYTES // x_bytes)) if device.type == "cuda" else 2
    W_dec = torch.empty(shape.d_sae, sites.d_out, dtype=dtype, device=device)
    for rows in torch.split(W_dec, 65536):
        drawn = draw(len(rows), sites.d_out)
        rows.copy_(drawn / drawn.norm(dim=1, keepdim=True))
    W_enc_T = W_dec if tied and not dead else W_dec.clone()
    W_enc_T[:dead] *= DEAD_SCALE
    problem = Problem(
        shape,
        tuple(draw(shape.batch_tokens, width).to(dtype) for _ in range(turns)),
        W_enc_T,
        W_dec,
        (0.1 * draw(shape.d_sae)).to(dtype),
        (0.1 * draw(sites.d_out)).to(dtype),
        dead,
        settings,
        sites,
    )
    others = other_params(settings, shape, problem.params)
    return replace(problem, b_enc=others.pop("b_enc", problem.b_enc), others=others)


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
def dense_squared_error(problem: Problem, products: str = "ieee") -> float:
    """Return Σ‖target − x_hat‖² of the first input by the dense oracle; of nested reconstructions, the mean over them.

    Args:
        problem: whose weights, input and architecture.
        products: arithmetic of float32 products on a GPU, as in `float32_products`.
    """
    dense, x = oracle(problem.arch_name), problem.xs[0]
    dense = replace(dense, terms=dict(list(dense.terms.items())[:1]))
    rows = max(1, DENSE_ELEMENTS // problem.shape.d_sae) if dense.by_token else len(x)
    total, sites = 0.0, problem.sites
    with float32_products(products):
        for part in torch.split(x, rows):
            terms = dense.losses(
                sites.read(part), problem.params, 1 / len(part), target=sites.written(part), topk=torch.topk,
                **problem.settings,
            )  # fmt: skip
            total += float(next(iter(terms.values())))
    return total
