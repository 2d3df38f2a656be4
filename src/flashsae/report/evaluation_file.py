"""The file of the figures that a run ends with: evaluation.json, its content and how it is written and read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from flashsae.files.documents import load_document, write_document
from flashsae.files.schema import Range
from flashsae.metrics.numbers import real

Number = Annotated[float, Range(0)]


@dataclass(frozen=True)
class RunEvaluation:
    """What a run ends with: the SAE, and its figures (see `flashsae.metrics.METRICS`).

    Of the figures with a default, one that is no finite number is passed over by the report.

    Args:
        fvu: on held-out tokens.
        l0: mean number of active latents a held-out token.
        dead_latents: at the end of training.
        d_in: width of the activations.
        d_sae: number of latents.
        held_out_tokens: that `fvu` and `l0` are measured on.
        train_tokens: trained on, repeats counted.
        steps: of the training.
        fvu_without_outliers: fvu over the held-out tokens that are no outliers.
        outliers: held-out tokens of huge norm, see `flashsae.evaluate`.
        train_seconds: what the training took.
        tokens_per_second: of the training.
        architecture: name of the kind of SAE; None where that was not written down.
        settings: its own, by name.
        site_fvu: fvu of each site alone, by name, of an SAE that reconstructs several.
    """

    fvu: float
    l0: float
    dead_latents: Number
    d_in: Number
    d_sae: Number
    held_out_tokens: Number
    train_tokens: Number
    steps: Number
    fvu_without_outliers: Any = None
    outliers: Any = None
    train_seconds: Any = None
    tokens_per_second: Any = None
    architecture: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    site_fvu: Any = None


@dataclass(frozen=True)
class _Stored(RunEvaluation):
    """As it stands in the file; version 0.1 wrote the one setting of its one architecture among the figures."""

    settings: dict[str, Any] = field(default_factory=dict)
    k: Any = None


def write_evaluation(path: Path, evaluation: RunEvaluation) -> None:
    """Write evaluation.json atomically.

    Raises:
        StorageError: the file system refused.
    """
    write_document(path, asdict(evaluation))


def read_evaluation(path: Path) -> dict[str, Any]:
    """Return the content of evaluation.json by name; what is not there, or null, is left out, except for settings.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    stored = load_document(path, _Stored, advice=f"Write it again with `flashsae train --resume {path.parent}`.")
    content = {name: value for name, value in asdict(stored).items() if value is not None}
    k = content.pop("k", None)
    return content | {"settings": ({} if real(k) is None else {"k": k}) | content["settings"]}
