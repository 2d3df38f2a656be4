"""The model card of published SAEs, made of their runs: README.md, with what the hub reads at its head."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flashsae.errors import require
from flashsae.places.hub import Place
from flashsae.publish.content import Published
from flashsae.publish.markdown import Raw, code, template
from flashsae.publish.tables import all_settings, definitions, figures, lead, title, which
from flashsae.publish.ways import of_others, ways
from flashsae.report.plots import Plot
from flashsae.settings.reading import MINILM

_TAGS = ("sparse-autoencoder", "sae", "interpretability", "mechanistic-interpretability")
_ON_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_FILE = re.compile(r".*\.(txt|jsonl?|csv|tsv|parquet|arrow|npy|bin|gz|zst)", re.IGNORECASE)
_KNOWN = {
    MINILM: "sentence-transformers/all-MiniLM-L6-v2",
    "distilgpt2": "distilbert/distilgpt2",
    **{name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")},
}
"""Names without an owner, and what they are on the hub."""


@dataclass(frozen=True)
class Card:
    """What a card is made of.

    Args:
        place: where it will stand.
        saes: what it is of.
        formats: by the name of an SAE those of other libraries that lie beside ours.
        sets: formats of other libraries that have all SAEs in one folder beside it.
        pictures: that lie beside it, in pictures/.
        remarks: sentences on what is not there.
        license: of the hub's names; None where none is given.
    """

    place: Place
    saes: Sequence[Published]
    formats: Mapping[str, Sequence[str]]
    sets: Sequence[str] = ()
    pictures: Sequence[Plot] = ()
    remarks: Sequence[str] = ()
    license: str | None = None

    def text(self) -> str:
        """Return README.md.

        Raises:
            MissingExtraError: jinja2 or pyyaml is not installed.
        """
        first, several = self.saes[0], len(self.saes) > 1
        path = "/".join(filter(None, (self.place.path, first.name)))
        found = [*ways(replace(self.place, path=path), self.formats[first.name]), *of_others(self.place, self.sets)]
        body = template("card.md.j2").render(
            title=title(self.saes),
            lead=lead(self.saes),
            figures=[which(self.saes), definitions(self.saes)] if several else figures(first),
            ways=[{"title": way.title, "code": Raw(way.code)} for way in found],
            pictures=self.pictures,
            settings=all_settings(self.saes),
            made=[*_made(self.saes), *self.remarks],
            several=several,
        )
        yaml = require("yaml", "hf")
        head = yaml.safe_dump(self._head(), sort_keys=False, allow_unicode=True, width=1000)
        return f"---\n{head}---\n\n" + re.sub(r"\n{3,}", "\n\n", body).strip() + "\n"

    def _head(self) -> dict[str, Any]:
        """Return what the hub reads of it."""
        kinds = [re.sub(r"[^a-z0-9]+", "-", sae.architecture.name.lower()) for sae in self.saes]
        formats = [name for names in (*self.formats.values(), self.sets) for name in names]
        models = dict.fromkeys(_KNOWN.get(name, name) for sae in self.saes for name in _on_hub(sae, "model"))
        datasets = dict.fromkeys(name for sae in self.saes for name in _on_hub(sae, "dataset"))
        head: dict[str, Any] = {"library_name": "flashsae", "tags": list(dict.fromkeys([*_TAGS, *kinds, *formats]))}
        if len(models) == 1:
            head["base_model"] = next(iter(models))
        if datasets:
            head["datasets"] = list(datasets)
        return head | ({} if self.license is None else {"license": self.license})


def _on_hub(sae: Published, setting: str) -> list[str]:
    """Return which of the models or data sets that a setting names lie on the hub: none that lies here."""
    if any(name.endswith(f": {setting}") for name in sae.shortened):
        return []
    names = [word.partition("@")[0] for word in re.split(r"[,\s]+", sae.told(setting))]
    return [
        name
        for name in names
        if (name in _KNOWN or _ON_HUB.fullmatch(name)) and not _FILE.fullmatch(name) and not Path(name).exists()
    ]


def _made(saes: Sequence[Published]) -> list[Any]:
    versions = ", ".join(dict.fromkeys(sae.version for sae in saes))
    by = Raw(f"[FlashSAE](https://github.com/flashsae/flashsae) {code(versions)}")
    if saes[0].run is None:
        return [Raw(f"Written by {by}.")]
    config = "[config.toml](config.toml)" if len(saes) == 1 else "the config.toml in their folders"
    sentences = [Raw(f"Trained by {by} with the settings of {config}, which `flashsae train --config` takes.")]
    shortened = dict.fromkeys(name.rpartition(": ")[2] for sae in saes for name in sae.shortened)
    if shortened:
        names = ", ".join(map(code, shortened))
        sentences.append(
            Raw(f"Of what lay in a folder of its author, only the last part of the path is told: {names}.")
        )
    return sentences
