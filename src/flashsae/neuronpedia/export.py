"""Write the latents of a run as Neuronpedia reads them: `flashsae neuronpedia`."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from flashsae.errors import CheckpointError, ConfigError
from flashsae.files.atomic import atomic_directory
from flashsae.neuronpedia.logits import Ends, ends_of, no_ends
from flashsae.neuronpedia.records import (
    MOST_FEATURES,
    ActivationRow,
    FeatureRow,
    ModelRow,
    ReleaseRow,
    SourceRow,
    SourceSetRow,
    UploadActivation,
    UploadBatch,
    UploadFeature,
)
from flashsae.neuronpedia.source import NamedSource, read_run
from flashsae.places.finding import find, only
from flashsae.report.snippet_file import LatentSnippets, Snippet, Snippets
from flashsae.settings.kinds import expand

Kind = Literal["upload", "bulk"]
CREATOR_ID = "clkht01d40000jv08hvalcvly"
"""The user that Neuronpedia's own tools name where nobody else is named."""
_ADVICE = "give another folder."


@dataclass(frozen=True)
class Asked:
    """How the latents of a run are to be written.

    Args:
        set_name: of SAEs of several layers, which this one is of.
        model_id: what Neuronpedia calls the model. None: by its name.
        layer: number of the block. None: by the hookpoint.
        kind: "upload" for bodies of requests of its client, "bulk" for the folder that it imports.
        logits: load the model and tell the tokens that each latent raises and lowers most.
        creator: who made the SAE, for people.
        creator_id: the user of Neuronpedia whose rows these are; of "bulk".
    """

    set_name: str
    model_id: str | None = None
    layer: int | None = None
    kind: Kind = "upload"
    logits: bool = False
    creator: str = "FlashSAE"
    creator_id: str = CREATOR_ID


def export(run: Path, out: Path, asked: Asked) -> Path:
    """Write the latents that the report of a run shows, for Neuronpedia.

    Args:
        run: folder of a finished run of one SAE that read texts.
        out: of "upload", a folder, which must not exist; of "bulk", one that receives MODEL/LAYER-SET, which must not.
        asked: how.
    Returns:
        the folder that was made.
    Raises:
        ConfigError: the run read no texts or has several SAEs, a name cannot be one there, there are no logits, or
            a path is none of this machine.
        CheckpointError: it has not finished, or a file of it is damaged.
        StorageError: the folder exists or cannot be made.
    """
    run, out = expand(run, "run"), expand(out, "out")
    settings, snippets = read_run(run)
    source = NamedSource.of(settings, asked.set_name, asked.model_id, asked.layer)
    ends = _ends(run, settings, snippets) if asked.logits else no_ends(len(snippets.latents))
    folder = out if asked.kind == "upload" else out / source.model_id / source.id
    with atomic_directory(folder, advice=_ADVICE) as made:
        if asked.kind == "upload":
            _write_upload(made, source, snippets, ends)
        else:
            _write_bulk(made, source, snippets, ends, asked, settings)
    return folder


def _ends(run: Path, settings: dict[str, Any], snippets: Snippets) -> Sequence[Ends]:
    from flashsae.lm.options import LoadOptions
    from flashsae.lm.unembedding import load_unembedding
    from flashsae.settings.run import RunConfig

    content, _ = only(find(run), run)
    rows = content.tensors["W_dec"]
    indices = [latent.index for latent in snippets.latents]
    if max(indices) >= len(rows):
        raise CheckpointError(
            f"{run / 'snippets.json'} is damaged: the SAE has no latent {max(indices)}. Evaluate the run again to "
            "rewrite it."
        )
    options = LoadOptions.of(RunConfig.from_toml(run / "config.toml").activations)
    unembedding, tokenizer = load_unembedding(str(settings["model"]), options)
    return ends_of(rows[indices], unembedding, tokenizer)


def _write_upload(folder: Path, source: NamedSource, snippets: Snippets, ends: Sequence[Ends]) -> None:
    features = [
        UploadFeature(
            latent.index,
            latent.density,
            [_uploaded(latent, snippet, snippets.tokens) for snippet in latent.snippets],
            [],
            each.top,
            each.bottom,
        )
        for latent, each in zip(snippets.latents, ends)
    ]
    for number, part in enumerate(_batches(features)):
        batch = UploadBatch(source.model_id, source.id, list(part))
        (folder / f"batch-{number}.json").write_text(_json(asdict(batch)) + "\n", "utf-8")


def _batches(rows: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for first in range(0, len(rows), MOST_FEATURES):
        yield rows[first : first + MOST_FEATURES]


def _uploaded(latent: LatentSnippets, snippet: Snippet, tokens: int) -> UploadActivation:
    return UploadActivation(_texts(snippet), snippet.acts, *_bin(latent, snippet, tokens))


def _texts(snippet: Snippet) -> list[str]:
    return [token.replace("\0", " ").encode("utf-8", "replace").decode("utf-8") for token in snippet.tokens]


def _edges(latent: LatentSnippets) -> tuple[float, float, float]:
    """Return where the histogram of a latent begins and ends, and the width of a bin."""
    low, high = min(0.0, latent.max_act, latent.least_act), max(0.0, latent.max_act, latent.least_act)
    return low, high, (high - low) / max(1, len(latent.histogram))


def _bin(latent: LatentSnippets, snippet: Snippet, tokens: int) -> tuple[float | None, float | None, float | None]:
    """Return the bin of the histogram that the peak of a snippet lies in, and which part of all tokens it holds."""
    low, _, width = _edges(latent)
    if not latent.histogram or width <= 0 or tokens < 1:
        return None, None, None
    place = min(len(latent.histogram) - 1, max(0, int((snippet.acts[snippet.peak] - low) / width)))
    share = min(1.0, latent.histogram[place] / tokens)
    return low + place * width, low + (place + 1) * width, share


def _write_bulk(
    folder: Path, source: NamedSource, snippets: Snippets, ends: Sequence[Ends], asked: Asked, settings: dict[str, Any]
) -> None:
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    about = f"{settings.get('hookpoint')} of {settings.get('model')}".rpartition("/")[2]
    by, name = asked.creator_id, source.set_name
    rows_of_files: dict[str, Any] = {
        "release": ReleaseRow(name, about, asked.creator, by, now, about, asked.creator, name),
        "model": ModelRow(
            source.model_id, source.model_id.endswith(("-it", "-instruct")), by, source.layer + 1, now, now,
            source.model_id, source.model_id, name,
        ),
        "sourceset": SourceSetRow(source.model_id, name, by, name, now, about, asked.creator),
        "source": SourceRow(
            source.id, source.model_id, name, by, now, _dataset(settings), settings.get("context_length") or None
        ),
    }  # fmt: skip
    for file, row in rows_of_files.items():
        (folder / f"{file}.jsonl").write_text(_json(asdict(row)) + "\n", "utf-8")
    for kind in ("features", "activations"):
        (folder / kind).mkdir()
    for number, part in enumerate(_batches(list(zip(snippets.latents, ends)))):
        features = [_feature(source, latent, each, by, now) for latent, each in part]
        texts = [row for latent, _ in part for row in _activations(source, latent, snippets.tokens, by, now)]
        of_kinds: dict[str, list[Any]] = {"features": features, "activations": texts}
        for kind, rows in of_kinds.items():
            lines = "".join(_json(asdict(row)) + "\n" for row in rows)
            packed = gzip.compress(lines.encode("utf-8"), 6, mtime=0)
            (folder / kind / f"batch-{number}.jsonl.gz").write_bytes(packed)


def _feature(source: NamedSource, latent: LatentSnippets, ends: Ends, by: str, now: str) -> FeatureRow:
    low, _, width = _edges(latent)
    return FeatureRow(
        source.model_id, source.id, str(latent.index), source.set_name, by, now, latent.max_act, latent.density,
        [float(count) for count in latent.histogram],
        [low + (place + 0.5) * width for place in range(len(latent.histogram))],
        [each.token for each in ends.top], [each.value for each in ends.top],
        [each.token for each in ends.bottom], [each.value for each in ends.bottom],
    )  # fmt: skip


def _activations(
    source: NamedSource, latent: LatentSnippets, tokens: int, by: str, now: str
) -> Iterator[ActivationRow]:
    for number, snippet in enumerate(latent.snippets):
        name = "\0".join((source.model_id, source.id, str(latent.index), str(number)))
        largest = max(snippet.acts)
        yield ActivationRow(
            "c" + hashlib.sha256(name.encode()).hexdigest()[:24],  # the same again, which an import passes over
            source.model_id, source.id, str(latent.index), _texts(snippet), snippet.acts, largest,
            snippet.acts.index(largest), min(snippet.acts), by, now, *_bin(latent, snippet, tokens), snippet.peak,
        )  # fmt: skip


def _dataset(settings: dict[str, Any]) -> str | None:
    """Return the data set of a run; of files on this machine the last part of their path."""
    dataset = settings.get("dataset")
    if not isinstance(dataset, str) or not dataset:
        return None
    return Path(dataset).name if dataset.startswith(("/", "~", ".", "\\")) or Path(dataset).exists() else dataset


def _json(content: Any) -> str:
    try:
        return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError as error:
        raise ConfigError(f"a figure of the run is no number that JSON holds ({error}).") from error
