"""The text of single tokens, such that the tokens of a sequence joined together read as text."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

TokenText = Callable[[list[int]], list[str]]
"""Ids of consecutive tokens -> the text of each: `token_strings` without its tokenizer."""

_CLOSING = frozenset(".,!?;:)]}%-/_")
_OPENING = frozenset("([{$-/_")
_APOSTROPHES = frozenset("'’")
_CONTRACTIONS = frozenset({"s", "t", "re", "ve", "ll", "d", "m"})
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_LONGEST_CHARACTER = 4
"""Bytes of a character in UTF-8, and so tokens that can make it up."""


def token_strings(tokenizer: Any, ids: list[int]) -> list[str]:
    """Return the text that each token adds to a sequence; joined with nothing between, they read as text.

    A character that spans several tokens goes to the one that completes it; those before it are empty strings. Bytes
    that no character is made of, as at an end where one is cut off, are written as <0xE2>. An id that the tokenizer
    does not know is written as <id 50300>.

    Args:
        tokenizer: of transformers: word pieces, byte-level BPE, sentencepiece, or any other that decodes.
        ids: consecutive tokens of one text.
    Returns:
        one string a token. Leading spaces belong to the token that they introduce.
    """
    return token_text(tokenizer)(ids)


def token_text(tokenizer: Any) -> TokenText:
    """Return `token_strings` of a tokenizer, which it looks at only once."""
    added = frozenset(tokenizer.get_added_vocab())

    def decoded(to_bytes: Callable[[str], bytes]) -> TokenText:
        return lambda ids: _decode(
            [_as_it_is(piece) if piece in added else to_bytes(piece) for piece in _pieces(tokenizer, ids)]
        )

    if _joins(tokenizer, "##b", "ab"):
        return lambda ids: _word_pieces(_pieces(tokenizer, ids))
    if _joins(tokenizer, "Ġb", "a b"):
        return decoded(_byte_level)
    if _joins(tokenizer, "▁b", "a b"):
        return decoded(_sentence_piece)
    return lambda ids: _by_difference(tokenizer, ids)


def stretch_strings(token_text: TokenText, ids: list[int], start: int, stop: int) -> tuple[int, list[str]]:
    """Return the texts of a stretch of tokens, widened until no character is cut off at its ends.

    Args:
        token_text: ids of consecutive tokens -> the text of each.
        ids: of the whole text.
        start: the first token that must be in the stretch.
        stop: the token behind the last.
    Returns:
        where the stretch starts, and the text of each of its tokens.
    """
    first = max(0, start - _LONGEST_CHARACTER + 1)
    texts = token_text(ids[first : stop + _LONGEST_CHARACTER - 1])
    low, high = start - first, stop - first
    while low > 0 and not texts[low - 1]:
        low -= 1
    while high < len(texts) and not texts[high - 1]:
        high += 1
    return first + low, texts[low:high]


def _pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    return [_piece(tokenizer, token) for token in ids]


def _piece(tokenizer: Any, token: int) -> str:
    try:
        piece = tokenizer.convert_ids_to_tokens(token)
    except (IndexError, KeyError, OverflowError):
        piece = None
    return _unknown(token) if piece is None else str(piece)


def _unknown(token: int) -> str:
    return f"<id {token}>"


def _joins(tokenizer: Any, piece: str, joined: str) -> bool:
    """Tell a kind of tokenizer by what it makes of `piece` behind an "a"; the classes have no better mark."""
    try:
        return str(tokenizer.convert_tokens_to_string(["a", piece])).strip() == joined
    except (TypeError, ValueError, KeyError):  # a tokenizer of single bytes or letters, which takes no such piece
        return False


def _word_pieces(pieces: list[str]) -> list[str]:
    """Word pieces do not store spaces: put them where English has them."""
    strings = []
    for i, piece in enumerate(pieces):
        if piece.startswith("##") and piece != "##":
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
    except KeyError:  # what no byte-level vocabulary holds
        return _as_it_is(piece)


def _sentence_piece(piece: str) -> bytes:
    byte = _BYTE_PIECE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else _as_it_is(piece.replace("▁", " "))


def _as_it_is(piece: str) -> bytes:
    return piece.encode("utf-8", "replace")


def _decode(parts: list[bytes]) -> list[str]:
    """Decode parts of one text in UTF-8: each character where its last byte is, other bytes as <0xE2>."""
    owners = [number for number, part in enumerate(parts) for _ in part]
    strings = [""] * len(parts)
    end = 0
    for letter in b"".join(parts).decode("utf-8", "surrogateescape"):
        is_byte = "\udc80" <= letter <= "\udcff"
        end += 1 if is_byte else len(letter.encode())
        strings[owners[end - 1]] += f"<0x{ord(letter) - 0xDC00:02X}>" if is_byte else letter
    return strings


def _by_difference(tokenizer: Any, ids: list[int]) -> list[str]:
    """Give each token what the decoded text grows by with it, for tokenizers whose pieces we cannot read."""
    strings: list[str] = []
    known: list[int] = []
    before = ""
    for number, (token, piece) in enumerate(zip(ids, _pieces(tokenizer, ids))):
        if piece == _unknown(token):
            strings.append(piece)
            continue
        known.append(token)
        text = str(tokenizer.decode(known, clean_up_tokenization_spaces=False))
        is_unfinished = text.endswith("\ufffd") and number + 1 < len(ids)
        strings.append("" if is_unfinished else text[len(before) :] if text.startswith(before) else piece)
        before = before if is_unfinished else text
    return strings
