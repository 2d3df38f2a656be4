"""Folders as the hub and its libraries make them: clones with cards, its cache, and what save_to_disk writes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest

from flashsae.errors import ConfigError, DataError
from flashsae.text.open import open_text


def fill(folder: Path, *names: str) -> Path:
    """Write files whose only document is their own name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": name}) if ".json" in path.name else name)
    return folder


def documents(*args: Any, **settings: Any) -> list[Any]:
    return list(open_text(*args, **settings).documents())


def card(folder: Path, configs: str) -> Path:
    (folder / "README.md").write_text(f"---\nlicense: mit\nconfigs:\n{configs}\n---\n# A data set\n")
    return folder


CLONE = (
    *(".gitattributes", ".git/config", "dataset_info.json", "dataset_infos.json", "LICENSE.txt", "requirements.txt"),
    *("data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test-00000-of-00001.jsonl"),
)


def test_a_clone_without_configs_is_read_by_the_names_of_its_files(tmp_path: Path) -> None:
    fill(tmp_path, *CLONE)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nWords.\n")
    assert documents(tmp_path) == list(CLONE[6:8])
    assert documents(tmp_path, split="test") == [CLONE[8]]
    with pytest.raises(ConfigError, match="text_subset: expected nothing beside a file or folder"):
        open_text(tmp_path, subset="en")


def test_what_stands_beside_the_data_of_a_clone_is_not_read(tmp_path: Path) -> None:
    fill(tmp_path, *CLONE[:6], "a.jsonl", "data/requirements.txt")
    assert documents(tmp_path) == ["a.jsonl", "data/requirements.txt"]
    for name in (".gitattributes", ".git/config"):
        (tmp_path / name).unlink()
    (tmp_path / ".git").rmdir()
    assert documents(tmp_path) == ["LICENSE.txt", "a.jsonl", "data/requirements.txt", "requirements.txt"]


def test_a_card_tells_subsets_splits_and_files(tmp_path: Path) -> None:
    fill(tmp_path, *CLONE, "en/a.jsonl", "en/b.jsonl", "de/a.jsonl", "de/dev.jsonl")
    card(
        tmp_path,
        """
- config_name: en
  default: true
  data_files:
  - split: train
    path: ["en/a.jsonl", "en/b*"]
- config_name: de
  data_files: {train: de/a.jsonl, validation: de/dev.jsonl}
- config_name: all
  data_files: "*/a.jsonl"
- config_name: data
  data_dir: data
""",
    )
    assert documents(tmp_path) == ["en/a.jsonl", "en/b.jsonl"]
    assert documents(tmp_path, subset="de") == ["de/a.jsonl"]
    assert documents(tmp_path, subset="de", split="validation") == ["de/dev.jsonl"]
    assert documents(tmp_path, subset="all") == ["de/a.jsonl", "en/a.jsonl"]
    assert documents(tmp_path, subset="data") == list(CLONE[6:8])
    assert documents(tmp_path, subset="data", split="test") == [CLONE[8]]
    assert "of subset 'de' of split 'validation'" in open_text(tmp_path, subset="de", split="validation").name
    with pytest.raises(ConfigError, match=r"text_subset: .* has the subsets en, de, all, data, got 'fr'"):
        open_text(tmp_path, subset="fr")
    with pytest.raises(ConfigError, match=r"text_split: .* has the splits train, validation, got 'test'"):
        open_text(tmp_path, subset="de", split="test")


def test_subsets_without_a_default_have_to_be_named(tmp_path: Path) -> None:
    fill(tmp_path, "en/a.jsonl", "de/a.jsonl")
    card(tmp_path, "- {config_name: en, data_files: en/*}\n- {config_name: de, data_files: de/*}")
    with pytest.raises(ConfigError, match=r"has the subsets en, de, and none is the default. Name one"):
        open_text(tmp_path)
    card(tmp_path, "- {config_name: en, data_files: [{split: test, path: en/*}]}")
    assert documents(tmp_path) == ["en/a.jsonl"]  # the only subset, and its only split


@pytest.mark.parametrize(
    "path", ["../secret.jsonl", "/etc/*.json", "data/../../secret.jsonl", "https://x.y/a.jsonl", "hf://a"]
)
def test_a_card_leads_nowhere_out_of_its_folder(tmp_path: Path, path: str) -> None:
    fill(tmp_path, "secret.jsonl", "clone/data/a.jsonl")
    for config in (
        f"- data_files: {path}",
        f"- {{data_dir: {path}}}",
        f"- data_files: [{{split: train, path: [{path}]}}]",
    ):
        with pytest.raises(DataError, match="its files should lie in its folder, got"):
            open_text(card(tmp_path / "clone", config))


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ("- [", "its head is not YAML"),
        ("- !!python/object/apply:os.system ['echo']", "its head is not YAML"),
        ("  a: 3", "expected a list of subsets"),
        ("- data_files: 3", "expected data_files of paths"),
        ("- data_files: [{split: train}]", "expected data_files of paths"),
        ("- data_files: nowhere-*.jsonl", "no such file, folder or match"),
    ],
)
def test_a_wrong_card_is_told(tmp_path: Path, configs: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_text(card(fill(tmp_path, "a.jsonl"), configs))


def test_pointers_of_git_lfs_are_no_data(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"
    for name in ("a.parquet", "b.txt", "c.jsonl.zst"):
        (tmp_path / name).write_text(pointer)
        with pytest.raises(DataError, match=rf"{name} is a pointer of git LFS, not the data: run git lfs pull"):
            open_text(tmp_path / name)
    with pytest.raises(DataError, match=r"a\.parquet is a pointer of git LFS"):
        open_text(tmp_path)


def snapshot(repository: Path, revision: str, *names: str) -> None:
    for name in names:
        blob = fill(repository / "blobs", f"{revision}-{name}") / f"{revision}-{name}"
        link = repository / "snapshots" / revision / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))


def test_a_repository_in_the_cache_of_the_hub_is_its_snapshot(tmp_path: Path) -> None:
    repository = tmp_path / "datasets--owner--name"
    snapshot(repository, "aaa", "train.jsonl", "test.jsonl")
    assert documents(repository) == ["aaa-train.jsonl"]
    snapshot(repository, "bbb", "train.jsonl")
    with pytest.raises(DataError, match="expected one snapshot, got aaa, bbb: name one, such as"):
        open_text(repository)
    fill(repository / "refs", "main")
    (repository / "refs" / "main").write_text("bbb\n")
    assert documents(repository) == ["bbb-train.jsonl"]
    assert documents(repository / "snapshots" / "aaa", split="test") == ["aaa-test.jsonl"]


def test_what_save_to_disk_wrote_is_read_and_what_is_cached_beside_it_is_not(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "id": [1, 2, 3]})
    rows.save_to_disk(str(tmp_path / "one"), num_shards=2)
    assert documents(tmp_path / "one") == ["a", "b", "c"]
    before = open_text(tmp_path / "one").fingerprint
    loaded = datasets.load_from_disk(str(tmp_path / "one"))
    loaded.map(lambda row: {"text": row["text"] * 2}, cache_file_name=str(tmp_path / "one" / "cache-0.arrow"))
    assert (tmp_path / "one" / "cache-0.arrow").exists()
    assert documents(tmp_path / "one") == ["a", "b", "c"]
    assert open_text(tmp_path / "one").fingerprint == before
    assert list(open_text(tmp_path / "one").numbered(2)) == [(2, "c")]


def test_splits_that_save_to_disk_wrote_are_its_folders(tmp_path: Path) -> None:
    parts = {
        name: datasets.Dataset.from_dict({"text": [f"{name} {i}" for i in range(3)]}) for name in ("train", "test")
    }
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "both"))
    assert documents(tmp_path / "both") == ["train 0", "train 1", "train 2"]
    assert documents(tmp_path / "both", split="test") == ["test 0", "test 1", "test 2"]
    assert documents(tmp_path / "both" / "test") == ["test 0", "test 1", "test 2"]
    with pytest.raises(ConfigError, match=r"text_split: no file of .* is named after the split 'validation'"):
        open_text(tmp_path / "both", split="validation")


def test_a_hostile_state_leads_nowhere(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["secret"]}).save_to_disk(str(tmp_path / "other"))
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(str(tmp_path / "one"))
    for state in ({"_data_files": [{"filename": "../other/data-00000-of-00001.arrow"}]}, {"_data_files": 3}, [], "x"):
        (tmp_path / "one" / "state.json").write_text(json.dumps(state))
        try:
            assert "secret" not in documents(tmp_path / "one")
        except DataError as error:
            assert "\n" not in str(error)  # noqa: PT017 - either is right


def test_links_that_lead_in_a_circle_end(tmp_path: Path) -> None:
    fill(tmp_path / "data", "a.txt", "sub/b.txt")
    for i in range(3):
        (tmp_path / "data" / "sub" / f"up{i}").symlink_to(tmp_path / "data", target_is_directory=True)
    (tmp_path / "data" / "self.txt").symlink_to(tmp_path / "data" / "self.txt")
    for where in (tmp_path / "data", str(tmp_path / "data" / "**" / "*"), str(tmp_path / "data" / "**")):
        assert documents(where) == ["a.txt", "sub/b.txt"]
