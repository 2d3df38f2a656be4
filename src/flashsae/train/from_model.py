"""Train an SAE on a model that is loaded, as it reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from flashsae.data.examples import Inputs
from flashsae.data.from_model import READING, activations
from flashsae.neutral import neutral
from flashsae.sae.module import SAE
from flashsae.train.config import TrainConfig
from flashsae.train.fit import fit


@neutral()
def train(
    model: nn.Module | str,
    tokenizer: Any = None,
    texts: Any = None,
    *,
    hookpoint: str | Sequence[str],
    tokens: int,
    inputs: Inputs | None = None,
    held_out: float = 0.0,
    config: TrainConfig | None = None,
    run: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    **settings: Any,
) -> SAE:
    """Train an SAE on the activations of a model: `train(model, tokenizer, texts, hookpoint="h.6", tokens=10**8)`.

    The model reads beside the training, and nothing is cached; `flashsae train`, the command, can cache, evaluates, and
    draws a report.

    Args:
        model, tokenizer, texts, inputs: as for `flashsae.activations`.
        hookpoint: where its activations are taken: a module path, or as many as the architecture has sites.
        tokens: to train on, or positions of inputs; what is read is read again where they are fewer.
        held_out: fraction of the texts or examples that training leaves out, for `flashsae.evaluate`.
        config, run, resume, progress: as for `flashsae.fit`.
        settings: every setting of `flashsae.TrainConfig`, of the architecture, and of reading, by name.
    Returns:
        the trained SAE, in `eval()` mode, on the device it was trained on.
    Raises:
        FlashSAEError: what `flashsae.activations` and `flashsae.fit` raise.
    """
    of_reading = {name: settings.pop(name) for name in READING.intersection(settings)}
    acts = activations(model, tokenizer, texts, hookpoint=hookpoint, inputs=inputs, held_out=held_out, **of_reading)
    return fit(acts, config=config, run=run, resume=resume, progress=progress, tokens=tokens, **settings)
