from typing import Any

import pytest

from flashsae.report.tokens import stretch_strings, token_strings


def fast(model: object, decoder: object, pre_tokenizer: object = None) -> Any:
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    raw = tokenizers.Tokenizer(model)
    raw.decoder = decoder
    if pre_tokenizer is not None:
        raw.pre_tokenizer = pre_tokenizer
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw)


def test_word_pieces_read_as_text() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    spaced = "un ##believ ##able , don ' t ( really ) cost $ 3 . 50 ! it ’ s a well - known x _ y"
    pieces = spaced.split(" ")
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(["[UNK]", *pieces]))}
    tokenizer = fast(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"), tokenizers.decoders.WordPiece())
    strings = token_strings(tokenizer, [vocabulary[piece] for piece in pieces])
    assert len(strings) == len(pieces)
    assert "".join(strings) == "unbelievable, don't (really) cost $3.50! it’s a well-known x_y"
    assert strings[:3] == ["un", "believ", "able"]


def test_byte_level_tokens_read_as_text() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(alphabet)} | {"Ġt": 256, "Ġth": 257}
    model = tokenizers.models.BPE(vocabulary, [("Ġ", "t"), ("Ġt", "h")])
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = fast(model, tokenizers.decoders.ByteLevel(), byte_level)
    text = "in that\ncafé, 日本 🙂"
    ids = tokenizer(text)["input_ids"]
    strings = token_strings(tokenizer, ids)
    assert len(strings) == len(ids)
    assert "".join(strings) == text
    assert " th" in strings
    assert strings[-4:] == ["", "", "", "🙂"]


def test_sentence_pieces_read_as_text() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    pieces = ["▁the", "▁ca", "f", "<0xC3>", "<0xA9>", "<0x0A>", "▁", "x"]
    vocabulary = {piece: i for i, piece in enumerate(["<unk>", *pieces])}
    decoders = tokenizers.decoders
    decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = fast(tokenizers.models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"), decoder)
    strings = token_strings(tokenizer, list(range(1, 9)))
    assert strings == [" the", " ca", "f", "", "é", "\n", " ", "x"]


def test_a_character_cut_off_at_the_end_is_marked() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {letter: i for i, letter in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = fast(tokenizers.models.BPE(vocabulary, []), tokenizers.decoders.ByteLevel())
    assert token_strings(tokenizer, [vocabulary["a"], vocabulary["Ã"]]) == ["a", "<0xC3>"]
    assert token_strings(tokenizer, []) == []


def byte_level(*added: str) -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {letter: i for i, letter in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
    pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = fast(tokenizers.models.BPE(vocabulary, []), tokenizers.decoders.ByteLevel(), pre_tokenizer)
    tokenizer.add_tokens(list(added))
    return tokenizer


def test_every_byte_is_shown_wherever_a_text_is_cut() -> None:
    tokenizer = byte_level()
    text = "é日🙂\u200d\u0301a"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    data = text.encode()
    for start in range(len(ids)):
        for stop in range(start + 1, len(ids) + 1):
            shown = "".join(token_strings(tokenizer, ids[start:stop]))
            expected = data[start:stop].decode("utf-8", "surrogateescape")
            assert shown == "".join(f"<0x{ord(c) - 0xDC00:02X}>" if "\udc80" <= c <= "\udcff" else c for c in expected)


def test_a_stretch_is_widened_to_whole_characters() -> None:
    tokenizer = byte_level()
    ids = tokenizer("a日b🙂c")["input_ids"]

    def text(tokens: list[int]) -> list[str]:
        return token_strings(tokenizer, tokens)

    for start in range(len(ids)):
        for stop in range(start + 1, len(ids) + 1):
            first, strings = stretch_strings(text, ids, start, stop)
            assert first <= start
            assert first + len(strings) >= stop
            assert "<0x" not in "".join(strings)
            assert "".join(strings) in "a日b🙂c"
    assert stretch_strings(text, ids, 4, 5) == (4, ["b"])


def test_added_tokens_and_unknown_ids_are_shown_as_they_are() -> None:
    tokenizer = byte_level("é", "<|end of text|>", "Ġ")
    ids = [*tokenizer.convert_tokens_to_ids(["é", "<|end of text|>", "Ġ"]), 4000]
    assert token_strings(tokenizer, ids) == ["é", "<|end of text|>", "Ġ", "<id 4000>"]


def test_word_pieces_never_vanish() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {piece: i for i, piece in enumerate(["[UNK]", "##", "###", "##able", "a"])}
    tokenizer = fast(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"), tokenizers.decoders.WordPiece())
    assert token_strings(tokenizer, [3, 1, 4, 2]) == ["able", " ##", " a", "#"]


def test_tokenizers_of_other_kinds_read_as_text() -> None:
    """End-of-word BPE, and bytes that are single letters, which the marks of the three usual kinds do not tell."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    vocabulary = {piece: i for i, piece in enumerate(["un", "able</w>", "to</w>", "go</w>"])}
    model = tokenizers.models.BPE(vocabulary, [], end_of_word_suffix="</w>")
    tokenizer = fast(model, tokenizers.decoders.BPEDecoder(suffix="</w>"))
    assert "".join(token_strings(tokenizer, [0, 1, 2, 3])) == "unable to go"
    by_byte = transformers.ByT5Tokenizer()
    ids = by_byte("né 日")["input_ids"][:-1]
    assert token_strings(by_byte, ids) == ["n", "", "é", " ", "", "", "日"]
