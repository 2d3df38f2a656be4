"""What a cache of activations costs beyond the model's own forward pass: `python -m benchmarks.reading small large`.

`small` is a transformer of width 384, read at its third layer; `large` has eight layers of width 4096, of random
weights. Each appends one JSON line with the tokens a second of a bare loop that runs the same layers on batches made
before, of the source that cuts and batches text meanwhile, and of `flashsae cache`, which writes it to disk as well.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import cyclopts
import torch
from rich.console import Console
from torch import nn

from benchmarks.session import RESULTS, provenance
from flashsae.data.cache_writer import write_cache
from flashsae.data.language_model import LanguageModelSource
from flashsae.lm.loading import load_language_model
from flashsae.lm.place import quiet_transformers
from flashsae.lm.windows import TokenBatch
from flashsae.settings.reading import ReadingConfig
from flashsae.text.open import open_text
from flashsae.text.reading_order import Place

ModelSize = Literal["small", "large", "tiny"]
_START = Place(0, 0)
WARM_SECONDS = 10.0  # in which the process that cuts text begins
LAYERS_READ = {"small": 3, "large": 8, "tiny": 1}


def model_of(size: ModelSize, name: str, device: torch.device) -> tuple[nn.Module, Any, str]:
    """Return a model, its tokenizer and the hookpoint behind its last layer that is read."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, tokenizer = load_language_model(name, dtype)
    if size != "large":
        return model.to(device), tokenizer, f"encoder.layer.{LAYERS_READ[size] - 1}"
    with quiet_transformers() as transformers, torch.device(device):
        settings = transformers.LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=4096, intermediate_size=11008, num_hidden_layers=LAYERS_READ[size],
            num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=2048,
        )  # fmt: skip
        torch.manual_seed(0)
        model = transformers.LlamaModel(settings).to(dtype)
    return model, tokenizer, f"layers.{LAYERS_READ[size] - 1}"


@contextmanager
def truncated(model: nn.Module, layers: int) -> Iterator[nn.Module]:
    """Yield the model with so many of its layers."""
    holder, name = (model, "layers") if hasattr(model, "layers") else (model.encoder, "layer")
    whole = getattr(holder, name)
    setattr(holder, name, whole[:layers])
    try:
        yield model
    finally:
        setattr(holder, name, whole)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def bare_rate(model: nn.Module, batches: Sequence[TokenBatch], device: torch.device) -> float:
    """Return tokens a second, those that become rows, of the model on batches that lie on the device."""
    made = [(batch.ids.to(device), batch.attention.to(device)) for batch in batches]
    rows = sum(int(batch.keep.sum()) for batch in batches)
    options = {"use_cache": False} if hasattr(model, "layers") else {}
    for is_measured in (False, True):
        synchronize(device)
        start = time.perf_counter()
        with torch.no_grad():
            for ids, attention in made if is_measured else made[:4]:
                model(input_ids=ids, attention_mask=attention, **options)
        synchronize(device)
    return rows / (time.perf_counter() - start)


def epoch_rate(source: LanguageModelSource, device: torch.device) -> float:
    """Return tokens a second of the source, nobody reading what it gives."""
    start = time.perf_counter()
    for _ in source.chunks(None):
        if time.perf_counter() - start > WARM_SECONDS:
            break
    synchronize(device)
    start, rows = time.perf_counter(), 0
    for chunk, _ in source.chunks(None):
        rows += len(chunk.group)
    synchronize(device)
    return rows / (time.perf_counter() - start)


def cache_rate(source: LanguageModelSource, folder: Path) -> float:
    """Return tokens a second of writing a cache."""
    rows = 0

    def count(so_far: int) -> None:
        nonlocal rows
        rows = so_far

    start = time.perf_counter()
    write_cache(folder / "cache", source, on_progress=count)
    return rows / (time.perf_counter() - start)


def main(
    *sizes: ModelSize,
    model: str = "minilm",
    dataset: str = "python-docs",
    context_length: int = 128,
    repeat: int = 4,
    rounds: int = 2,
    place: Path | None = None,
    out: Path = RESULTS / "reading.jsonl",
) -> None:
    """Compare caching with the model alone.

    Args:
        sizes: of the model.
        model: the small one, and the tokenizer of both.
        dataset: text to read.
        context_length: of a window.
        repeat: read the text so many times.
        rounds: of measurements, in turn; the best of each counts.
        place: where caches are written meanwhile. Default: a temporary folder.
        out: file to append JSON lines to.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    texts = [str(text) for _ in range(repeat) for text in open_text(dataset).documents()]
    for size in sizes or ("small", "large"):
        language_model, tokenizer, hookpoint = model_of(size, model, device)
        config = ReadingConfig(model, hookpoint=hookpoint, context_length=context_length)
        source = LanguageModelSource(config, open_text(texts), loaded=(language_model, tokenizer))
        blocks = source._batched_blocks(None, _START)
        batches = [batch for block, _, _ in blocks for batch in block]
        rates: dict[str, list[float]] = {"bare": [], "source": [], "cache": []}
        for _ in range(rounds):
            with truncated(language_model, LAYERS_READ[size]) as cut:
                rates["bare"].append(bare_rate(cut, batches, device))
            rates["source"].append(epoch_rate(source, device))
            with tempfile.TemporaryDirectory(dir=place) as folder:
                rates["cache"].append(cache_rate(source, Path(folder)))
        best = {name: max(each) for name, each in rates.items()}
        record = {
            "group": "reading", "name": size, "context_length": context_length, "rates": rates,
            "padding": 1 - sum(int(b.attention.sum()) for b in batches) / sum(b.ids.numel() for b in batches),
            "tokens_per_second": best["cache"], "share": best["cache"] / best["bare"],
        }  # fmt: skip
        with out.open("a") as file:
            file.write(json.dumps(record | provenance(device)) + "\n")
        Console().print(
            f"{size}: the model alone {best['bare']:,.0f} tokens/s, the source {best['source']:,.0f} "
            f"({best['source'] / best['bare']:.1%}), the cache {best['cache']:,.0f} ({record['share']:.1%}); "
            f"padding {record['padding']:.1%}"
        )


if __name__ == "__main__":
    cyclopts.run(main)
