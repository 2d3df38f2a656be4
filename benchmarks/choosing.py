"""Held-out FVU by learning rate and batch, at the same tokens: `python -m benchmarks.choosing ACTIVATIONS`.

Rates are multiples of 1 / √(d_sae / 2¹⁴): the literature's constant is 2e-4, ours 8e-4. `--only jump_relu,relu` does
the same for other architectures, at the middle sparsity of `benchmarks.pareto`. What is in the file of results already
is not trained again. `python -m benchmarks.plots` writes the tables of docs/choosing.md.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cyclopts
import torch
from torch import Tensor

import flashsae
from benchmarks.pareto import SPARSITIES, TRAININGS, Training, read_activations
from benchmarks.session import RESULTS, provenance
from flashsae.bench.measure import Record

RATES = (2e-4, 4e-4, 8e-4, 1.6e-3)
"""Of 2¹⁴ latents."""
BATCHES = (1024, 2048, 4096, 8192)
SAME_RUN = ("arch", "settings", "rate", "batch_tokens", "tokens", "d_sae", "train_tokens", "seed", "on")
"""What two results of one training share."""
CHOOSING_TEXT = """MiniLM's {site} ({d_in} wide) reading the documentation of Python: {train_tokens:,} tokens to train
on, {held_out_tokens:,} held out. d_sae {d_sae:,}, {tokens:,} tokens in all. Each cell: held-out FVU (latents active on
no held-out token, and L0 where it is not that of every token)."""


def train_at(
    line: Training, rate: float, batch_tokens: int, data: tuple[Tensor, Tensor], config: Mapping[str, Any],
    done: Sequence[Record],
) -> Record | None:  # fmt: skip
    """Train and measure one SAE; None if that was done before.

    Args:
        line: architecture and settings.
        rate: learning rate of 2¹⁴ latents.
        batch_tokens: tokens in a step.
        data: activations to train on, and held out.
        config: d_sae, tokens and seed.
        done: records of before.
    """
    train, held_out = data
    settings = dict(line.settings(SPARSITIES[1]))
    record: Record = {
        "group": "choosing", "arch": line.arch, "settings": settings, "rate": rate, "batch_tokens": batch_tokens,
        **config, "train_tokens": len(train), "site": line.sites[0],
        "on": "cuda" if torch.cuda.is_available() else "cpu",
    }  # fmt: skip
    if any(all(other.get(name) == record[name] for name in SAME_RUN) for other in done):
        return None
    lr = rate / math.sqrt(config["d_sae"] / 2**14)
    started = time.perf_counter()
    sae = flashsae.fit(train, arch=line.arch, lr=lr, batch_tokens=batch_tokens, progress=False, **config, **settings)
    seconds = time.perf_counter() - started
    found = flashsae.evaluate(sae, held_out)
    return record | {
        "d_in": sae.config.d_in, "fvu": round(found.fvu, 6), "l0": round(found.l0, 3), "seconds": round(seconds, 2),
        "never_active": int((found.latent_density == 0).sum()), "held_out_tokens": found.tokens,
    }  # fmt: skip


def choosing_text(records: Sequence[Record]) -> str:
    """Return a table of every architecture and number of tokens that was tried; "" without results."""
    tables: dict[str, dict[tuple[float, int], Record]] = {}
    for record in records:
        of_table = {name: record[name] for name in SAME_RUN if name not in ("rate", "batch_tokens")}
        tables.setdefault(json.dumps(of_table), {})[record["rate"], record["batch_tokens"]] = record
    return "\n\n".join(_table(found) for found in tables.values())


def _table(found: Mapping[tuple[float, int], Record]) -> str:
    one = next(iter(found.values()))
    rates, batches = sorted({rate for rate, _ in found}), sorted({batch for _, batch in found})
    cells = [
        ["lr · √(d_sae / 2¹⁴)", *(f"{batch:,} a step" for batch in batches)],
        ["--:"] * (len(batches) + 1),
        *([f"{rate:.1e}", *(_cell(found.get((rate, batch))) for batch in batches)] for rate in rates),
    ]
    settings = ", ".join(f"{name} {value}" for name, value in one["settings"].items())
    title = f"**`{one['arch']}`" + (f", {settings}**" if settings else "**")
    about = "; ".join(dict.fromkeys(f"{r['gpu']}, torch {r['torch']}, commit {r['commit']}" for r in found.values()))
    rows = "\n".join(f"| {' | '.join(row)} |" for row in cells)
    return f"{title}\n\n{CHOOSING_TEXT.format(**one)} {about}.\n\n{rows}"


def _cell(record: Record | None) -> str:
    if record is None:
        return ""
    l0 = "" if record["settings"].get("k") == record["l0"] else f", {record['l0']:.1f}"
    return f"{record['fvu']:.4f} ({record['never_active']}{l0})"


def main(
    activations: Path, *, d_sae: int = 4096, tokens: int = 4_000_000, seed: int = 0, only: str = "topk",
    rates: tuple[float, ...] = RATES, batches: tuple[int, ...] = BATCHES, seconds: float = float("inf"),
    out: Path = RESULTS / "choosing.jsonl",
) -> None:  # fmt: skip
    """Train at every learning rate and batch, append one JSON line each, and print the tables.

    Args:
        activations: folder of a cache of the output of layer 2, such as `flashsae cache` writes.
        d_sae, tokens, seed: of each training; whatever else there is has the default of the architecture.
        only: names of architectures, by comma.
        rates: learning rates of 2¹⁴ latents. May be repeated.
        batches: tokens in a step. May be repeated.
        seconds: start no training after so many.
        out: JSON lines file.
    """
    started = time.perf_counter()
    out.parent.mkdir(parents=True, exist_ok=True)
    records = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    about = provenance(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    config = {"d_sae": d_sae, "tokens": tokens, "seed": seed}
    for line in (line for line in TRAININGS if line.arch in only.split(",")):
        acts, site = read_activations(activations, line.sites), line.sites[0]
        data = acts.train[site], acts.held_out[site]
        for batch_tokens, rate in ((batch, rate) for batch in batches for rate in rates):
            if time.perf_counter() - started > seconds:
                print(f"{seconds:.0f} seconds are over: {line.arch} at {rate} and {batch_tokens} is left out")
                continue
            record = train_at(line, rate, batch_tokens, data, config, records)
            if record is not None:
                records.append(record | about)
                with out.open("a") as file:
                    file.write(json.dumps(records[-1]) + "\n")
    print(choosing_text(records))


if __name__ == "__main__":
    cyclopts.run(main)
