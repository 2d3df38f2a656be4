"""Between SAEs and what a file holds of them, whatever its format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from flashsae.formats.content import Content
from flashsae.sae.module import SAE
from flashsae.sae.stored import config_from, content_from, values_from


def content_of(
    sae: SAE, metadata: Mapping[str, Any] | None = None, extras: Mapping[str, Tensor] | None = None
) -> Content:
    """Return what a file holds of an SAE, on the CPU.

    Args:
        sae: of any architecture.
        metadata: anything JSON can hold.
        extras: [d_sae] each: what is known of every latent.
    Raises:
        ShapeError, DtypeError: an extra is not [d_sae], or parameters have different dtypes.
    """
    return content_from(sae.config, sae.saved_state(), metadata or {}, extras or {})


def sae_of(content: Content, where: Path | str = "the content") -> SAE:
    """Return the SAE, on the CPU and in `eval()` mode; it shares the tensors.

    What no file of another library has, such as a count of steps, is as it is at the start of a training.

    Args:
        content: of any format.
        where: it was read from, for messages.
    Raises:
        CheckpointError: its tensors do not fit its architecture, or there is none of this name here.
    """
    config = config_from(content, where)
    values = values_from(content, config, where)
    sae = SAE(config, seed=None, dtype=content.dtype, device="meta")
    sae.load_state_dict(values, assign=True)
    return sae.eval()
