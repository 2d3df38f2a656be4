"""Compare certified float32 selection with float64, latent by latent: `python -m benchmarks.certified [CACHE]`.

A selected latent is right if it is among the k largest of float64. If not, it lies below the k-th of float64 by no more
than float32 can round (counted as a tie), or it is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import cyclopts
import torch
from torch import Tensor

from benchmarks.session import RESULTS, provenance
from flashsae.data.acts import only_site
from flashsae.data.cache import ActivationCache
from flashsae.data.shuffle import RowShuffle
from flashsae.ops.encode.keys import Keys
from flashsae.ops.encode.launch import Layout, launch_encode_topk
from flashsae.sae.config import SAEConfig
from flashsae.sae.module import SAE
from flashsae.train import TrainConfig, init_state, train

WORKSPACE_BYTES = 512 << 20


def judge(x: Tensor, W: Tensor, b: Tensor, k: int) -> dict[str, float]:
    """Count picks that agree with float64, ties inside float32 rounding, and wrong ones, over the tokens of x."""
    d = x.shape[1]
    candidates = torch.empty(len(x), dtype=torch.int32, device=x.device)
    _, picked = launch_encode_topk(x, W, Keys(b), k, "float32", [WORKSPACE_BYTES, 0], candidates)
    ties = wrong = 0
    for rows in torch.split(torch.arange(len(x), device=x.device), max(1, (1 << 28) // len(W))):
        exact = x[rows].double() @ W.double().T + b.double()
        kth = exact.topk(k, dim=1).values[:, -1:]
        below = kth - exact.gather(1, picked[rows])
        norms = x[rows].double().norm(dim=1, keepdim=True) * W.double().norm(dim=1)[picked[rows]]
        # both the pick and the latent that it displaced were rounded
        rounding = 2 * ((d / 128 + 32) * 2.0**-23 * norms.amax(1, keepdim=True) + 2.0**-23 * kth.abs() + 1e-44)
        ties += int(((below > 0) & (below <= rounding)).sum())
        wrong += int((~(below <= rounding)).sum())
    assert bool((picked.diff(dim=1) > 0).all()), "indices must ascend"
    capacity = Layout.of(len(W), k).capacity
    return {
        "selected": picked.numel(),
        "ties": ties,
        "wrong": wrong,
        "candidates_mean": candidates.float().mean().item(),
        "candidates_max": int(candidates.max()),
        "rows_redone": int((candidates > capacity).sum()),
        "tokens": len(x),
    }


def random_case(B: int, d: int, n: int, k: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, int]:
    """Return normal tokens and unit weight rows."""
    g = torch.Generator(device).manual_seed(seed)
    W = torch.nn.functional.normalize(torch.randn(n, d, device=device, generator=g), dim=1)
    x = torch.randn(B, d, device=device, generator=g)
    return x, W, torch.randn(n, device=device, generator=g) * 0.1, k


def adversarial_cases(device: torch.device) -> Iterator[tuple[str, tuple[Tensor, Tensor, Tensor, int]]]:
    """Yield inputs made to break a bound: near ties, huge and tiny norms, cancellation, denormals, outliers."""
    B, d, n, k = 2048, 768, 16384, 64
    g = torch.Generator(device).manual_seed(99)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=g)

    x, W, b, _ = random_case(B, d, n, k, 7, device)
    zero = torch.zeros_like(b)
    yield "near ties", (x, W[: n // 8].repeat(8, 1) * (1 + 1e-7 * noise(n, 1)), zero, k)
    yield "huge norms", (x * 10.0 ** (8 * noise(B, 1)).clamp(-15, 15), W * 10.0 ** noise(n, 1), zero, k)
    offset = 1000 * noise(1, d)
    yield "cancellation", (x + offset, W, -(offset @ W.T)[0], k)
    yield "denormals", (x * 1e-40, W, zero, k)
    spikes = torch.where(torch.rand(B, d, device=device, generator=g) < 0.004, 3000.0, 1.0)
    yield "outliers", (x * spikes, W, b, k)
    yield "bias decides", (x * 1e-3, W, noise(n), k)


def trained_case(cache: Path, device: torch.device) -> tuple[Tensor, Tensor, Tensor, int]:
    """Train an SAE on cached activations, and return other tokens with its encoder."""
    source = ActivationCache(cache)
    config = TrainConfig(d_sae=8192, k=32, tokens=1024 * 600, batch_tokens=1024).resolve(source.d_in)
    state = init_state(config, RowShuffle(source, 1024, seed=0), device)
    sae: SAE = train(state, config)
    assert isinstance(sae.config, SAEConfig)
    shuffled = RowShuffle(source, 1024, seed=1)
    x = torch.cat([only_site(shuffled.next_batch()) for _ in range(16)]).to(device, torch.float32)
    return x - sae.b_dec.detach(), sae.W_enc_T.detach(), sae.b_enc.detach(), config.arch.k


def main(cache: Path | None = None, *, out: Path = RESULTS / "certified.jsonl") -> None:
    """Judge random, adversarial and (with a cache of activations) trained inputs; append a JSON line each.

    Args:
        cache: folder that `flashsae cache` wrote.
        out: JSON lines file.
    """
    device = torch.device("cuda")
    out.parent.mkdir(parents=True, exist_ok=True)
    shapes = {(768, 24576, 64): 10, (2048, 32768, 64): 6, (4096, 65536, 64): 5, (4096, 131072, 128): 2}
    cases: list[tuple[str, list[dict[str, float]]]] = []
    for (d, n, k), repeats in shapes.items():
        found = [judge(*random_case(8192, d, n, k, seed, device)) for seed in range(repeats)]
        cases.append((f"random d={d} n={n} k={k}", found))
    cases += [(name, [judge(*case)]) for name, case in adversarial_cases(device)]
    if cache is not None:
        cases.append(("trained d=384 n=8192 k=32", [judge(*trained_case(cache, device))]))
    with out.open("a") as file:
        for name, found in cases:
            total = {key: sum(f[key] for f in found) for key in ("selected", "ties", "wrong", "rows_redone", "tokens")}
            total["candidates_mean"] = sum(f["candidates_mean"] for f in found) / len(found)
            total["candidates_max"] = max(f["candidates_max"] for f in found)
            print(name, total)
            file.write(json.dumps({"case": name, **total, **provenance(device)}) + "\n")


if __name__ == "__main__":
    cyclopts.run(main)
