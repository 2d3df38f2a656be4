"""Compare certified selections with float64, latent by latent: `python -m benchmarks.certified [CACHE]`.

A selected latent is right if it is among the k largest of float64 (of a batch: the B·k largest; above a threshold: if
it exceeds that). If not, it lies below by no more than float32 can round (counted as a tie), or it is wrong. So is a
value that differs by more, an order that does not ascend, and a tie of equal latents that the lowest does not win.
Anything wrong ends the program with exit code 1.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import cyclopts
import torch
from torch import Tensor

from benchmarks.certified_cases import Selected, adversarial_cases, draw, trained_case
from benchmarks.certified_exact import AT_ONCE, Exact, broken_ties
from benchmarks.session import RESULTS, provenance
from flashsae.ops.encode import screen
from flashsae.ops.encode.launch import Layout, launch_encode_topk
from flashsae.ops.select.above import above
from flashsae.ops.select.batch import batch_topk

MEMORY = [512 << 20, 0]

RANDOM = {(768, 24576, 64): 80, (2048, 32768, 64): 80, (4096, 65536, 64): 24, (4096, 131072, 64): 12}
"""Batches of 8192 tokens of each d_in, d_sae and k: 100 million picks."""

WIDTHS = (4096, 16384, 65536)
"""Latents of the SAEs that are trained."""

Certified = Literal["float32", "float32-int8", "bf16-int8"]
Found = dict[str, float]


def judge(of: Selected, precision: str, noise: Tensor) -> Found:
    """Count picks of the k largest of a token that agree with float64, ties inside float32 rounding, and wrong ones."""
    candidates = torch.empty(len(of.x), dtype=torch.int32, device=of.x.device)
    acts, picked = launch_encode_topk(of.x, of.W, of.keys, of.k, precision, MEMORY, candidates, noise)
    exact, ties = Exact(of, precision), 0
    wrong = int((picked.diff(dim=1) <= 0).sum()) + broken_ties(picked, len(of.W), of.copies)
    for rows in exact.parts():
        block, chosen = exact.of(rows), picked[rows]
        wrong += block.wrong_values(acts[rows], chosen)
        worst = block.keys.gather(1, chosen).amin(1, keepdim=True)
        missed = (block.keys > worst).sum(1) >= of.k  # the other picks are fewer than what exceeds the worst of them
        if bool(missed.any()):
            inside, outside = block.at(missed).misses(chosen[missed])
            ties, wrong = ties + inside, wrong + outside
    return {
        "selected": picked.numel(),
        "ties": ties,
        "wrong": wrong,
        "tokens": len(of.x),
        "candidates_mean": candidates.float().mean().item(),
        "candidates_max": int(candidates.max()),
        "rows_redone": int((candidates > Layout.of(len(of.W), of.k).capacity).sum()),
    }


def judge_batch(of: Selected, precision: str, noise: Tensor) -> Found:
    """Do the same for the B·k largest of a batch, which goes by lower bounds, too."""
    used = torch.zeros(1, dtype=torch.int64, device=of.x.device)
    latents, starts, values = batch_topk(of.x, of.W, of.keys, of.k, precision, MEMORY, used, noise)
    block = Exact(of, precision).of(slice(0, len(of.x)))
    tokens, latents = block.places(starts, latents)
    wrong = int(((tokens * len(of.W) + latents).diff() <= 0).sum()) + block.wrong_values(values, latents, tokens)
    inside, outside = block.misses_of_batch(tokens, latents)
    return {
        "selected": len(latents), "ties": inside, "wrong": wrong + outside, "tokens": len(of.x),
        "candidates_mean": int(used) / len(of.x),
    }  # fmt: skip


def judge_above(of: Selected, precision: str, noise: Tensor) -> Found:
    """Do the same for all above a threshold, one that about k latents a token exceed and one of them equals."""
    block = Exact(of, precision).of(slice(0, len(of.x)))
    threshold = block.pre_acts.flatten().topk(len(of.x) * of.k).values[-1:].float()
    b_enc = of.keys.b_enc
    latents, starts, values, count = above(of.x, of.W, b_enc, threshold, None, precision, MEMORY, noise=noise)
    tokens, latents = block.places(starts, latents)
    wrong = int(((tokens * len(of.W) + latents).diff() <= 0).sum()) + block.wrong_values(values, latents, tokens)
    inside, outside = block.misses_of_threshold(tokens, latents, threshold.double())
    wrong += outside + int(count != len(latents))
    return {"selected": len(latents), "ties": inside, "wrong": wrong, "tokens": len(of.x)}


JUDGES: dict[str, Callable[[Selected, str, Tensor], Found]] = {
    "topk": judge,
    "batch_topk": judge_batch,
    "above": judge_above,
}


def cases(
    cache: Path | None, device: torch.device, *, small: bool
) -> Iterator[tuple[str, Callable[[], Selected], tuple[str, ...]]]:
    """Yield the name of a case, what makes it, and what selects from it."""
    for (d, n, k), repeats in ({(24, 300, 4): 2} if small else RANDOM).items():
        B, name = 17 if small else 8192, f"random d={d} n={n} k={k}"
        for seed in range(repeats):
            yield name, draw(B, d, n, k, seed, device).random, ("topk",)
        yield name, draw(max(9, B // 4), d, n, k, 99, device).random, ("batch_topk", "above")
    for name, case in adversarial_cases(draw(*((9, 24, 320, 5) if small else (2048, 768, 16384, 64)), 99, device)):
        by_value = case.keys.scale is None and not case.keys.magnitude
        yield name, lambda case=case: case, tuple(JUDGES) if by_value else ("topk", "batch_topk")  # type: ignore[misc]
    if cache is not None:
        for d_sae in WIDTHS:
            yield f"trained n={d_sae} k=32", partial(trained_case, cache, d_sae, device), tuple(JUDGES)


def main(
    cache: Path | None = None, *, precision: Certified = "float32", only: str = "", small: bool = False,
    device: str = "cuda", out: Path = RESULTS / "certified.jsonl",
) -> None:  # fmt: skip
    """Judge random, adversarial and (with a cache of activations) trained inputs; append a JSON line each.

    Args:
        cache: folder that `flashsae cache` wrote.
        precision: of the selection; of "bf16-int8" exact is what float64 makes of operands rounded to bfloat16.
        only: regular expression, found in the names of cases to judge.
        small: tiny inputs, to try the program.
        device: where to select.
        out: JSON lines file.
    """
    started, found = time.perf_counter(), dict[tuple[str, str], list[Found]]()
    for number, (name, make, selects) in enumerate(cases(cache, torch.device(device), small=small)):
        if re.search(only, name):
            case, noise = make(), torch.tensor(number, device=device)
            for how in selects:
                part = case if how == "topk" else replace(case, x=case.x[: AT_ONCE // len(case.W)])
                with screen.always():
                    found.setdefault((name, how), []).append(JUDGES[how](part, precision, noise))
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a") as file:
        for (name, how), parts in found.items():
            total = {key: sum(part[key] for part in parts) for key in parts[0]}
            if "candidates_mean" in total:
                total["candidates_mean"] /= len(parts)
            if "candidates_max" in total:
                total["candidates_max"] = max(part["candidates_max"] for part in parts)
            print(f"{how}, {name}: {total}")
            head = {"case": name, "selects": how, "precision": precision}
            file.write(json.dumps(head | total | provenance(torch.device(device))) + "\n")
    picks, wrong = (int(sum(part[key] for parts in found.values() for part in parts)) for key in ("selected", "wrong"))
    print(f"{precision}: {picks:,} picks, {wrong} wrong, {time.perf_counter() - started:.0f} s")
    if wrong or not picks:
        raise SystemExit(f"{precision}: {wrong} of {picks} picks are wrong.")


if __name__ == "__main__":
    cyclopts.run(main)
