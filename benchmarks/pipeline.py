"""Training from data, beside steps whose batches are on the device: `python -m benchmarks.pipeline cache auxk model`.

`cache` writes a cache of random activations (which then lies in the page cache) and trains on it exactly as
`flashsae train` does, in the steps of a long run in which no latent is dead yet; `auxk` in steps with dead latents.
`model` trains on what a language model gives meanwhile. Each appends one JSON line with the tokens a second of both,
and what a trace of some steps shows. The batches on the device are of the same data, and the SAE is the one that was
trained, since what a step costs depends on how often its latents are active.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, count, cycle
from pathlib import Path
from typing import Annotated, Any, Literal

import cyclopts
import safetensors.torch
import torch
from rich.console import Console
from torch.profiler import ProfilerActivity, profile

from benchmarks.reading import WARM_SECONDS
from benchmarks.session import RESULTS, provenance
from flashsae.data.acts import Batch
from flashsae.data.cache import ActivationCache
from flashsae.data.cache_index import TOKENS_FOLDER, CacheIndex, CacheSettings, Shard, shard_path
from flashsae.data.language_model import LanguageModelSource
from flashsae.data.shuffle import shuffled
from flashsae.data.sources import RowSource, StreamSource
from flashsae.files.documents import crc32
from flashsae.logs.callback import Callback
from flashsae.logs.jsonl import JsonlLog
from flashsae.settings.reading import ReadingConfig
from flashsae.text.open import open_text
from flashsae.train.config import TrainConfig
from flashsae.train.loop import train
from flashsae.train.state import TrainState, init_state
from flashsae.train.step import train_step

Arm = Literal["cache", "auxk", "model"]
Source = RowSource | StreamSource
Span = tuple[float, float]
TRACED_STEPS = 10
DRAWN_STEPS = 4
RESIDENT_BATCHES = 16  # that lie on the device
NEVER_DEAD = 1_000_000_000  # tokens, more than any arm trains on
DEAD_AFTER_STEPS = 12  # in the arm with AuxK
REPEATED = 30  # times that an epoch reads the text of the arm with a model, so that it does not end all the time
MERGED_MS = 0.02  # spans closer to each other than this are one when drawn


def write_random_cache(folder: Path, d_in: int, rows: int, shard_rows: int = 32768) -> None:
    """Write a cache of random activations in the format of docs/formats.md."""
    settings = CacheSettings(
        model="random",
        dataset="random",
        model_fingerprint="",
        text_fingerprint="",
        hookpoints={"random": d_in},
        dtype="bfloat16",
        context_length=1,
        mask_special=True,
        max_norm_ratio=None,
    )
    sizes = [min(shard_rows, rows - start) for start in range(0, rows, shard_rows)]
    shards: list[Shard] = []
    for kind in (TOKENS_FOLDER, "random"):
        (folder / kind).mkdir(parents=True)
    for number, n in enumerate(sizes):
        group = torch.arange(n) + number * shard_rows
        tokens = {"token_ids": torch.zeros(n, dtype=torch.int32), "position": torch.zeros(n, dtype=torch.int32)}
        acts = {"activations": torch.randn(n, d_in, generator=torch.Generator().manual_seed(number)).bfloat16()}
        safetensors.torch.save_file({**tokens, "group": group}, shard_path(folder, TOKENS_FOLDER, number))
        safetensors.torch.save_file(acts, shard_path(folder, "random", number))
        sums = {kind: crc32(shard_path(folder, kind, number)) for kind in (TOKENS_FOLDER, "random")}
        shards.append(Shard(n, sums))
    CacheIndex(asdict(settings), shards, None, True).write(folder)


class Tracer(Callback):
    """Traces some steps of a training."""

    def __init__(self, first: int, path: Path) -> None:
        self._first, self._path = first, path
        self._profile: Any = None

    def on_step(self, step: int) -> None:
        """Begin or end the trace."""
        if step == self._first:
            torch.cuda.synchronize()
            self._profile = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
            self._profile.__enter__()
        if step == self._first + TRACED_STEPS:
            torch.cuda.synchronize()
            self._profile.__exit__(None, None, None)
            self._profile.export_chrome_trace(str(self._path))


def union(spans: list[Span], gap: float = 0.0) -> list[Span]:
    """Return spans in order, those that overlap or are less than `gap` apart as one."""
    found: list[Span] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1] + gap:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found


def length(spans: list[Span]) -> float:
    """Return how long spans are that do not overlap."""
    return sum(end - start for start, end in spans)


def read_trace(path: Path) -> dict[str, Any]:
    """Return what a trace shows of the stream that trains, by replaying graphs, and of those that fetch batches; ms.

    busy_share: of the time between its first and last kernel, in which the training stream runs one. fetch_ms: of
    copies and kernels on other streams, a step; fetch_hidden_share: of those, while the training stream is busy.
    timeline: spans of both streams over some steps.
    """
    trace = json.loads(path.read_text())["traceEvents"]
    events = [e for e in trace if e.get("cat") in ("kernel", "gpu_memcpy")]
    replays = {e["args"]["correlation"] for e in trace if str(e.get("name", "")).startswith("cudaGraphLaunch")}
    # a model that is read may be replayed, too; most of the time goes into training
    seconds: dict[int, float] = defaultdict(float)
    for event in events:
        if event["args"]["correlation"] in replays:
            seconds[event["args"]["stream"]] += event["dur"]
    training = max(seconds, key=lambda stream: seconds[stream])

    def spans(is_training: bool) -> list[Span]:
        chosen = (e for e in events if (e["args"]["stream"] == training) == is_training)
        return [(e["ts"] / 1e3, (e["ts"] + e["dur"]) / 1e3) for e in chosen]

    train, fetch = union(spans(True)), union(spans(False))
    begin, end = train[0][0], train[-1][1]
    fetch = [span for span in fetch if span[0] >= begin and span[1] <= end]
    hidden = length(train) + length(fetch) - length(union(train + fetch))
    until = begin + (end - begin) * DRAWN_STEPS / TRACED_STEPS
    timeline = {
        name: [
            (round(start - begin, 3), round(stop - begin, 3))
            for start, stop in union(found, MERGED_MS)
            if start < until
        ]
        for name, found in (("training", train), ("fetching", fetch))
    }
    return {
        "busy_share": length(train) / (end - begin),
        "fetch_ms": length(fetch) / TRACED_STEPS,
        "fetch_hidden_share": hidden / length(fetch) if fetch else None,
        "timeline": timeline,
    }


def resident_rate(state: TrainState, batches: Sequence[Batch], config: TrainConfig, steps: int) -> float:
    """Return tokens a second of steps whose batches are on the device."""
    start = 0.0
    for is_measured in (False, True):
        start = time.perf_counter()
        for batch, _ in zip(cycle(batches), range(steps if is_measured else steps // 4)):
            train_step(state, batch, config)
        torch.cuda.synchronize()
    return steps * config.batch_tokens / (time.perf_counter() - start)


def source_rate(source: StreamSource, tokens: int) -> float:
    """Return tokens a second of a source that nothing runs beside, once the process that cuts text has begun."""
    chunks = chain.from_iterable(source.chunks("train") for _ in count())  # epoch after epoch
    start = time.perf_counter()
    while time.perf_counter() - start < WARM_SECONDS:
        next(chunks)
    torch.cuda.synchronize()
    start, found = time.perf_counter(), 0
    while found < tokens:
        found += len(next(chunks)[0].group)
    torch.cuda.synchronize()
    return found / (time.perf_counter() - start)


def rates_beside_resident(name: str, source: Source, config: TrainConfig, trace: Path) -> dict[str, Any]:
    """Train as `flashsae train` does; return the rate of the second half beside that of steps on resident batches."""
    (d_in,) = source.widths.values()
    settings, device = config.resolve(d_in), torch.device("cuda")
    batches = shuffled(source, settings.batch_tokens, seed=0, buffer_tokens=settings.shuffle_tokens)
    state = init_state(settings, batches, device)
    drawn = (batches.next_batch() for _ in range(RESIDENT_BATCHES))
    resident_batches = [{site: acts.to(device, copy=True) for site, acts in batch.items()} for batch in drawn]
    alone = None if isinstance(source, RowSource) else source_rate(source, settings.steps * settings.batch_tokens // 4)
    with tempfile.TemporaryDirectory() as folder:
        train(state, settings, callbacks=[JsonlLog(Path(folder)), Tracer(settings.steps // 4, trace)])
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    longer = replace(settings, tokens=2 * settings.tokens)
    resident = resident_rate(state, resident_batches, longer, settings.steps // 3)
    rates = [json.loads(line)["tokens_per_second"] for line in lines][len(lines) // 2 :]
    rate = len(rates) / sum(1 / rate for rate in rates)
    shape = {"d_in": d_in, "d_sae": settings.d_sae, "k": settings.arch.k, "batch_tokens": settings.batch_tokens}
    slower = resident if alone is None else min(resident, alone)
    return {
        "group": "pipeline", "name": name, "shape": shape, "tokens_per_second": rate, "share": rate / slower,
        "resident_tokens_per_second": resident, "source_tokens_per_second": alone, "rates": rates,
    } | read_trace(trace)  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """Of a training; the default is L, and 120 steps.

    Args:
        d_in: of the cache.
        d_sae, k, batch_tokens: of the SAE and its training.
        steps: to train for; the rate is that of the second half.
        rows: of the cache.
    """

    d_in: int = 4096
    d_sae: int = 131072
    k: int = 64
    batch_tokens: int = 8192
    steps: int = 120
    rows: int = 196608

    def config(self, arm: Arm) -> TrainConfig:
        """Return the settings of an arm."""
        B = self.batch_tokens
        return TrainConfig(
            d_sae=self.d_sae, k=self.k, batch_tokens=B, tokens=B * self.steps, precision="bf16",
            shuffle_tokens=16 * B, log_every_steps=10, checkpoint_every_steps=10 * self.steps,
            dead_after_tokens=DEAD_AFTER_STEPS * B if arm == "auxk" else NEVER_DEAD,
        )  # fmt: skip


def main(
    *arms: Arm,
    sizes: Annotated[Sizes, cyclopts.Parameter(name="*")] = Sizes(),
    model: str = "minilm",
    hookpoint: str = "encoder.layer.2",
    out: Path = RESULTS / "pipeline.jsonl",
    traces: Path | None = None,
) -> None:
    """Compare training from data with steps on resident batches.

    Args:
        arms: where activations come from.
        model, hookpoint: for `model`, as for `flashsae train`.
        out: file to append a JSON line to.
        traces: folder to keep the traces in, for chrome://tracing or ui.perfetto.dev.
    """
    for arm in arms or ("cache",):
        with tempfile.TemporaryDirectory() as folder:
            source: Source
            if arm == "model":
                settings = ReadingConfig(model, hookpoint=hookpoint, context_length=128, shuffle_documents=False)
                texts = [str(text) for text in open_text("python-docs").documents()]
                source = LanguageModelSource(settings, open_text(texts * REPEATED))
            else:
                write_random_cache(Path(folder) / "cache", sizes.d_in, sizes.rows)
                source = ActivationCache(Path(folder) / "cache")
            if traces is not None:
                traces.mkdir(parents=True, exist_ok=True)
            record = rates_beside_resident(arm, source, sizes.config(arm), (traces or Path(folder)) / f"{arm}.json")
        with out.open("a") as file:
            file.write(json.dumps(record | provenance(torch.device("cuda"))) + "\n")
        alone = record["source_tokens_per_second"]
        Console().print(
            f"{arm}: {record['tokens_per_second']:,.0f} tokens/s, {record['resident_tokens_per_second']:,.0f} from "
            f"batches on the device{'' if alone is None else f', {alone:,.0f} from the source alone'}: "
            f"{record['share']:.1%}; training stream busy {record['busy_share']:.1%} of the time, "
            f"fetching takes {record['fetch_ms']:.2f} ms a step, hidden {record['fetch_hidden_share'] or 0:.1%}"
        )


if __name__ == "__main__":
    cyclopts.run(main)
