"""The whole trainer beside a dense one, same seed and data: tier T4. `python -m benchmarks.trainer CACHE`.

`flashsae.train` with all it does (AuxK, schedule, latent pass, split weights, CUDA graph) against dense autograd with
the same recipe and `torch.optim.Adam`, in float32 (TF32 off) and in bf16 (dense: autocast). The measure is the FVU of
held-out tokens at the end. Training is chaotic, so the dense one runs again with the tokens of each batch in another
order, and again from weights one rounding away: what that changes is no loss of accuracy. Needs a cache from
`flashsae cache`.
"""

from __future__ import annotations

import json
from pathlib import Path

import cyclopts
import torch

from benchmarks.session import RESULTS, provenance
from flashsae.bench.measure import OURS
from flashsae.data.acts import only_site
from flashsae.data.cache import ActivationCache
from flashsae.data.shuffle import RowShuffle
from flashsae.evaluate.heldout import evaluate, held_out_batches
from flashsae.ops.validate import Precision
from flashsae.optim import lr_factor
from flashsae.sae.dead import LEAST_RESIDUAL
from flashsae.sae.module import SAE
from flashsae.testing import DenseTrainer, dense_auxk, dense_decode
from flashsae.train.config import TrainConfig
from flashsae.train.state import TrainState, init_state
from flashsae.train.step import train_step

HELD_OUT = 0.1
AUTOGRAD, REVERSED, NUDGED = "dense", "dense, batches reversed", "dense, start one rounding away"
PRECISIONS: tuple[Precision, ...] = ("float32", "bf16")
ARMS = [(precision, arm) for precision in PRECISIONS for arm in (AUTOGRAD, REVERSED, NUDGED, OURS)]


def start(source: ActivationCache, config: TrainConfig) -> TrainState:
    """Return the state that both begin with."""
    batches = RowShuffle(source, config.batch_tokens, seed=config.seed, window_rows=config.shuffle_tokens)
    return init_state(config, batches, torch.device(config.device))


def ours(source: ActivationCache, config: TrainConfig) -> tuple[SAE, list[float]]:
    """Train as the library does; return the SAE and the FVU of each step."""
    state = start(source, config)
    curve = []
    for _ in range(config.steps):
        batch = {site: x.to(config.device) for site, x in state.batches.next_batch().items()}
        curve.append(train_step(state, batch, config)["fvu"].clone())
    return state.finished_sae().to(config.device), torch.stack(curve).tolist()


def nudge(sae: SAE) -> None:
    """Move every weight by one rounding or none, at random."""
    generator = torch.Generator().manual_seed(0)
    eps = torch.finfo(torch.float32).eps
    with torch.no_grad():
        for parameter in sae.parameters():
            steps = torch.randint(-1, 2, parameter.shape, generator=generator).to(parameter.device)
            parameter.mul_(1 + eps * steps)


def by_autograd(source: ActivationCache, config: TrainConfig, arm: str, *, autocast: bool) -> tuple[SAE, list[float]]:
    """Train the dense SAE with naive autograd; return the SAE and the FVU of each step.

    REVERSED: the tokens of a batch stand in the opposite order, the same mathematics with sums rounded otherwise.
    """
    state = start(source, config)
    sae, curve = state.sae, []
    if arm == NUDGED:
        nudge(sae)
    params = dict(sae.named_parameters())
    trainer = DenseTrainer(params, config.lr, state.variance, k=config.arch.k, topk=torch.topk)
    since_fired = torch.zeros(config.d_sae, dtype=torch.int64, device=config.device)
    decay_steps = round(config.decay_fraction * config.steps)
    for step in range(config.steps):
        x = only_site(state.batches.next_batch()).to(config.device).float() * state.scale
        x = x.flip(0) if arm == REVERSED else x
        dead = since_fired >= config.dead_after_tokens
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            latent_acts = trainer.encode(x)
            residual = x - dense_decode(latent_acts, trainer.params).float()
            loss = fvu = residual.square().sum() / (len(x) * state.variance)
            if bool(dead.any()):
                missed = dense_auxk(x, trainer.params, residual, dead, config.k_aux) / (len(x) * state.variance)
                loss = fvu + config.auxk_alpha * missed / fvu.detach().clamp_min(LEAST_RESIDUAL)
        trainer.update(loss, config.lr * lr_factor(step, config.steps, config.warmup_steps, decay_steps))
        since_fired = (since_fired + len(x)) * ((latent_acts > 0).sum(0) == 0)
        curve.append(fvu.detach())
    with torch.no_grad():
        for name, parameter in params.items():
            parameter.copy_(trainer.params[name])
    sae.precision = None
    return sae.rescaled(state.scale), torch.stack(curve).tolist()


def main(
    cache: Path, *, d_sae: int = 32768, k: int = 32, steps: int = 1000, batch_tokens: int = 1024,
    dead_after_tokens: int = 10_000_000, seeds: int = 8, first_seed: int = 0,
    out: Path = RESULTS / "trainer.jsonl",
) -> None:  # fmt: skip
    """Train every arm on the same cached activations and append one JSON line each.

    Args:
        cache: folder that `flashsae cache` wrote.
        d_sae, k, steps, batch_tokens, dead_after_tokens: of the training. With the default no latent is dead within
            1000 steps; with less, AuxK has something to do.
        seeds, first_seed: how many seeds, and the first; each decides start and order, the same for all arms.
        out: JSON lines file.
    """
    torch.set_float32_matmul_precision("highest")
    source = ActivationCache(cache, held_out=HELD_OUT)
    held_out = list(held_out_batches(source, 1 << 20))

    def settings(precision: Precision, seed: int) -> TrainConfig:
        return TrainConfig(
            d_sae=d_sae, k=k, tokens=steps * batch_tokens, batch_tokens=batch_tokens, precision=precision,
            dead_after_tokens=dead_after_tokens, seed=seed, device="cuda",
        ).resolve(source.d_in)  # fmt: skip

    for seed in range(first_seed, first_seed + seeds):
        reference = 0.0
        for precision, arm in ARMS:
            if arm == OURS:
                sae, curve = ours(source, settings(precision, seed))
            else:
                sae, curve = by_autograd(source, settings("float32", seed), arm, autocast=precision == "bf16")
            result = evaluate(sae, held_out)
            reference = result.fvu if arm == AUTOGRAD else reference
            apart = f"({result.fvu / reference - 1:+.3%})" if arm != AUTOGRAD else ""
            print(f"seed {seed}: {arm:30s} {precision:7s} held-out FVU {result.fvu:.6f} {apart}", flush=True)
            record = {
                "group": "trainer", "arm": arm, "precision": precision, "seed": seed, "d_in": source.d_in,
                "d_sae": d_sae, "k": k, "batch_tokens": batch_tokens, "dead_after_tokens": dead_after_tokens,
                "train_tokens": len(source.split_rows("train")), "held_out_tokens": result.tokens,
                "held_out_fvu": result.fvu,
                "fvu": [round(sum(ten) / 10, 6) for ten in zip(*[iter(curve)] * 10)],  # means of ten steps
            }  # fmt: skip
            with out.open("a") as file:
                file.write(json.dumps(record | provenance(torch.device("cuda"))) + "\n")


if __name__ == "__main__":
    cyclopts.run(main)
