"""Train beside the dense SAE, same seed and data, and keep the loss curves: tier T4.

`python -m benchmarks.training CACHE` needs a cache from `flashsae cache`. Arms: dense autograd in float64, dense
autograd in float32 (TF32 off), ours in certified float32; then dense bf16 autocast and ours in bf16. What separates the
dense float32 arm from the float64 one is what rounding explains; ours must stay within the same distance.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import cyclopts
import torch
from torch import Tensor

from benchmarks.measure import facts
from flashsae import ops
from flashsae.data.acts import only_site
from flashsae.data.cache import ActivationCache
from flashsae.data.shuffle import RowShuffle
from flashsae.optim import lr_factor
from flashsae.sae.losses import token_variance
from flashsae.sae.module import SAE, SAEConfig

Params = dict[str, Tensor]
Loss = Callable[[Tensor, Params, int], Tensor]


def dense_loss(x: Tensor, p: Params, k: int) -> Tensor:
    """Return the summed squared error of a dense TopK SAE."""
    pre_acts = (x - p["b_dec"]) @ p["W_enc_T"].T + p["b_enc"]
    values, indices = pre_acts.topk(k, dim=1)
    latent_acts = torch.zeros_like(pre_acts).scatter(1, indices, values.relu())
    return (latent_acts @ p["W_dec"] + p["b_dec"] - x).float().square().sum()


def dense_double_loss(x: Tensor, p: Params, k: int) -> Tensor:
    """Return the same, in float64 throughout."""
    pre_acts = (x - p["b_dec"]) @ p["W_enc_T"].T + p["b_enc"]
    values, indices = pre_acts.topk(k, dim=1)
    latent_acts = torch.zeros_like(pre_acts).scatter(1, indices, values.relu())
    return (latent_acts @ p["W_dec"] + p["b_dec"] - x).square().sum()


def autocast_loss(x: Tensor, p: Params, k: int) -> Tensor:
    """Return the loss of the dense SAE in bf16 autocast over float32 weights."""
    with torch.autocast(x.device.type, torch.bfloat16):
        return dense_loss(x, p, k)


def our_loss(precision: str) -> Loss:
    """Return the loss through `flashsae.ops`."""

    def loss(x: Tensor, p: Params, k: int) -> Tensor:
        top_acts, top_indices, index = ops.encode_topk(
            x, p["W_enc_T"], p["b_enc"], k, b_dec=p["b_dec"], precision=precision, return_index=True
        )
        return ops.decode_loss(top_acts, top_indices, p["W_dec"], p["b_dec"], x, index=index, precision=precision).loss

    return loss


ARMS: dict[str, tuple[Loss, torch.dtype]] = {
    "dense float64": (dense_double_loss, torch.float64),
    "dense float32": (dense_loss, torch.float32),
    "flashsae float32": (our_loss("float32"), torch.float32),
    "dense bf16 autocast": (autocast_loss, torch.float32),
    "flashsae bf16": (our_loss("bf16"), torch.float32),
}


def train(
    loss_of: Loss, batches: list[Tensor], scale: float, sample: Tensor, config: SAEConfig, dtype: torch.dtype
) -> list[float]:
    """Train with Adam, unit-norm decoder and projected gradient; return the loss of each step.

    As `flashsae.train` defines it: relative to the variance of a token in a sample.
    """
    device = batches[0].device
    sae = SAE(config, seed=0).to(device)
    with torch.no_grad():
        sae.b_dec.copy_(sample.mean(0) * scale)
    variance = token_variance(sample * scale)
    params = {name: p.detach().to(dtype).requires_grad_() for name, p in sae.named_parameters()}
    adam = torch.optim.Adam(params.values(), lr=1e-3, eps=6.25e-10)
    W_dec, curve = params["W_dec"], []
    for step, batch in enumerate(batches):
        x = (batch * scale).to(dtype)
        fvu = loss_of(x, params, config.k) / (len(x) * variance)
        adam.zero_grad()
        fvu.backward()
        with torch.no_grad():
            W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
            adam.param_groups[0]["lr"] = 1e-3 * lr_factor(step, len(batches), 30, 60)
            adam.step()
            W_dec /= W_dec.norm(dim=1, keepdim=True)
        curve.append(fvu.detach())
    return torch.stack(curve).tolist()


def main(
    cache: Path, *, d_sae: int = 8192, k: int = 32, steps: int = 300, batch_tokens: int = 1024,
    out: Path = Path("benchmarks/results/training.jsonl"),
) -> None:  # fmt: skip
    """Train every arm on the same cached activations and append one JSON line each.

    Args:
        cache: folder that `flashsae cache` wrote.
        d_sae: number of latents.
        k: latents kept for each token.
        steps: of Adam.
        batch_tokens: tokens of each.
        out: JSON lines file.
    """
    torch.set_float32_matmul_precision("highest")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = ActivationCache(cache)
    shuffled = RowShuffle(source, batch_tokens, seed=0)
    batches = [only_site(shuffled.next_batch()).to(device, torch.float32) for _ in range(steps)]
    sample = torch.cat(batches[:8])
    scale = float((sample.shape[1] ** 0.5) / (4 * (sample - sample.mean(0)).square().sum(1).mean().sqrt()))
    config = SAEConfig(source.d_in, d_sae, k)
    curves = {name: train(loss, batches, scale, sample, config, dtype) for name, (loss, dtype) in ARMS.items()}
    exact = curves["dense float64"]
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a") as file:
        for name, curve in curves.items():
            distance = [abs(a - b) / b for a, b in zip(curve, exact)]
            print(
                f"{name:20s} FVU at the end {sum(curve[-20:]) / 20:.6f}; relative distance from float64: "
                f"first 50 steps {max(distance[:50]):.2e}, all {max(distance):.2e}, last 20 mean "
                f"{sum(distance[-20:]) / 20:.2e}"
            )
            file.write(
                json.dumps({"arm": name, **asdict(config), "batch_tokens": batch_tokens, "fvu": curve, **facts(device)})
                + "\n"
            )


if __name__ == "__main__":
    cyclopts.run(main)
