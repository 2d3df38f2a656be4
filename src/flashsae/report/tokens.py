"""The text of single tokens, such that the tokens of a sequence joined together read as text."""

from __future__ import annotations

import codecs
import re
from typing import Any

_CLOSING = frozenset(".,!?;:)]}%-/_")
_OPENING = frozenset("([{$-/_")
_APOSTROPHES = frozenset("'’")
_CONTRACTIONS = frozenset({"s", "t", "re", "ve", "ll", "d", "m"})
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def token_strings(tokenizer: Any, ids: list[int]) -> list[str]:
    """Return the text that each token adds to a sequence; joined with nothing between, they read as text.

    A character that spans several byte-level tokens goes to the token that completes it; the tokens before it
    are empty strings.

    Args:
        tokenizer: of transformers: word pieces, byte-level BPE or sentencepiece.
        ids: consecutive tokens of one text.
    Returns:
        one string a token. Leading spaces belong to the token that they introduce.
    """
    pieces = [piece or "\ufffd" for piece in tokenizer.convert_ids_to_tokens(ids)]
    if _joins(tokenizer, "##b", "ab"):
        return _word_pieces(pieces)
    if _joins(tokenizer, "Ġb", "a b"):
        return _decode([_byte_level(piece) for piece in pieces])
    if _joins(tokenizer, "▁b", "a b"):
        return _decode([_sentence_piece(piece) for piece in pieces])
    return [str(tokenizer.decode([token])) for token in ids]


def _joins(tokenizer: Any, piece: str, joined: str) -> bool:
    """Tell a kind of tokenizer by what it makes of `piece` behind an "a"; the classes have no better mark."""
    return str(tokenizer.convert_tokens_to_string(["a", piece])).strip() == joined


def _word_pieces(pieces: list[str]) -> list[str]:
    """Word pieces do not store spaces: put them where English has them."""
    strings = []
    for i, piece in enumerate(pieces):
        if piece.startswith("##"):
            strings.append(piece[2:])
        else:
            strings.append(piece if i == 0 or _glued(pieces, i) else f" {piece}")
    return strings


def _glued(pieces: list[str], i: int) -> bool:
    """Tell whether word piece i stands directly behind the one before it."""
    piece, before = pieces[i], pieces[i - 1]
    if piece in _CLOSING or before in _OPENING:
        return True
    if piece in _APOSTROPHES:
        return i + 1 < len(pieces) and pieces[i + 1] in _CONTRACTIONS and before.isalpha()
    if before in _APOSTROPHES:
        return piece in _CONTRACTIONS and i > 1 and pieces[i - 2].isalpha()
    return before in {".", ","} and piece.isdigit() and i > 1 and pieces[i - 2].isdigit()


def _byte_alphabet() -> dict[str, int]:
    """Invert the alphabet of byte-level BPE: printable bytes are themselves, the others U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _byte_level(piece: str) -> bytes:
    try:
        return bytes(_BYTE_OF[letter] for letter in piece)
    except KeyError:  # an added token, stored as it is
        return piece.encode("utf-8", "replace")


def _sentence_piece(piece: str) -> bytes:
    byte = _BYTE_PIECE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode("utf-8", "replace")


def _decode(parts: list[bytes]) -> list[str]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    strings = [decoder.decode(part) for part in parts]
    if strings:
        strings[-1] += decoder.decode(b"", final=True)
    return strings
