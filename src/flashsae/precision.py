"""What products are computed in; docs/numerics.md."""

from __future__ import annotations

from typing import Literal

Operand = Literal["float32", "tf32", "bf16"]
"""What the operands of products are rounded to: nothing, TF32 or bfloat16."""

Precision = Literal["float32", "tf32", "bf16", "bf16-int8", "float32-int8"]
"""float32 is certified on a GPU; tf32 and bf16 are what their names say, with float32 accumulation. Those that end in
-int8 select by float32 dot products of bf16 or of float32 operands, which an 8-bit product screens."""

_SCREENED: dict[str, Operand] = {"bf16-int8": "bf16", "float32-int8": "float32"}


def operand_of(precision: Precision | str) -> Operand:
    """Return what operands are rounded to in a precision; all that is not selected is computed as in this one."""
    return _SCREENED.get(precision, precision)  # type: ignore[arg-type]


def is_rounded(precision: Precision | str | None) -> bool:
    """Return whether operands are rounded to bfloat16."""
    return precision is not None and operand_of(precision) == "bf16"


def has_screen(precision: Precision | str | None) -> bool:
    """Return whether latents are screened in 8 bits before they are selected, on a GPU."""
    return precision in _SCREENED
