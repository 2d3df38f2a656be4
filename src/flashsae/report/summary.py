"""The final figures of a run in words, the same in the terminal and in the report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flashsae.metrics import OUTLIER_NORM_RATIO


@dataclass(frozen=True)
class Figure:
    """One figure of evaluation.json.

    Args:
        name: a word or two.
        value: the number.
        whole: what it is a part of, such as "of 512"; may be empty.
        detail: the same seen from another side, such as "1.4%"; may be empty.
    """

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
    figures = [
        Figure("held-out FVU", fvu_text(evaluation["fvu"]), "", "" if fvu is None else explained(fvu)),
        *_without_outliers(evaluation),
        Figure("L0", _written(evaluation["l0"], ".1f")),
        Figure("dead latents", count(evaluation["dead_latents"]), f"of {count(evaluation['d_sae'])}", share),
    ]
    if real(evaluation.get("tokens_per_second")) is not None:
        figures.append(Figure("tokens/s", count(evaluation["tokens_per_second"])))
    return figures


def _without_outliers(evaluation: Mapping[str, Any]) -> list[Figure]:
    outliers = real(evaluation.get("outliers"))
    if not outliers:
        return []
    which = f"{count(outliers)} of {count(evaluation['held_out_tokens'])} tokens"
    fvu = fvu_text(evaluation.get("fvu_without_outliers"))
    return [
        Figure("without outliers", fvu, "", f"less {which}, of norms above {OUTLIER_NORM_RATIO:g} times the median")
    ]


def explained(fvu: float) -> str:
    """Say how much of the variance an SAE explains."""
    return f"{1 - fvu:.1%} of the variance explained" if fvu <= 1.0 else "worse than the mean"


def real(value: Any) -> float | None:
    """Return a finite number as float, and None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an int beyond the range of float
        return None


def fvu_text(value: Any) -> str:
    """Write an FVU: 0.0896, and 2.13e-06 where four places would show nothing."""
    size = abs(real(value) or 0.0)
    return _written(value, ".4f" if size == 0.0 or 1e-3 <= size < 1e5 else ".2e")


def count(value: Any) -> str:
    """Write a count in full: 1,048,576."""
    return _written(value, ",.0f")


def compact(value: Any) -> str:
    """Write a count in at most four characters and a unit: 950, 12.3k, 4.1M, 2.5B."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if (real(value) or 0.0) >= size * 0.9995:
            return f"{value / size:.3g}{unit}"
    return _written(value, ".3g")


def percent(fraction: float) -> str:
    """Write a part of a whole: 0.7%, <0.1% where it is more than nothing."""
    return "<0.1%" if 0 < fraction < 0.0005 else f"{fraction:.1%}"


def duration(seconds: float) -> str:
    """Write a time: 83 seconds are 1 min 23 s."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60:,} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _written(value: Any, form: str) -> str:
    number = real(value)
    return "not finite" if number is None else format(number, form)
