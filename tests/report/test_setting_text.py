import pytest

from flashsae.report.setting_text import flat, setting_text, without_folders


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/ann/texts/wiki.jsonl", "wiki.jsonl"),
        ("/home/ann/My Texts/wiki.jsonl", "wiki.jsonl"),
        ("~ann/wiki.jsonl", "wiki.jsonl"),
        ("../secret/wiki/", "wiki"),
        ("C:\\Users\\ann\\wiki.jsonl", "wiki.jsonl"),
        ("\\\\server\\share\\wiki", "wiki"),
        ("file:///home/ann/wiki", "wiki"),
        ("/", "a folder"),
        ("code@0.7 /home/ann/books@0.3", "code@0.7 books@0.3"),
        ("/home/ann/code@0.7, ~/books@0.3", "code@0.7, books@0.3"),
        ("vocab_file=/home/ann/vocab.json", "vocab_file=vocab.json"),
        ("org/texts", "org/texts"),
        ("texts/wiki.jsonl", "texts/wiki.jsonl"),
        ("s3://bucket/texts", "s3://bucket/texts"),
        ("h.6:in, h.7", "h.6:in, h.7"),
    ],
)
def test_of_a_path_that_tells_of_the_machine_the_last_part_is_left(text: str, shown: str) -> None:
    assert without_folders(text) == shown


def test_settings_in_words() -> None:
    assert setting_text([1, "a\nb", True]) == "1, a↵ b, true"
    assert setting_text(16384) == "16,384"
    assert flat({"a": 1, "b": {"c": 2}}) == [("a", 1), ("b.c", 2)]
