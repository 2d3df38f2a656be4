"""Small runs as training leaves them, made without training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from flashsae.architecture import architecture_of, settings_of
from flashsae.logs.jsonl import make_line
from flashsae.report.evaluation_file import RunEvaluation, write_evaluation
from flashsae.sae.config import SAEConfig
from flashsae.sae.module import SAE
from flashsae.settings.kinds import as_json
from flashsae.settings.reading import ActivationsConfig
from flashsae.settings.run import RunConfig
from flashsae.settings.training import TrainConfig

D_IN, D_SAE = 6, 20


def write_run(folder: Path, *, arch: str = "topk", fvu: float = 0.125, seed: int = 0, **reading: Any) -> Path:
    """Write the folder of a run of one SAE that has ended."""
    folder.mkdir(parents=True)
    asked = {"model": "openai-community/gpt2", "dataset": "org/texts", "hookpoint": "h.6", **reading}
    activations = ActivationsConfig(**asked).filled()
    settings = settings_of(arch, k=3) if "topk" in arch else settings_of(arch)
    sites = architecture_of(settings).sites or ("x",)
    train = TrainConfig(arch=settings, d_sae=D_SAE, tokens=2048, batch_tokens=64, seed=seed).resolve(
        D_IN if len(sites) == 1 else dict.fromkeys(sites, D_IN)
    )
    (folder / "config.toml").write_text(RunConfig(activations, train).to_toml(), "utf-8")
    lines, checksum = [], 0
    for step in (1, 16, train.steps):
        record = {"step": step, "tokens": step * 64.0, "fvu": fvu + math.exp(-step), "l0": 3.0, "dead_latents": 1.0}
        line, checksum = make_line({**record, "tokens_per_second": 1000.0, "loss": 0.5}, checksum)
        lines.append(line + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines), "utf-8")
    sae = SAE(SAEConfig(D_IN, D_SAE, arch=settings), seed=seed)
    metadata = {"model": asked["model"], "hookpoint": asked["hookpoint"], "train": train.flat()}
    sae.save(folder / "sae", metadata={**metadata, "dataset": asked["dataset"]})
    write_evaluation(
        folder / "evaluation.json",
        RunEvaluation(
            fvu, 3.0, 1, D_IN, D_SAE, 512, 2048, train.steps, tokens_per_second=1000.0,
            architecture=sae.architecture.name, settings=as_json({"k": 3}),
        ),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    arrays = {name: torch.rand(D_SAE, generator=generator) for name in ("latent_density", "nearest_decoder_cosine")}
    save_file(
        {**arrays, "decoder_norm": torch.ones(D_SAE), "is_dead": torch.arange(D_SAE) < 1},
        folder / "latents.safetensors",
    )
    return folder


def write_sweep(folder: Path) -> Path:
    """Write the folder of a run of two SAEs that differ in their FVU and their seed."""
    for seed, fvu in ((0, 0.125), (1, 0.25)):
        write_run(folder / f"seed{seed}", fvu=fvu, seed=seed)
    (folder / "config.toml").write_text((folder / "seed0" / "config.toml").read_text("utf-8"), "utf-8")
    return folder
