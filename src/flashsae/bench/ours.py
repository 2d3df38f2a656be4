"""Our whole training step in the setting of the benchmark, and what must hold after its first update."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import Tensor

from flashsae.architecture import architecture_of
from flashsae.bench.problem import Problem, dense_code, residual_of
from flashsae.bench.setups import SLOWER, Sites
from flashsae.bench.timing import float32_products
from flashsae.data.shuffle import Batches
from flashsae.optim import FactoredAdam
from flashsae.precision import Precision, has_screen, operand_of
from flashsae.sae.dead import DeadLatents
from flashsae.sae.losses import token_variance
from flashsae.sae.module import SAE
from flashsae.testing import UnitNormAdam
from flashsae.train.config import TrainConfig
from flashsae.train.graph import CapturedSteps
from flashsae.train.optimizer import build_optimizer
from flashsae.train.scaling import Scaling
from flashsae.train.state import TrainState, room_of
from flashsae.train.step import train_step

SAMPLED_ROWS = 48
ROW_TOLERANCE = 0.02  # of the learning rate, which is about what Adam moves each weight by
MAY_DIFFER = 2e-3  # of the sampled weights: a gradient next to 0 has either sign after rounding, and Adam follows it

BuildOptimizer = Callable[[SAE, TrainConfig], FactoredAdam]


@dataclass(frozen=True)
class Variant:
    """A way to train.

    Args:
        precision: of products, as in `TrainConfig`.
        moments: dtype of Adam's moments.
        clip_norm: largest norm of the gradient, None for no clipping.
        k_aux: dead latents of each token in the auxiliary loss, where the problem has dead ones.
        arch: the architecture: its settings, or its name, as in `arch_settings`.
    """

    precision: Precision = "bf16"
    moments: Literal["float32", "bf16"] = "float32"
    clip_norm: float | None = None
    k_aux: int = 512
    arch: object = "topk"

    @property
    def unscreened(self) -> tuple[str, Variant] | None:
        """The same without its 8-bit screen, behind the name of its precision; None where it has none."""
        operand = operand_of(self.precision)
        return (operand, replace(self, precision=operand)) if has_screen(self.precision) else None


@dataclass(frozen=True)
class Rows:
    """Some rows of both weight matrices after one step of `torch.optim.Adam` on materialised gradients."""

    latents: Tensor
    W_enc_T: Tensor
    W_dec: Tensor


@dataclass(frozen=True)
class OurStep:
    """Our step, ready to run.

    Args:
        state: changed by each step.
        config: settings.
        sites: what an input is made of.
        expected: rows of the weights after the first step; None where they cannot be told exactly.
    """

    state: TrainState
    config: TrainConfig
    sites: Sites
    expected: Rows | None = None

    @property
    def lr(self) -> float:
        """Learning rate."""
        return self.config.lr

    def settings(self) -> AbstractContextManager[None]:
        """Return the context in which it is to run."""
        return nullcontext()

    def run(self, x: Tensor) -> Tensor:
        """Do a step; return the first term of the loss before it: the FVU, or its mean over nested reconstructions."""
        metrics = train_step(self.state, self.sites.batch(x), self.config)
        return metrics[self.state.sae.architecture.terms[0].name]

    def active(self, x: Tensor) -> float:
        """Do a step; return the active latents of a token in it."""
        return float(train_step(self.state, self.sites.batch(x), self.config)["l0"])

    def squared_error(self, fvu: float, x: Tensor) -> float:
        """Return the sum of squared errors that the FVU of a step stands for."""
        return fvu * len(x) * self.state.variance

    def uncaptured(self) -> OurStep:
        """Return the same step, which changes the same tensors, with no graph yet: its first run is no replay."""
        return replace(self, state=replace(self.state, captured=CapturedSteps()))

    def parameters(self) -> list[str]:
        """Return the names of the parameters in the order in which the optimiser holds them."""
        names = {id(parameter): name for name, parameter in self.state.sae.named_parameters()}
        return [names[id(parameter)] for group in self.state.optimizer.param_groups for parameter in group["params"]]

    def wrong_after_first(self) -> str:
        """Say what is wrong with the weights after the first step, "" if nothing or not known."""
        wrong = ""
        for name in ("W_enc_T", "W_dec") if self.expected else ():
            assert self.expected is not None
            rows = self.state.optimizer.float32_weights(getattr(self.state.sae, name))[self.expected.latents]
            off = (rows - getattr(self.expected, name)).abs() > ROW_TOLERANCE * self.config.lr
            share = float(off.float().mean())
            if not share <= MAY_DIFFER:
                wrong += f"{name} after a step: {share:.2%} of the sampled weights are not those of torch.optim.Adam. "
        return wrong


def make_config(problem: Problem, variant: Variant) -> TrainConfig:
    """Return the settings of a training on such a problem, without warm-up of the learning rate.

    With dead latents AuxK is on, and the learning rate a tenth; with codes above a threshold it is a thousandth, with a
    screen a hundredth. That costs the same, and for as long as they are measured the dead stay dead, L0 as it is, and
    pre-activations as far from the k-th as they are before one batch is learnt by heart.
    """
    shape = problem.shape
    config = TrainConfig(
        d_sae=shape.d_sae,
        arch=problem.arch,
        tokens=10**9,
        batch_tokens=shape.batch_tokens,
        precision=variant.precision,
        moments=variant.moments,
        warmup_steps=0,
        clip_norm=variant.clip_norm,
        auxk_alpha=1 / 32 if problem.dead else 0.0,
        k_aux=max(1, min(variant.k_aux, problem.dead)),
    ).resolve(problem.sites.widths)
    screened = 100 if has_screen(variant.precision) else 1
    slower = SLOWER if architecture_of(config.arch).varies else max(screened, 10 if problem.dead else 1)
    return replace(config, lr=config.lr / slower)


def make_state(problem: Problem, config: TrainConfig, build_optimizer: BuildOptimizer = build_optimizer) -> TrainState:
    """Return the state of a training that starts from the weights of a float32 problem, without data."""
    shape = problem.shape
    sae = SAE(problem.sae_config, seed=None, device=problem.device)
    sae.precision = config.precision
    with torch.no_grad():
        for name, value in problem.params.items():
            getattr(sae, name).copy_(value)
    dead = DeadLatents(shape.d_sae, config.dead_after_tokens, problem.device)
    dead.tokens_since_fired[: problem.dead] = config.dead_after_tokens
    no_batches = cast(Batches, None)  # each step is given its batch
    variance = token_variance(problem.sites.written(problem.xs[0]))
    scaling = Scaling.uniform(1.0, sae.config.d_in, sae.config.d_out)
    room = room_of(sae, problem.device)
    return TrainState(sae, build_optimizer(sae, config), dead, no_batches, scaling, variance, room=room)


def build_ours(problem: Problem, variant: Variant) -> OurStep:
    """Make our step ready; plain float32, screened or not, knows what its first update must give."""
    config = make_config(problem, variant)
    is_exact = variant in (Variant("float32"), Variant("float32-int8"))
    expected = expected_rows(problem, config.lr) if is_exact and not problem.dead else None
    return OurStep(make_state(problem, config), config, problem.sites, expected)


def expected_rows(problem: Problem, lr: float) -> Rows:
    """Do the first step for some latents with the dense code, gradients as they are, and `torch.optim.Adam`."""
    x = problem.xs[0]
    with torch.no_grad(), float32_products("ieee"):
        code = dense_code(problem, 0)
        slope = -2 / (len(x) * token_variance(x)) * residual_of(problem, code, 0).double()
        centred = (x - problem.b_dec).double()
        active = code.top_indices.flatten()
        spread = torch.linspace(0, len(active) - 1, SAMPLED_ROWS, dtype=torch.float32, device=x.device).long()
        latents: Tensor = torch.unique(active[spread])
        grads: tuple[list[Tensor], list[Tensor]] = [], []
        for latent in latents.tolist():
            tokens, places = ((code.top_indices == latent) & (code.top_acts != 0)).nonzero(as_tuple=True)
            grad_pre = slope[tokens] @ problem.W_dec[latent].double()
            grads[0].append(grad_pre @ centred[tokens])
            grads[1].append(code.top_acts[tokens, places].double() @ slope[tokens])
        W_enc_T, W_dec = (weights[latents].clone() for weights in (problem.W_enc_T, problem.W_dec))
        W_enc_T.grad, W_dec.grad = (torch.stack(rows).float() for rows in grads)
        UnitNormAdam([W_enc_T, W_dec], W_dec, lr).step()
        return Rows(latents, W_enc_T, W_dec)
