"""What products are computed in; docs/numerics.md."""

from __future__ import annotations

from typing import Literal

Precision = Literal["float32", "tf32", "bf16"]
"""float32 is certified on a GPU; tf32 and bf16 are what their names say, with float32 accumulation."""
