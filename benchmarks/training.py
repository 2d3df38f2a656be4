"""Train beside the dense SAE, same seed and data, and keep the loss curves: tier T4.

`python -m benchmarks.training CACHE` needs a cache from `flashsae cache`. Arms: dense autograd in float64, dense
autograd in float32 (TF32 off), ours in certified float32, and behind an 8-bit screen; then dense bf16 autocast, ours in
bf16, and behind an 8-bit screen. What separates the dense float32 arm from the float64 one is what rounding explains;
ours must stay within the same distance.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import cyclopts
import torch
from torch import Tensor

from benchmarks.session import RESULTS, provenance
from flashsae import ops
from flashsae.data.acts import only_site
from flashsae.data.cache import ActivationCache
from flashsae.data.shuffle import RowShuffle
from flashsae.ops.encode import screen
from flashsae.ops.validate import Precision
from flashsae.optim import lr_factor
from flashsae.sae.config import SAEConfig
from flashsae.sae.losses import token_variance
from flashsae.sae.module import SAE
from flashsae.testing import DenseTrainer, dense_decode

CURVES = (
    "dense float64", "dense float32", "flashsae float32", "flashsae float32-int8",
    "dense bf16 autocast", "flashsae bf16", "flashsae bf16-int8",
)  # fmt: skip
"""The arms, by implementation and precision."""
OUR_PRECISIONS: dict[str, Precision] = {
    "flashsae float32": "float32", "flashsae float32-int8": "float32-int8",
    "flashsae bf16": "bf16", "flashsae bf16-int8": "bf16-int8",
}  # fmt: skip
"""Those of our arms."""
LR = 1e-3


def our_fvu(trainer: DenseTrainer, x: Tensor, k: int, variance: float, precision: Precision, step: int) -> Tensor:
    """Return the loss through `flashsae.ops`, of the parameters that a dense trainer holds and updates."""
    p, noise = trainer.params, torch.tensor(step, device=x.device)
    code = ops.encode_topk(x, p["W_enc_T"], p["b_enc"], k, b_dec=p["b_dec"], precision=precision, noise=noise)
    decoded = ops.decode_loss(code.replace(code.acts.relu()), p["W_dec"], p["b_dec"], x, precision=precision)
    return decoded.loss / (len(x) * variance)


def train(arm: str, batches: list[Tensor], scale: float, sample: Tensor, config: SAEConfig) -> list[float]:
    """Train with Adam, unit-norm decoder and projected gradient; return the loss of each step.

    As `flashsae.train` defines it: relative to the variance of a token in a sample.
    """
    device = batches[0].device
    sae = SAE(config, seed=0).to(device)
    with torch.no_grad():
        sae.b_dec.copy_(sample.mean(0) * scale)
    variance, curve = token_variance(sample * scale), []
    dtype = torch.float64 if arm.endswith("float64") else torch.float32
    params = {name: parameter.to(dtype) for name, parameter in sae.named_parameters()}
    trainer = DenseTrainer(params, LR, variance, k=config.k, topk=torch.topk)
    for step, batch in enumerate(batches):
        x = (batch * scale).to(dtype)
        if arm in OUR_PRECISIONS:
            fvu = our_fvu(trainer, x, config.k, variance, OUR_PRECISIONS[arm], step)
        else:
            with torch.autocast(device.type, torch.bfloat16, enabled=arm.endswith("autocast")):
                x_hat = dense_decode(trainer.encode(x), trainer.params)
            fvu = (x - x_hat).square().sum() / (len(x) * variance)
        trainer.update(fvu, LR * lr_factor(step, len(batches), 30, 60))
        curve.append(fvu.detach())
    return torch.stack(curve).tolist()


def main(
    cache: Path, *, d_sae: int = 8192, k: int = 32, steps: int = 300, batch_tokens: int = 1024,
    out: Path = RESULTS / "training.jsonl",
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
    with screen.always():
        curves = {name: train(name, batches, scale, sample, config) for name in CURVES}
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
                json.dumps(
                    {"arm": name, **asdict(config), "batch_tokens": batch_tokens, "fvu": curve, **provenance(device)}
                )
                + "\n"
            )


if __name__ == "__main__":
    cyclopts.run(main)
