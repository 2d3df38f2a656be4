"""The final figures of a run in words, the same in the terminal and in the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flashsae.metrics import METRICS, OUTLIER_NORM_RATIO
from flashsae.metrics.numbers import count, percent, real
from flashsae.metrics.table import of_evaluation

FEW_TOKENS = 1000
"""Held-out figures of fewer are told with their number."""


@dataclass(frozen=True)
class Figure:
    """One figure of evaluation.json.

    Args:
        metric: its name there.
        name: a word or two.
        value: the number.
        whole: what it is a part of, such as "of 512"; may be empty.
        detail: the same seen from another side, such as "1.4%"; may be empty.
    """

    metric: str
    name: str
    value: str
    whole: str = ""
    detail: str = ""

    @property
    def note(self) -> str:
        """All but the value: "of 512 (1.4%)"."""
        return f"{self.whole} ({self.detail})" if self.whole and self.detail else self.whole or self.detail

    def line(self) -> str:
        """Return it all in one line."""
        return " ".join(filter(None, (self.value, self.whole, self.detail and f"({self.detail})")))


def final_figures(evaluation: Mapping[str, Any]) -> list[Figure]:
    """Return the figures that a run ends with. What is not a finite number is called so.

    Args:
        evaluation: the content of evaluation.json.
    """
    fvu, dead = real(evaluation["fvu"]), real(evaluation["dead_latents"])
    d_sae = real(evaluation["d_sae"])
    share = "" if dead is None or not d_sae else percent(dead / d_sae)
    figures = [_figure(evaluation, "fvu", detail="" if fvu is None else explained(fvu))]
    outliers = real(evaluation.get("outliers"))
    if outliers:
        which = f"{count(outliers)} of {count(evaluation['held_out_tokens'])} tokens"
        detail = f"less {which}, of norms above {OUTLIER_NORM_RATIO:g} times the median"
        figures.append(_figure(evaluation, "fvu_without_outliers", detail=detail))
    by_site = evaluation.get("site_fvu")
    for site, value in by_site.items() if isinstance(by_site, Mapping) else ():
        if real(value) is not None:
            row = of_evaluation("fvu")
            figures.append(Figure("fvu", f"{row.label} at {site}", row.show(value), detail=explained(value)))
    figures.append(_figure(evaluation, "l0"))
    figures.append(_figure(evaluation, "dead_latents", whole=f"of {count(evaluation['d_sae'])}", detail=share))
    if real(evaluation.get("tokens_per_second")) is not None:
        figures.append(_figure(evaluation, "tokens_per_second"))
    return figures


def result_lines(evaluation: Mapping[str, Any]) -> dict[str, str]:
    """Return the final figures by name, as the terminal prints them: those of few held-out tokens with their number.

    Args:
        evaluation: the content of evaluation.json.
    """
    lines = {figure.name: figure.line() for figure in final_figures(evaluation)}
    row = METRICS["held_out_tokens"]
    if evaluation[row.name] < FEW_TOKENS:
        lines[of_evaluation("fvu").label] += f", on {row.show(evaluation[row.name])} {row.label}"
    return lines


def _figure(evaluation: Mapping[str, Any], name: str, **others: str) -> Figure:
    row = of_evaluation(name)
    return Figure(name, row.label, row.show(evaluation.get(name)), **others)


def explained(fvu: float) -> str:
    """Say how much of the variance an SAE explains."""
    return f"{1 - fvu:.1%} of the variance explained" if fvu <= 1.0 else "worse than the mean"
