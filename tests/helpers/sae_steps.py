"""A step of a whole SAE, and the same by its dense oracle: terms of the loss, latent_acts, and every gradient."""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from flashsae import SAE, SAEConfig
from flashsae.architecture import architecture_of
from flashsae.sae import DeadRows, Step, fvu_weights
from flashsae.testing import integer_inputs, oracle
from helpers.steps import Tensors

VARIANCE = 4.0


def parameters_of(
    arch: object, B: int, d: int, n: int, generator: torch.Generator, *, integer: bool, dtype: torch.dtype
) -> Tensors:
    """Return x and the parameters that an architecture trains. Integers are -1, 0 and 1."""
    rows = [row for row in architecture_of(arch).parameters if row.trained]
    shapes = {"x": (B, d)} | {row.name: row.sizes({"d_in": d, "d_out": d, "d_sae": n}) for row in rows}
    if integer:
        return {
            name: integer_inputs(*shape, generator=generator, largest=1, dtype=dtype) for name, shape in shapes.items()
        }
    return {name: torch.randn(*shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def sae_of(arch: object, inputs: Tensors, **buffers: float) -> SAE:
    """Return the SAE with these parameters, in training."""
    n, d = inputs["W_enc_T"].shape
    sae = SAE(SAEConfig(d, n, arch=arch), dtype=inputs["x"].dtype, device=inputs["x"].device)
    with torch.no_grad():
        for name, value in {**inputs, **{k: torch.tensor(v) for k, v in buffers.items()}}.items():
            if name != "x":
                getattr(sae, name).copy_(value)
    return sae


def step_of(sae: SAE, x: Tensor, dead: Tensor | None = None) -> Step:
    """Return the step of a batch, with latents [d_sae], bool, that count as dead."""
    rows = None
    if dead is not None:
        latents = torch.cat([dead.nonzero()[:, 0], dead.new_zeros(2, dtype=torch.int64)])  # two rows are left over
        slots = torch.where(dead, dead.cumsum(0, dtype=torch.int32) - 1, -1)
        numbers = torch.arange(len(latents), device=dead.device)
        rows = DeadRows(latents, numbers < dead.sum(), slots)
    return Step(sae, x, x, sae.encode(x), fvu_weights(x, VARIANCE), rows)


def our_step(arch: object, inputs: Tensors, capacity: Any = "any", **buffers: float) -> Tensors:
    """Do a step with the operations of the library; with this room where codes vary."""
    sae = sae_of(arch, inputs, **buffers)
    sae.capacity = capacity
    x = inputs["x"].detach().requires_grad_()
    step = step_of(sae, x)
    loss, terms = step.total(SimpleNamespace(auxk_alpha=0.0))
    loss.backward()
    grads = {f"grad {name}": parameter.grad for name, parameter in sae.named_parameters()}
    found = {"loss": loss, **terms, "latent_acts": step.code.to_dense(), "grad x": x.grad, **grads}
    return {name: tensor.detach() for name, tensor in found.items() if tensor is not None}


def dense_step(arch: Any, inputs: Tensors, **numbers: float) -> Tensors:
    """Do the same with dense autograd."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    params = {name: leaf for name, leaf in leaves.items() if name != "x"}
    architecture = architecture_of(arch)
    settings = {**asdict(arch), **numbers}
    weights = {term.name: term.weight_in(arch, SimpleNamespace(auxk_alpha=0.0)) for term in architecture.terms}
    terms = oracle(architecture.name).losses(leaves["x"], params, VARIANCE, **settings)
    terms = {name: value for name, value in terms.items() if weights[name]}
    loss = torch.stack([weights[name] * value for name, value in terms.items()]).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    found = {"loss": loss, **terms, "latent_acts": oracle(architecture.name)(leaves["x"], params, **settings)}
    grads = {f"grad {name}": leaf.grad for name, leaf in leaves.items()}
    return {name: tensor.detach() for name, tensor in {**found, **grads}.items() if tensor is not None}
