"""What is written of a trained SAE of a run: what it is and what is known of it, and when all of that is done."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from flashsae.architecture import architecture_of
from flashsae.data.images import Pictures
from flashsae.data.language_model import dtype_of_model
from flashsae.errors import FlashSAEError
from flashsae.evaluate import Evaluation
from flashsae.formats import native
from flashsae.lm.framing import framing_of
from flashsae.logs.jsonl import LOG_FILE, read_log
from flashsae.metrics.numbers import real
from flashsae.report.evaluation_file import RunEvaluation, read_evaluation
from flashsae.run import exporting
from flashsae.run.parts import Part, Planned
from flashsae.sae.module import SAE
from flashsae.settings.kinds import as_json

SAE_FOLDER = "sae"
_METRICS = ("fvu", "fvu_without_outliers", "l0", "dead_latents", "held_out_tokens", "train_tokens")
"""Of an evaluation: those that every repetition of a run gives."""


def metadata_of(planned: Planned, settings: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return what is known of an SAE before it is trained, by name.

    Args:
        planned: what it is.
        settings: of the cache that its activations come from, which know best what was read.
    """
    reading, train, held = planned.config.activations, planned.train, settings or {}
    told = {
        "dataset": _name_of(reading.dataset or held.get("dataset")),
        "context_length": reading.context_length,
        "prepend_bos": reading.prepend_bos,
        "model_dtype": str(dtype_of_model(reading, train.device))[6:] if reading.model_dtype else None,
        "revision": reading.revision,
    }
    told |= {name: held[name] for name in told if name in held and name != "dataset"}
    told = {name: value for name, value in told.items() if value is not None}
    return {"model": reading.model, "hookpoint": reading.hookpoint, **told, "train": train.flat()}


def _name_of(dataset: str | None) -> str | None:
    """Return what a text is called, without what a cache says of it and where on this machine it lies."""
    if dataset is None:
        return None
    name = dataset.partition(" (")[0]
    return Path(name).name if Path(name).is_absolute() else name


def is_done(part: Part) -> bool:
    """Tell whether nothing is left to do for an SAE that is trained; the figures, or the report, are the last."""
    path = part.folder / "evaluation.json"
    if not path.exists() or (part.config.report and not (part.folder / "report.html").exists()):
        return False
    is_exported = exporting.is_exported(part.folder, part.config.export)
    return is_exported and bool(read_evaluation(path)["steps"] == part.config.train.steps)


def begins_with_bos(part: Part) -> bool | None:
    """Return whether the tokenizer of a model begins its inputs with a BOS token; None of what reads no text."""
    try:
        tokenizer = part.activations.tokenizer()
        if isinstance(tokenizer, Pictures):
            return None
        return tokenizer.bos_token_id in framing_of(tokenizer, part.config.activations).first
    except (FlashSAEError, AttributeError):  # of a model whose text somebody else has cut
        return None


def save(part: Part, sae: SAE) -> None:
    """Write a trained SAE."""
    metadata = metadata_of(part.planned, getattr(part.source, "settings", None))
    if "prepend_bos" not in metadata and (begins := begins_with_bos(part)) is not None:
        metadata["prepend_bos"] = begins  # others take it that every input does, where nothing is said
    sae.save(part.folder / SAE_FOLDER, metadata=metadata, overwrite=True)


def figures_of(part: Part, evaluation: Evaluation) -> RunEvaluation:
    """Return what an SAE ends with, and stands in its evaluation.json."""
    config = part.config.train
    log = [record for record in read_log(part.folder / LOG_FILE) if "tokens_per_second" in record]
    before = [0.0, *(record["tokens"] for record in log)]
    seconds = sum((r["tokens"] - start) / r["tokens_per_second"] for start, r in zip(before, log))
    return RunEvaluation(
        fvu=evaluation.fvu,
        fvu_without_outliers=evaluation.fvu_without_outliers,
        outliers=evaluation.outliers,
        l0=evaluation.l0,
        dead_latents=int(log[-1]["dead_latents"]),
        d_in=config.d_in,
        d_sae=config.d_sae,
        architecture=architecture_of(config.arch).name,
        settings=as_json(asdict(config.arch)),
        site_fvu=dict(evaluation.site_fvu) or None,
        held_out_tokens=evaluation.tokens,
        train_tokens=int(log[-1]["tokens"]),
        steps=log[-1]["step"],
        train_seconds=seconds,
        tokens_per_second=log[-1]["tokens"] / seconds,
    )


def add_metrics(part: Part, evaluation: RunEvaluation) -> None:
    """Let a saved SAE tell what was measured of it."""
    found = {name: getattr(evaluation, name) for name in _METRICS}
    metrics = {name: value for name, value in found.items() if real(value) is not None}
    metrics |= {"site_fvu": evaluation.site_fvu} if evaluation.site_fvu else {}
    native.add_metadata(part.folder / SAE_FOLDER, {"metrics": metrics})
