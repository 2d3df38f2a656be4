"""Other implementations of forward and backward of a TopK autoencoder, through their public classes, and ours alike.

All hold float32 weights and run their products in bfloat16 (or what their own recipe takes), squared error, no
auxiliary loss, no optimiser. All start from the same weights, so that their losses can be compared.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.checks import TOLERANCE
from benchmarks.measure import Case
from benchmarks.operations import tflops
from benchmarks.shapes import Problem, dense_code
from flashsae import ops


@dataclass(frozen=True)
class Step:
    """One implementation, ready to run.

    Args:
        loss: from x, [B, d_in] float32, to the scalar that it trains on.
        state: its parameters and buffers.
        squared_error: from its loss and x to the sum of squared errors.
        loss_scale: what its recipe multiplies the loss by before backward.
    """

    loss: Callable[[Tensor], Tensor]
    state: tuple[Tensor, ...]
    squared_error: Callable[[float, Tensor], float]
    loss_scale: float = 1.0


def _bf16(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16)


def _state(module: nn.Module) -> tuple[Tensor, ...]:
    return (*module.parameters(), *module.buffers())


@torch.no_grad()
def _load(pairs: tuple[tuple[Tensor, Tensor], ...]) -> None:
    for theirs, ours in pairs:
        theirs.copy_(ours)


def _sum_per_token(loss: float, x: Tensor) -> float:
    return loss * len(x)


def dense(problem: Problem, autocast: bool = True) -> Step:
    """Dense PyTorch with autograd: linear, topk, relu, scatter, matmul."""
    weights = tuple(weight.clone().requires_grad_() for weight in problem.weights)
    W_enc_T, b_enc, W_dec, b_dec = weights
    context = _bf16(W_dec.device) if autocast else contextlib.nullcontext()

    def loss(x: Tensor) -> Tensor:
        with context:
            pre_acts = F.linear(x - b_dec, W_enc_T, b_enc)
            top = pre_acts.topk(problem.shape.k, dim=-1, sorted=False)
            latent_acts = torch.zeros_like(pre_acts).scatter(-1, top.indices, top.values.relu())
            x_hat = latent_acts @ W_dec + b_dec
        return (x_hat - x).square().sum()

    return Step(loss, weights, lambda value, x: value)


def flashsae_master(problem: Problem) -> Step:
    """Ours with float32 weights: rounded to bfloat16 inside, gradients in float32."""
    weights = tuple(weight.clone().requires_grad_() for weight in problem.weights)

    def loss(x: Tensor) -> Tensor:
        W_enc_T, b_enc, W_dec, b_dec = weights
        top_acts, top_indices, index = ops.encode_topk(
            x, W_enc_T, b_enc, problem.shape.k, b_dec=b_dec, precision="bf16", return_index=True
        )
        return ops.decode_loss(top_acts, top_indices, W_dec, b_dec, x, index=index, precision="bf16")[0]

    return Step(loss, weights, lambda value, x: value)


def sparsify(problem: Problem) -> Step:
    """EleutherAI sparsify (eai-sparsify): autocasts by itself, trains on the fraction of variance unexplained."""
    from sparsify import SparseCoder, SparseCoderConfig

    shape, (W_enc_T, b_enc, W_dec, b_dec) = problem.shape, problem.weights
    config = SparseCoderConfig(num_latents=shape.d_sae, k=shape.k)
    coder = SparseCoder(shape.d_in, config, device=W_dec.device, dtype=torch.float32)
    _load(((coder.encoder.weight, W_enc_T), (coder.encoder.bias, b_enc), (coder.W_dec, W_dec), (coder.b_dec, b_dec)))

    def variance(x: Tensor) -> float:
        return float((x - x.mean(0)).square().sum())

    return Step(lambda x: coder(x).fvu, _state(coder), lambda value, x: value * variance(x))


def sae_lens(problem: Problem) -> Step:
    """SAELens: the forward pass of its trainer in bf16 autocast, without rescaling by the norms of the decoder."""
    from sae_lens.saes.sae import TrainStepInput
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

    shape, (W_enc_T, b_enc, W_dec, b_dec) = problem.shape, problem.weights
    config = TopKTrainingSAEConfig(
        d_in=shape.d_in,
        d_sae=shape.d_sae,
        k=shape.k,
        dtype="float32",
        device=str(W_dec.device),
        apply_b_dec_to_input=True,
        rescale_acts_by_decoder_norm=False,
    )
    sae = TopKTrainingSAE(config)
    _load(((sae.W_enc, W_enc_T.T), (sae.b_enc, b_enc), (sae.W_dec, W_dec), (sae.b_dec, b_dec)))

    def loss(x: Tensor) -> Tensor:
        step = TrainStepInput(
            sae_in=x, coefficients={}, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False
        )
        with _bf16(x.device):
            return sae.training_forward_pass(step).loss

    return Step(loss, _state(sae), _sum_per_token)


def dictionary_learning(problem: Problem) -> Step:
    """dictionary_learning: the loss of its TopKTrainer in bf16 autocast."""
    from dictionary_learning.trainers.top_k import TopKTrainer

    shape, (W_enc_T, b_enc, W_dec, b_dec) = problem.shape, problem.weights
    with torch.device(W_dec.device):
        trainer = TopKTrainer(
            steps=100_000,
            activation_dim=shape.d_in,
            dict_size=shape.d_sae,
            k=shape.k,
            layer=0,
            lm_name="none",
            auxk_alpha=0,
            device=str(W_dec.device),
        )
    sae = trainer.ae
    _load(((sae.encoder.weight, W_enc_T), (sae.encoder.bias, b_enc), (sae.decoder.weight, W_dec.T), (sae.b_dec, b_dec)))

    def loss(x: Tensor) -> Tensor:
        with _bf16(x.device):
            return trainer.loss(x, step=0)

    return Step(loss, _state(sae), _sum_per_token)


def openai(problem: Problem) -> Step:
    """OpenAI sparse_autoencoder: fp16 autocast with a loss scale, as its training loop has it."""
    from sparse_autoencoder import train
    from sparse_autoencoder.kernels import mse

    if train.sharded_topk.__name__ == "sharded_topk":
        sharded_topk = train.sharded_topk

        def topk_on_one_gpu(x: Tensor, k: int, sh_comm: Any, capacity_factor: Any = None) -> tuple[Tensor, Tensor]:
            # on one GPU sh_comm is None, and the original asks None for its size when a capacity factor is given
            return sharded_topk(x, k, sh_comm, None if sh_comm is None else capacity_factor)

        train.sharded_topk = topk_on_one_gpu
    shape, (W_enc_T, b_enc, W_dec, b_dec) = problem.shape, problem.weights
    with torch.device(W_dec.device):
        sae = train.FastAutoencoder(shape.d_sae, shape.d_in, shape.k, auxk=None, dead_steps_threshold=10**9)
    _load(((sae.encoder.weight, W_enc_T), (sae.latent_bias, b_enc), (sae.decoder.weight, W_dec.T)))
    _load(((sae.pre_bias, b_dec),))

    def loss(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.float16):
            return mse(sae(x)[0], x)

    return Step(loss, _state(sae), lambda value, x: value * x.numel(), loss_scale=2.0**16)


OURS: dict[str, Callable[[Problem], Step]] = {"forward_backward_master": flashsae_master}
PEERS: dict[str, tuple[str, Callable[[Problem], Step]]] = {
    "dense PyTorch": ("torch", dense),
    "sparsify": ("sparsify", sparsify),
    "dictionary_learning": ("dictionary_learning", dictionary_learning),
    "SAELens": ("sae_lens", sae_lens),
    "OpenAI": ("sparse_autoencoder", openai),
}


def available_peers() -> dict[str, Callable[[Problem], Step]]:
    """Return the peers whose module is installed."""
    return {name: build for name, (module, build) in PEERS.items() if importlib.util.find_spec(module)}


def step_case(name: str, problem: Problem, step: Step, ours_ms: Callable[[], float | None]) -> Case:
    """Return forward and backward of one implementation; a loss unlike that of the dense float32 code is an error."""
    trained = [t for t in step.state if t.requires_grad]

    def run(i: int) -> Tensor:
        for parameter in trained:
            parameter.grad = None
        loss = step.loss(problem.x(i))
        (loss * step.loss_scale).backward()
        return loss

    def check() -> str:
        x = problem.xs[0]
        code = dense_code(problem, 0)
        x_hat = F.embedding_bag(code.top_indices, problem.W_dec, per_sample_weights=code.top_acts, mode="sum")
        want = float((x_hat + problem.b_dec - x).square().sum())
        got = step.squared_error(float(run(0).detach()), x)
        missing = [tuple(p.shape) for p in trained if p.grad is None or not bool(p.grad.isfinite().all())]
        wrong = f"no finite gradient for parameters of shapes {missing}. " if missing else ""
        close = abs(got - want) <= 4 * TOLERANCE["bf16"] * want
        return wrong + ("" if close else f"squared error: expected about {want:.6g}, got {got:.6g}. ")

    def figures(ms: float) -> dict[str, Any]:
        shape, ours = problem.shape, ours_ms()
        found = tflops(2.0 * shape.batch_tokens * shape.d_in * (shape.d_sae + 4 * shape.k))(ms)
        return found if ours is None else found | {"ratio_to_ours": ms / ours}

    return Case(name, run, check, (problem.xs[0], *step.state), figures)
