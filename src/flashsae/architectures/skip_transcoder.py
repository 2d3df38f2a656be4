"""Skip transcoders: a transcoder with a linear map from the input of a module to its output beside the code.

    code = selection of W_enc x + b_enc;   y_hat = W_dec code + W_skip x + b_dec;   loss ‖y − y_hat‖²

W_skip [d_out, d_in] starts at 0, so that a skip transcoder starts as the transcoder of the file `transcoder.py` does.
Its gradient is a dense product, −2 Σ over tokens of residual xᵀ, and its Adam step one of the latent pass, like that of
every other matrix.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import flashsae
from flashsae.architecture import Architecture, Parameter, composed_name, composed_settings
from flashsae.architectures import transcoder

BASE = transcoder.BASE


def skip(sae: Any, x: Any) -> Any:
    """Return W_skip x, [B, d_out], float32 or wider."""
    return flashsae.ops.linear(x - sae.x_mean if sae.centres else x, sae.W_skip, precision=sae.precision)


def compose(base: Architecture) -> Architecture:
    """Return the skip transcoder with the selection of another architecture."""
    name = composed_name("skip_transcoder", base, BASE)
    made = transcoder.compose(base)

    def recenter(sae: Any, moved: Any) -> None:
        (base.recenter or flashsae.sae.shift_b_enc)(sae, moved)
        sae.b_dec.add_(flashsae.sae.products(sae.W_skip, moved))

    return replace(
        made,
        name=name,
        title=f"{base.title} skip transcoder",
        settings=composed_settings(name, base.settings),
        parameters=(*made.parameters, Parameter("W_skip", ("d_out", "d_in"), "what goes past the code")),
        direct=skip,
        recenter=recenter,
        source=f"Paulo, Shabalin and Belrose 2025, section 3; {base.source}",
    )
