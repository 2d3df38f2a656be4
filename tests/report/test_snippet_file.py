import json
from pathlib import Path

import pytest

from flashsae.errors import CheckpointError
from flashsae.files.documents import write_document
from flashsae.report.snippet_file import LatentSnippets, Snippet, Snippets, read_snippets, write_snippets

FOUND = Snippets(
    90,
    [
        LatentSnippets(3, 0.25, 2.5, 1.5, ["a"], [4, 0, 2], [Snippet(["a", " b"], [0.0, 2.5], 1, "held_out")]),
        LatentSnippets(4, 0.01, 1.0, 0.5, [], [1], [Snippet([" c"], [1.0], 0, "train"), Snippet(["d"], [0.5], 0)]),
    ],
    30,
)


def test_json_gives_back_what_was_written(tmp_path: Path) -> None:
    write_snippets(tmp_path / "snippets.json", FOUND)
    assert read_snippets(tmp_path / "snippets.json") == FOUND


def test_a_file_without_splits_can_be_read(tmp_path: Path) -> None:
    write_snippets(tmp_path / "snippets.json", FOUND)
    stored = json.loads((tmp_path / "snippets.json").read_text("utf-8"))
    del stored["held_out_tokens"], stored["latents"][0]["snippets"][0]["split"]
    write_document(tmp_path / "snippets.json", stored)
    found = read_snippets(tmp_path / "snippets.json")
    assert found.held_out_tokens is None
    assert found.latents[0].snippets[0].split is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"format": 1, "tok', "damaged"),
        ("[]", "expected an object"),
        ('{"format": 2, "tokens": 1, "latents": []}', "format: expected one of 1, got 2"),
        ('{"format": 1, "tokens": 1}', "latents"),
        ('{"format": 1, "tokens": 1, "latents": [3]}', "damaged"),
    ],
)
def test_damaged_json_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "snippets.json"
    path.write_text(content, "utf-8")
    with pytest.raises(CheckpointError, match=message) as error:
        read_snippets(path)
    assert str(path) in str(error.value)


def test_a_snippet_whose_lists_disagree_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "snippets.json"
    write_snippets(path, FOUND)
    whole = path.read_text("utf-8")
    for edit, message in (
        ({"acts": [1.0]}, "a snippet has"),
        ({"split": "other"}, r"latents\[0\]\.snippets\[0\]\.split: .*'other'"),
    ):
        stored = json.loads(whole)
        stored["latents"][0]["snippets"][0] |= edit
        write_document(path, stored)
        with pytest.raises(CheckpointError, match=message):
            read_snippets(path)
