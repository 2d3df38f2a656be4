"""Held-out FVU against L0 of every architecture, at three sparsities: `python -m benchmarks.pareto ACTIVATIONS`.

Each is trained with `flashsae.fit` on the same activations of the demo's model and measured with `flashsae.evaluate` on
documents that training never saw. What is in the file of results already is not trained again, so an interrupted call
goes on where it stopped.
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import cyclopts
import torch
from torch import Tensor

import flashsae
from benchmarks.session import RESULTS, provenance
from flashsae.architecture import architecture_names, settings_of
from flashsae.bench.measure import Record
from flashsae.data.cache import ActivationCache
from flashsae.data.cache_writer import write_cache
from flashsae.data.language_model import LanguageModelSource
from flashsae.settings.reading import ReadingConfig
from flashsae.text.open import open_text

SPARSITIES = (16, 32, 64)
LAYER = "encoder.layer.2"
MLP = (f"{LAYER}.intermediate:in", f"{LAYER}.output.dense")
LAYERS = ("encoder.layer.1", LAYER, "encoder.layer.3")
HELD_OUT_SHARE = 0.05
SAME = ("arch", "sparsity", "sites", "d_sae", "tokens", "batch_tokens", "train_tokens", "model_dtype", "on")
"""What two results of one training share."""


@dataclass(frozen=True)
class Training:
    """An architecture to train at each of the sparsities.

    Args:
        arch: its name.
        settings: its settings for an L0.
        sites: hookpoints of the model.
        penalty: the setting that decides L0, where none says it outright; trainings find its value, beginning with that
            of `settings`, and the last one counts.
    """

    arch: str
    settings: Callable[[int], Mapping[str, Any]]
    sites: tuple[str, ...] = (LAYER,)
    penalty: str = ""


MOST_TRIALS, NEAR = 4, 1.1
"""Trainings to find a penalty with, until L0 is so near, by a factor."""


Config = Mapping[str, int]
Trials = list[tuple[float, float]]


def _k(l0: int) -> dict[str, Any]:
    return {"k": l0}


TRAININGS = (
    Training("topk", _k),
    Training("batch_topk", _k),
    Training("abs_topk", _k),
    Training("matryoshka", _k),
    Training("hierarchical_topk", _k),
    Training("jump_relu", lambda l0: {"target_l0": float(l0)}),
    Training("relu", lambda l0: {"l1": 2.5 / l0}, penalty="l1"),
    Training("gated", lambda l0: {"l1": 2.5 / l0}, penalty="l1"),
    Training("transcoder", _k, MLP),
    Training("skip_transcoder", _k, MLP),
    Training("crosscoder", _k, LAYERS),
)


def write_activations(folder: Path, model: str, dataset: str, max_tokens: int) -> None:
    """Write the activations at all of the sites, unless they are there."""
    config = ReadingConfig(model, dataset, hookpoint=LAYER).filled()
    source = LanguageModelSource(config, open_text(config.dataset), hookpoints=tuple(dict.fromkeys((*MLP, *LAYERS))))
    write_cache(folder, source, max_tokens=max_tokens)


@dataclass(frozen=True)
class Acts:
    """Activations by site: those to train on, those held out, and in which dtype the model computed them."""

    train: dict[str, Tensor]
    held_out: dict[str, Tensor]
    model_dtype: str


@functools.cache
def read_activations(folder: Path, sites: tuple[str, ...]) -> Acts:
    """Return the activations at some sites."""
    cache = ActivationCache(folder, sites, held_out=HELD_OUT_SHARE)
    train, held_out = (cache.rows(cache.split_rows(split)) for split in ("train", "held_out"))
    return Acts(train, held_out, str(cache.settings["model_dtype"]))


def train_one(training: Training, l0: int, folder: Path, config: Config, done: list[Record]) -> Record | None:
    """Train and measure one SAE; None if that was done before."""
    acts = read_activations(folder, training.sites)
    record: Record = {
        "group": "pareto", "arch": training.arch, "sparsity": l0, "sites": list(training.sites), **config,
        "train_tokens": len(next(iter(acts.train.values()))), "model_dtype": acts.model_dtype,
        "on": "cuda" if torch.cuda.is_available() else "cpu",
    }  # fmt: skip
    if any(all(other.get(name) == record[name] for name in SAME) for other in done):
        return None
    settings, trials = dict(training.settings(l0)), Trials()
    known = [trial for other in done if other["arch"] == training.arch for trial in other["trials"][-1:]]
    if training.penalty and known:
        settings[training.penalty] = next_penalty(known[-1:], l0)
    started = time.perf_counter()
    while True:
        sae = fit_one(training.arch, settings, acts, config)
        found = flashsae.evaluate(sae, _alone(acts.held_out))
        trials.append((settings.get(training.penalty, 0.0), found.l0))
        if not training.penalty or len(trials) == MOST_TRIALS or 1 / NEAR < found.l0 / l0 < NEAR:
            break
        settings[training.penalty] = next_penalty(trials, l0)
    seconds = (time.perf_counter() - started) / len(trials)
    return record | {
        "settings": asdict(sae.config.arch), "trials": trials, "d_in": sae.config.d_in, "d_out": sae.config.d_out,
        "l0": round(found.l0, 3), "fvu": round(found.fvu, 6),
        "never_active": int((found.latent_density == 0).sum()), "held_out_tokens": found.tokens,
        "seconds": round(seconds, 2),
    }  # fmt: skip


def fit_one(arch: str, settings: Mapping[str, Any], acts: Acts, config: Config) -> flashsae.SAE:
    """Train one SAE."""
    made = flashsae.TrainConfig(**{**config, "arch": settings_of(arch, **settings)})
    return flashsae.fit(_alone(acts.train), d_sae=config["d_sae"], config=made, progress=False)


def next_penalty(trials: Trials, l0: float) -> float:
    """Return the penalty to try next: where a line through the last two trials, in logarithms, has the L0."""
    (last, found), power = trials[-1], -1.0
    if len(trials) > 1 and last != trials[-2][0] and found > 0 and trials[-2][1] > 0:
        power = math.log(found / trials[-2][1]) / math.log(last / trials[-2][0])
    factor: float = (l0 / max(found, 0.1)) ** (1 / min(-0.3, max(-3.0, power)))
    return last * min(10.0, max(0.1, factor))


def _alone(acts: dict[str, Tensor]) -> Any:
    return acts if len(acts) > 1 else next(iter(acts.values()))


def wanted(only: str) -> Iterator[tuple[Training, int]]:
    """Yield what is to be trained: the architectures that are there, all at the middle sparsity first."""
    lines = [line for line in TRAININGS if line.arch.partition(":")[0] in architecture_names(installed=False)]
    chosen = [line for line in lines if not only or line.arch in only.split(",")]
    for l0 in (SPARSITIES[1], SPARSITIES[0], *SPARSITIES[2:]):
        yield from ((line, l0) for line in chosen)


@dataclass(frozen=True)
class Trainings:
    """Of each training; whatever else there is has the default of the architecture.

    Args:
        d_sae: Number of latents.
        tokens: Tokens to train on.
        batch_tokens: Tokens in a step.
        seed: Of the initial weights and of the order of the data.
    """

    d_sae: int = 4096
    tokens: int = 4_000_000
    batch_tokens: int = 1024
    seed: int = 0


@dataclass(frozen=True)
class Cached:
    """What a cache is written of where there is none.

    Args:
        model: Language model.
        dataset: Text.
        max_tokens: Tokens of it.
    """

    model: str = "minilm"
    dataset: str = "python-docs"
    max_tokens: int = 400_000


FLAT = cyclopts.Parameter(name="*")


def main(
    activations: Path,
    *,
    trainings: Annotated[Trainings, FLAT] = Trainings(),
    cached: Annotated[Cached, FLAT] = Cached(),
    only: str = "",
    seconds: float = float("inf"),
    out: Path = RESULTS / "pareto.jsonl",
) -> None:
    """Train every architecture at every sparsity and append one JSON line each.

    Args:
        activations: folder of a cache of all the sites; written first if there is none.
        trainings: settings of each.
        cached: of the cache, where it is to be written.
        only: names of architectures, by comma; "" for all.
        seconds: start no training after so many.
        out: JSON lines file.
    """
    started = time.perf_counter()
    if not (activations.exists() and ActivationCache.is_complete(activations)):
        write_activations(activations, **asdict(cached))
    out.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    about = provenance(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    config = asdict(trainings)
    for line, l0 in wanted(only):
        if time.perf_counter() - started > seconds:
            print(f"{seconds:.0f} seconds are over: {line.arch} at {l0} and what follows are left out")
            break
        record = train_one(line, l0, activations, config, done)
        if record is None:
            continue
        done.append(record | about)
        with out.open("a") as file:
            file.write(json.dumps(done[-1]) + "\n")
        print(
            f"{line.arch:20s} L0 {record['l0']:8.2f} FVU {record['fvu']:.4f} never active {record['never_active']:5d}"
            f" {record['seconds']:7.2f} s",
            flush=True,
        )


if __name__ == "__main__":
    cyclopts.run(main)
