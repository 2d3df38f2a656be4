"""Train from a cache of activations, and see how much of the step's own rate is left: `python -m benchmarks.pipeline`.

Writes a cache of random activations to a folder (it should lie in the page cache: it was just written), trains on it
exactly as `flashsae train` does, and compares tokens a second with steps whose batch lies on the device already.
Appends one JSON line, and writes a trace of some steps for chrome://tracing or ui.perfetto.dev.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import cyclopts
import safetensors.torch
import torch
from rich.console import Console
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import facts
from flashsae.data.cache import TOKENS_FOLDER, ActivationCache, CacheIndex, shard_path
from flashsae.data.shuffle import RowShuffle
from flashsae.train.callbacks import Callback, JsonlLog
from flashsae.train.config import TrainConfig
from flashsae.train.loop import TrainState, init_state, train, train_step

RESULTS = Path(__file__).parent / "results"


def write_random_cache(folder: Path, d_in: int, rows: int, shard_rows: int = 32768) -> None:
    """Write a cache of random activations in the format of docs/formats.md."""
    settings = {"model": "random", "dataset": "random", "hookpoints": {"random": d_in}, "dtype": "bfloat16"}
    shards = [min(shard_rows, rows - start) for start in range(0, rows, shard_rows)]
    for kind in (TOKENS_FOLDER, "random"):
        (folder / kind).mkdir(parents=True)
    for number, n in enumerate(shards):
        group = torch.arange(n) + number * shard_rows
        tokens = {"token_ids": torch.zeros(n, dtype=torch.int32), "position": torch.zeros(n, dtype=torch.int32)}
        acts = {"activations": torch.randn(n, d_in, generator=torch.Generator().manual_seed(number)).bfloat16()}
        safetensors.torch.save_file({**tokens, "group": group}, shard_path(folder, TOKENS_FOLDER, number))
        safetensors.torch.save_file(acts, shard_path(folder, "random", number))
    CacheIndex(settings, shards, None, True).write(folder)


class Tracer(Callback):
    """Notes when steps were handed to the device, and traces some of them."""

    def __init__(self, first: int, steps: int, path: Path | None) -> None:
        self._first, self._last, self._path = first, first + steps, path
        self._profile: Any = None

    def on_step(self, step: int) -> None:
        """Begin or end the trace."""
        if self._path is None:
            return
        if step == self._first:
            torch.cuda.synchronize()
            self._profile = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
            self._profile.__enter__()
        if step == self._last and self._profile is not None:
            torch.cuda.synchronize()
            self._profile.__exit__(None, None, None)
            self._profile.export_chrome_trace(str(self._path))


def resident_rate(state: TrainState, x: torch.Tensor, config: Any, steps: int) -> float:
    """Return tokens a second of steps whose batch is on the device."""
    for _ in range(4):
        train_step(state, x, config)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        train_step(state, x, config)
    torch.cuda.synchronize()
    return steps * len(x) / (time.perf_counter() - start)


def main(
    *,
    d_in: int = 4096,
    d_sae: int = 131072,
    k: int = 64,
    batch_tokens: int = 8192,
    steps: int = 120,
    rows: int = 196608,
    out: Path = RESULTS / "pipeline.jsonl",
    trace: Path | None = None,
) -> None:
    """Compare training from a cache with steps on resident batches.

    Args:
        d_in, d_sae, k, batch_tokens: of the SAE and its training; the default is size L.
        steps: to train for; the rate is that of the second half.
        rows: of the cache.
        out: file to append a JSON line to.
        trace: file for a trace of ten steps.
    """
    device = torch.device("cuda")
    config = TrainConfig(
        d_sae=d_sae, k=k, batch_tokens=batch_tokens, tokens=batch_tokens * steps, precision="bf16",
        log_every_steps=10, checkpoint_every_steps=10 * steps,
    ).resolve(d_in)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        write_random_cache(Path(folder) / "cache", d_in, rows)
        source = ActivationCache(Path(folder) / "cache")
        state = init_state(config, RowShuffle(source, batch_tokens, seed=0, window_rows=config.shuffle_tokens), device)
        x = torch.randn(batch_tokens, d_in, device=device).bfloat16()
        resident = resident_rate(state, x, config, steps // 4)
        state.step = 0
        train(state, config, callbacks=[JsonlLog(Path(folder)), Tracer(steps // 4, 10, trace)])
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    rates = [json.loads(line)["tokens_per_second"] for line in lines][len(lines) // 2 :]
    rate = len(rates) / sum(1 / rate for rate in rates)
    record = {
        "group": "pipeline", "shape": {"d_in": d_in, "d_sae": d_sae, "k": k, "batch_tokens": batch_tokens},
        "tokens_per_second": rate, "resident_tokens_per_second": resident, "share": rate / resident, "rates": rates,
    }  # fmt: skip
    with out.open("a") as file:
        file.write(json.dumps(record | facts(device)) + "\n")
    Console().print(
        f"{rate:,.0f} tokens/s from the cache, {resident:,.0f} from a batch on the device: {rate / resident:.1%}"
    )


if __name__ == "__main__":
    cyclopts.run(main)
