"""Several texts read as one, each with its share of the characters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from flashsae.errors import ConfigError, DataError
from flashsae.files.fingerprint import text_digest
from flashsae.text.dataset import Rows, TextDataset

_NAMED = "a mixture by characters of"


@dataclass(frozen=True)
class Mixture(TextDataset):
    """Texts that are read in turns: next is always a document of the one that lags most behind its share.

    Args:
        parts: the texts.
        weights: of each; only their ratio counts.
    """

    parts: tuple[TextDataset, ...] = ()
    weights: tuple[float, ...] = ()

    @property
    def holds_chats(self) -> bool:
        """Whether any part is chats."""
        return any(part.holds_chats for part in self.parts)


def mixed(parts: Sequence[tuple[TextDataset, float]]) -> TextDataset:
    """Return texts as one, each with its share of the characters (of tokens: four a token).

    Which document comes next follows from the weights and from the lengths of those before it alone, so that going on
    at any place gives what would have come; the documents before it are read again for it. A text that ends begins
    again, so that the shares hold, until each was read to its end once. Document j of part i of n has the number
    j n + i, whatever the weights are.

    Args:
        parts: texts and their weights, of which only the ratio counts.
    Raises:
        ConfigError: there is no part, or a weight is not above 0.
    """
    if not parts or not all(0 < weight < float("inf") for _, weight in parts):
        raise ConfigError(f"dataset: expected texts with weights above 0, got the weights {[w for _, w in parts]}.")
    if len(parts) == 1:
        return parts[0][0]
    texts = tuple(text for text, _ in parts)
    weights = tuple(float(weight) for _, weight in parts)
    total = sum(weights)
    shares = [f"{weight / total:.3%}".rstrip("%").rstrip("0").rstrip(".") + "%" for weight in weights]
    name = f"{_NAMED} " + " and ".join(f"{s} {text.name}" for s, text in zip(shares, texts))

    def identify() -> str:
        found: dict[str, str] = {}
        for text in texts:
            if text.fingerprint in found:
                raise DataError(
                    f"dataset: {text.name} holds the same documents as {found[text.fingerprint]}, which would be in "
                    "both parts of the held-out split. Name it once, with the sum of their weights."
                )
            found[text.fingerprint] = text.name
        return text_digest(["mixture", *(f"{w / total!r} {told}" for w, told in zip(weights, found))])

    return Mixture(
        name,
        lambda start: _rows(texts, weights, start),
        identify,
        is_cut_at_blanks=any(text.is_cut_at_blanks for text in texts),
        parts=texts,
        weights=weights,
    )


def names_of_parts(name: str) -> list[str]:
    """Return what the texts of a mixture are called, from its own name; the name itself of any other text."""
    _, *parts = re.split(rf"(?:^{_NAMED}|(?<!^) and) \d+(?:\.\d+)?% ", name)
    return parts if name.startswith(_NAMED) and parts else [name]


def _rows(texts: Sequence[TextDataset], weights: Sequence[float], start: int) -> Rows:
    readers = [text.rows(0) for text in texts]
    ahead = [next(reader, None) for reader in readers]  # so that the end of a text is seen with its last document
    behind = [0.0] * len(texts)
    unread = set(range(len(texts)))
    place = 0
    while unread:
        turn = behind.index(min(behind))
        row = ahead[turn]
        if row is None:  # nothing is left of it, so it cannot hold its share
            return
        number, content = row
        behind[turn] += len(content) / weights[turn]
        if place >= start:
            yield number * len(texts) + turn, content
        place += 1
        ahead[turn] = next(readers[turn], None)
        if ahead[turn] is None:
            unread.discard(turn)
            readers[turn] = texts[turn].rows(0)
            ahead[turn] = next(readers[turn], None)
