"""Numbers in words, the same in the terminal, in the progress bar and in the report."""

from __future__ import annotations

import math
from typing import Any


def real(value: Any) -> float | None:
    """Return a finite number as float, and None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an int beyond the range of float
        return None


def written(value: Any, form: str) -> str:
    """Write a number in a format of Python: what is not a finite number is called so.

    Where the format is of a few decimal places, a number that they would not show, or that is huge, is written as
    2.13e-06.
    """
    number = real(value)
    if number is None:
        return "not finite"
    text = format(number, form)
    has_places = form.endswith("f") and not form.endswith(".0f")
    is_shown = number == 0.0 or (1e-3 <= abs(number) < 1e5 and float(text.replace(",", "")) != 0.0)
    return text if is_shown or not has_places else format(number, ".2e")


def count(value: Any) -> str:
    """Write a count in full: 1,048,576."""
    return written(value, ",.0f")


def compact(value: Any) -> str:
    """Write a count in at most four characters and a unit: 950, 12.3k, 4.1M, 2.5B."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if (real(value) or 0.0) >= size * 0.9995:
            return f"{value / size:.3g}{unit}"
    return written(value, ".3g")


def percent(fraction: float) -> str:
    """Write a part of a whole: 0.7%, <0.1% where it is more than nothing."""
    return "<0.1%" if 0 < fraction < 0.0005 else f"{fraction:.1%}"


def duration(seconds: float) -> str:
    """Write a time: 83 seconds are 1 min 23 s."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60:,} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
