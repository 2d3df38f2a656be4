"""Which files a path stands for: those of a split, none that is hidden; and what a file may begin with."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from flashsae import SAE, SAEConfig
from flashsae.data.cache_index import CacheIndex
from flashsae.errors import ConfigError, DataError
from flashsae.run.start import new_run
from flashsae.settings import RunConfig
from flashsae.text.open import open_text


def fill(folder: Path, *names: str) -> Path:
    """Write files whose only document is their own name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name if path.suffix == ".txt" else json.dumps({"text": name}))
    return folder


def documents(*args: object, **settings: str) -> list[str]:
    return list(open_text(*args, **settings).documents())  # type: ignore[arg-type]


def test_hidden_files_and_folders_are_not_read(tmp_path: Path) -> None:
    hidden = (".ipynb_checkpoints/a.jsonl", "._a.jsonl", ".git/b.txt", "sub/.cache/c.jsonl", "__MACOSX/d.txt", ".x.txt")
    folder = fill(tmp_path / ".hidden" / "data", "a.jsonl", "sub/b.txt", *hidden)
    assert documents(folder) == ["a.jsonl", "sub/b.txt"]
    assert documents(str(folder / "*")) == ["a.jsonl"]
    assert documents(str(folder / "**" / "*")) == ["a.jsonl", "sub/b.txt"]
    assert documents(folder / ".x.txt") == [".x.txt"]  # whoever names it means it
    only = fill(tmp_path / "only", ".git/b.txt")
    with pytest.raises(DataError, match="holds no file"):
        open_text(only)


def test_our_own_folders_are_no_text(tmp_path: Path) -> None:
    folder = fill(tmp_path / "data", "a.jsonl", "sub/b.json", "sub/index.json", "site/config.toml", "site/c.json")
    texts = ["a.jsonl", "site/c.json", "sub/b.json", "sub/index.json"]
    before = open_text(folder)
    CacheIndex({}).write(fill(folder / "sub" / "acts", "tokenizer/tokenizer.json"))
    run = new_run(RunConfig(), fill(folder / "runs", "own.txt") / "run")
    fill(run, "metrics.jsonl", "evaluation.json", "part/sae/x.json")
    fill(folder / "fitted", "metrics.jsonl", "checkpoints/00008/state.json")
    edited = fill(folder / "edited", "metrics.jsonl", "config.toml")
    SAE(SAEConfig(3, 5, 2)).save(folder / "sae")
    assert documents(folder) == documents(str(folder / "**" / "*")) == ["a.jsonl", "own.txt", *texts[1:]]
    (folder / "runs" / "own.txt").unlink()
    after = open_text(folder)
    assert (after.name, after.fingerprint) == (before.name, before.fingerprint)
    assert list(after.documents()) == texts
    assert documents(str(edited / "*.jsonl")) == documents(edited / "metrics.jsonl") == ["metrics.jsonl"]  # asked for


def test_a_split_is_the_files_or_folders_named_after_it(tmp_path: Path) -> None:
    files = ["train-00000-of-2.jsonl", "train-00001-of-2.jsonl", "validation.jsonl", "test_1.jsonl"]
    folder = fill(tmp_path / "test_of_mine", *files)  # the name of the folder itself says nothing
    assert documents(folder) == files[:2]
    assert documents(folder, split="train") == files[:2]
    assert documents(folder, split="validation") == ["validation.jsonl"]
    assert documents(folder, split="val") == ["validation.jsonl"]
    assert documents(folder, split="test") == ["test_1.jsonl"]
    assert "of split 'test'" in open_text(folder, split="test").name
    nested = fill(tmp_path / "nested", "train/a.jsonl", "dev/b.jsonl")
    assert documents(nested) == ["train/a.jsonl"]
    assert documents(nested, split="validation") == ["dev/b.jsonl"]
    assert documents(tmp_path / "nested" / "dev" / "b.jsonl") == ["dev/b.jsonl"]


def test_a_split_of_ones_own(tmp_path: Path) -> None:
    folder = fill(tmp_path, "python/a.txt", "rust/b.txt")
    assert documents(folder) == ["python/a.txt", "rust/b.txt"]
    assert documents(folder, split="rust") == ["rust/b.txt"]


def test_files_without_such_names_are_all_read_and_no_split_can_be_asked_for(tmp_path: Path) -> None:
    folder = fill(tmp_path, "constraints.jsonl", "trainer.jsonl")
    assert len(documents(folder)) == 2
    for split in ("train", "validation"):
        with pytest.raises(ConfigError, match=f"text_split: no file of .* is named after the split '{split}'"):
            open_text(folder, split=split)
        with pytest.raises(ConfigError, match="text_split: no file of"):
            open_text(folder / "trainer.jsonl", split=split)
    only_train = fill(tmp_path / "one", "train.jsonl", "more.jsonl")
    assert len(documents(only_train)) == 2


@pytest.mark.parametrize(
    ("settings", "name"),
    [({"subset": "en"}, "text_subset"), ({"split": "test"}, "text_split"), ({"column": "body"}, "text_column")],
)
def test_settings_that_mean_nothing_are_refused(tmp_path: Path, settings: dict[str, str], name: str) -> None:
    fill(tmp_path, "a.txt")
    for text in (tmp_path / "a.txt", ["a", "b"], "python-docs"):
        with pytest.raises(ConfigError, match=f"^{name}: "):
            open_text(text, **settings)  # type: ignore[arg-type]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\n\ntwo")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "three"}\n')
    (tmp_path / "c.json").write_bytes(b'\xef\xbb\xbf[{"text": "four"}]')
    assert documents(tmp_path) == ["one", "two", "three", "four"]
    (tmp_path / "d.txt").write_bytes("five".encode("utf-16"))
    assert documents(tmp_path)[4:] == ["five"]


def test_halves_of_surrogate_pairs_become_replacement_characters(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "cut \\ud83d here"}\n{"text": "whole \\ud83d\\ude00"}')
    assert documents(tmp_path / "a.jsonl") == ["cut \ufffd here", "whole \U0001f600"]
    assert documents(["\udc00", "\ud83d\ude00 \ud800"]) == ["\ufffd", "\U0001f600 \ufffd"]


def test_what_cannot_be_opened_or_parsed_is_named(tmp_path: Path) -> None:
    deep = tmp_path / "deep.jsonl"
    deep.write_text('{"text": ' + "[" * 200_000 + "]" * 200_000 + "}")
    with pytest.raises(DataError, match=r"deep\.jsonl, line 1 is not JSON"):
        documents(deep)
    with pytest.raises(ConfigError, match="a path whose user exists, got '~nobody-here"):
        open_text("~nobody-here/text.txt")
    secret = fill(tmp_path, "secret.txt") / "secret.txt"
    secret.chmod(0)
    if not os.access(secret, os.R_OK):
        with pytest.raises(DataError, match=r"cannot read .*secret\.txt: Permission denied"):
            open_text(secret)
