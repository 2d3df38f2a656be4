"""What a model card tells: what the SAEs are, their figures with what these mean, and their settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flashsae.metrics.numbers import count, real
from flashsae.metrics.table import METRICS, Metric, of_evaluation
from flashsae.publish.content import Published
from flashsae.publish.markdown import Raw, code, escaped
from flashsae.report.comparison import Compared, differing, shared_settings
from flashsae.report.setting_text import flat, setting_text
from flashsae.report.summary import final_figures

_COMPARED = ("fvu", "l0", "dead_latents")
_BESIDE = ("held_out_tokens", "train_tokens", "steps")
_BETTER = {None: "", "lower": " Lower is better.", "higher": " Higher is better."}
_MOST_NAMED = 6


@dataclass(frozen=True)
class Table:
    """A table under a heading.

    Args:
        title: the heading.
        head: of its columns.
        rows: of cells: text, or Markdown where it is `Raw`.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def title(saes: Sequence[Published]) -> str:
    """Return what the SAEs are in a few words: TopK of gpt2, h.6."""
    kinds = list(dict.fromkeys(map(_kind, saes)))
    kind = kinds[0] if len(kinds) == 1 else "SAEs"
    where = [_few([sae.told(name) for sae in saes]) for name in ("model", "hookpoint")]
    of = " of " if any(where) else ""
    return f"{f'{len(saes)} × ' if len(saes) > 1 and len(kinds) == 1 else ''}{kind}{of}{', '.join(filter(None, where))}"


def _kind(sae: Published) -> str:
    name = sae.architecture.title
    return name if name.endswith("coder") else f"{name} SAE"


def lead(saes: Sequence[Published]) -> list[str]:
    """Return sentences that say what the SAEs are, and on what data they were trained."""
    first, where = saes[0], _places(saes)
    if len(saes) > 1:
        of_what = f" for the activations of {where}" if where else ""
        return [Raw(f"{len(saes)} sparse autoencoders (SAEs){of_what}."), *_data(saes)]
    kind = escaped(_kind(first)) + (" (sparse autoencoder)" if _kind(first).endswith("SAE") else "")
    sizes = f"{count(first.description.d_sae)} latents for the {count(first.description.d_in)} numbers"
    of_what = f" of the activations of {where}" if where else " of an activation"
    l0 = real(first.evaluation.get("l0"))
    active = f"; {METRICS['l0'].show(l0)} are active for a token" if l0 is not None else ""
    return [Raw(f"{kind} with {sizes}{of_what}{active}."), *_data(saes)]


def _places(saes: Sequence[Published]) -> str:
    hookpoints, models = (
        _few([code(sae.told(name)) for sae in saes if sae.told(name)]) for name in ("hookpoint", "model")
    )
    return " of ".join(filter(None, (hookpoints, models)))


def _data(saes: Sequence[Published]) -> list[str]:
    """Say what the SAEs were trained on."""
    told = dict.fromkeys(_data_of(sae) for sae in saes)
    return [Raw(sentence) for sentence in told if sentence]


def _data_of(sae: Published) -> str:
    dataset = sae.told("dataset")
    if not dataset:
        return ""
    beside = [
        f"{name} {code(sae.settings[f'text_{name}'])}"
        for name in ("subset", "split")
        if sae.settings.get(f"text_{name}")
    ]
    context = sae.settings.get("context_length") or sae.description.metadata.get("context_length")
    of_context = f", {count(context)} tokens at a time" if real(context) is not None else ""
    tokens = real(sae.evaluation.get("train_tokens"))
    n = f"{count(tokens)} tokens of " if tokens is not None else ""
    return f"Trained on {n}{', '.join([code(dataset), *beside])}{of_context}."


def figures(sae: Published) -> list[Table]:
    """Return the figures of an SAE, each with what it means; none of one that was not measured."""
    head = ("figure", "value", "what it is")
    if sae.evaluation:
        found = [(each.name, each.line(), of_evaluation(each.metric)) for each in final_figures(sae.evaluation)]
        rows = [of_evaluation(name) for name in _BESIDE if real(sae.evaluation.get(name)) is not None]
        found += [(row.label, row.show(sae.evaluation[row.name]), row) for row in rows]
    else:
        told = sae.description.metadata.get("metrics")
        known = told if isinstance(told, Mapping) else {}
        found = [
            (of_evaluation(n).label, of_evaluation(n).show(v), of_evaluation(n))
            for n, v in known.items()
            if n in METRICS
        ]
    return [Table("Figures", head, [(name, value, _meaning(row)) for name, value, row in found])] if found else []


def _meaning(row: Metric) -> Raw:
    formula = f" {code(row.formula)}" if row.formula else ""
    return Raw(f"{escaped(f'{row.caption}{_BETTER[row.direction]}')}{formula}")


def which(saes: Sequence[Published]) -> Table:
    """Return a row for each of several SAEs: its folder, what differs, and its figures."""
    compared = _compared(saes)
    names = differing(compared)
    head = ["SAE", *names, *(of_evaluation(name).label for name in _COMPARED)]
    rows = []
    for sae in saes:
        values = [setting_text(sae.settings[name]) if name in sae.settings else "" for name in names]
        shown = [of_evaluation(name).show(sae.evaluation.get(name)) for name in _COMPARED]
        rows.append([code(sae.name), *values, *shown])
    return Table("The SAEs", head, rows)


def definitions(saes: Sequence[Published]) -> Table:
    """Return what the figures of several SAEs mean."""
    names = [*_COMPARED, *_BESIDE[:1]]
    rows = [of_evaluation(name) for name in names if any(name in sae.evaluation for sae in saes)]
    return Table("What the figures mean", ("figure", "what it is"), [(row.label, _meaning(row)) for row in rows])


def all_settings(saes: Sequence[Published]) -> list[tuple[str, str]]:
    """Return the settings of an SAE, or those that several have alike."""
    first = saes[0]
    if len(saes) > 1:
        return [(code(name), value) for name, value in shared_settings(_compared(saes))]
    own = first.settings or {
        "architecture": first.description.architecture,
        **first.description.settings,
        **{name: getattr(first.description, name) for name in ("d_in", "d_out", "d_sae", "dtype")},
    }
    return [(code(name), setting_text(value)) for name, value in flat(own)]


def _compared(saes: Sequence[Published]) -> list[Compared]:
    return [Compared(sae.folder, sae.settings, sae.evaluation, None) for sae in saes]


def _few(names: Sequence[str]) -> Any:
    """Return names, each once; of many the first and how many there are."""
    different = list(dict.fromkeys(filter(None, names)))
    if len(different) <= _MOST_NAMED:
        return ", ".join(different)
    return f"{different[0]} and {len(different) - 1} more"
