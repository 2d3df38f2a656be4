"""Which tokens a latent makes likelier: the product of its decoder row and the unembedding of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flashsae.errors import ConfigError
from flashsae.neuronpedia.records import TokenLogit
from flashsae.report.tokens import token_text

SHOWN = 10
"""Tokens at either end."""
_AT_ONCE = 128


@dataclass(frozen=True)
class Ends:
    """The tokens whose logits a latent raises most, and lowers most, the strongest first."""

    top: list[TokenLogit]
    bottom: list[TokenLogit]


@torch.no_grad()
def ends_of(rows: Tensor, unembedding: Tensor, tokenizer: object) -> list[Ends]:
    """Return for each decoder row the ends of  unembedding @ row,  what a final norm does left out.

    Args:
        rows: [n, d_out].
        unembedding: [vocabulary, d_model].
        tokenizer: of the model.
    Raises:
        ConfigError: the rows are of another width than the unembedding.
    """
    if rows.shape[1] != unembedding.shape[1]:
        raise ConfigError(
            f"logits: decoder rows have {rows.shape[1]} coordinates and the unembedding of the model "
            f"{unembedding.shape[1]}: they can be had of SAEs of the residual stream alone. Leave --logits out."
        )
    text, words = token_text(tokenizer), dict[int, str]()
    weights, count = unembedding.float(), min(SHOWN, len(unembedding))

    def told(values: Tensor, ids: Tensor) -> list[TokenLogit]:
        for token in ids.tolist():
            words.setdefault(token, "".join(text([token])).replace("\0", " "))
        return [TokenLogit(words[token], round(value, 4)) for token, value in zip(ids.tolist(), values.tolist())]

    found: list[Ends] = []
    for part in torch.split(rows.float(), _AT_ONCE):
        logits = part @ weights.T
        top, bottom = logits.topk(count), logits.topk(count, largest=False)
        found += [
            Ends(told(*high), told(*low))
            for high, low in zip(zip(top.values, top.indices), zip(bottom.values, bottom.indices))
        ]
    return found


def no_ends(count: int) -> Sequence[Ends]:
    """Return what stands for ends that nobody asked for."""
    return [Ends([], [])] * count
