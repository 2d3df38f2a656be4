"""Data sets of the hub: streamed or downloaded, at a revision, and what is said where the hub refuses."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest

from flashsae.errors import ConfigError, DataError
from flashsae.text import hub as hub_module
from flashsae.text.content import Tokens
from flashsae.text.open import open_text
from flashsae.text.whole import shuffled


class FakeHub:
    """Stands for a streamed data set of the hub."""

    def __init__(self, rows: list[dict[str, object]], fail_at: int | None = None) -> None:
        self.rows, self.fail_at, self.calls, self.skipped = rows, fail_at, [], 0

    def load_dataset(self, name: str, subset: str | None, *, split: str, streaming: bool) -> FakeHub:
        assert streaming
        if name != "owner/data":
            raise FileNotFoundError(f"Dataset '{name}' doesn't exist on the Hub.\nMore lines follow.")
        self.calls.append((name, subset, split))
        return self

    def skip(self, n: int) -> object:
        self.skipped = n
        for number, row in enumerate(self.rows[n:], start=n):
            if number == self.fail_at:
                raise ConnectionError("connection lost")
            yield row


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub([{"text": "a", "id": 0}, {"text": " ", "id": 1}, {"text": "b", "id": 2}])
    module = SimpleNamespace(load_dataset=fake.load_dataset)
    monkeypatch.setattr(hub_module, "require", lambda name, extra: module)
    return fake


def test_a_hub_data_set_is_streamed_and_skips_on_the_hub(hub: FakeHub) -> None:
    text = open_text("owner/data", subset="en", split="validation")
    assert list(text.numbered()) == [(0, "a"), (2, "b")]
    assert list(text.numbered(1)) == [(2, "b")]
    assert hub.skipped == 1
    assert set(hub.calls) == {("owner/data", "en", "validation")}
    assert text.name == "owner/data/en (split 'validation', column 'text')"


def test_what_the_hub_refuses_is_one_sentence_with_the_name(hub: FakeHub) -> None:
    with pytest.raises(DataError, match=r"'owner/other' is no file here.*doesn't exist on the Hub\. Check") as caught:
        open_text("owner/other")
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="row 0: there is no column 'body'; it has 'text', 'id'"):
        open_text("owner/data", column="body")
    hub.fail_at = 2
    with pytest.raises(DataError, match="at row 2: connection lost"):
        list(open_text("owner/data").documents())


@pytest.mark.parametrize("name", ["text", "csv", "json", "parquet", "imagefolder"])
def test_a_reader_of_the_library_is_no_data_set(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would read whatever lies in the working folder."""
    (tmp_path / "notes.txt").write_text("of something else")
    (tmp_path / "texts").mkdir()
    monkeypatch.chdir(tmp_path)
    hint = r" Did you mean texts\?" if name == "text" else ""
    with pytest.raises(DataError, match=rf"text '{name}': no such file or folder, .* or OWNER/{name}\.{hint}$"):
        open_text(name)


def test_a_name_that_nearly_lies_here_is_asked_for(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my-notes").mkdir()
    (tmp_path / "my-notes.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"the connection\. Did you mean my-notes\?$"):
        open_text("my-note")
    for wrong in ("my_notes.jsonl", tmp_path / "my-notes.json"):
        with pytest.raises(DataError, match=r"no such file.* Did you mean my-notes\.jsonl\?$"):
            open_text(wrong)


def test_the_revision_of_a_hub_data_set_is_part_of_its_fingerprint(hub: FakeHub) -> None:
    unknown = open_text("owner/data").fingerprint
    module = hub_module.require("datasets", "hf")
    revisions = iter("aab")
    module.load_dataset_builder = lambda name, subset: SimpleNamespace(hash=next(revisions))
    first, again, other = (open_text("owner/data").fingerprint for _ in range(3))
    assert first == again
    assert len({unknown, first, other}) == 3


def table_hub(monkeypatch: pytest.MonkeyPatch, rows: Any, **names: Any) -> list[dict[str, Any]]:
    """Put a data set in place of the hub; return how it is asked for."""
    asked: list[dict[str, Any]] = []

    def load(name: str, subset: str | None, **settings: Any) -> Any:
        asked.append(settings)
        return rows.to_iterable_dataset() if settings["streaming"] else rows

    monkeypatch.setattr(hub_module, "require", lambda name, extra: SimpleNamespace(load_dataset=load, **names))
    return asked


def test_a_data_set_is_downloaded_if_asked_for_and_then_read_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = table_hub(monkeypatch, datasets.Dataset.from_dict({"text": ["a", "b", "c"]}))
    streamed, loaded = open_text("owner/data"), open_text("owner/data", download=True)
    assert [each["streaming"] for each in asked] == [True, False]
    assert list(streamed.numbered(1)) == list(loaded.numbered(1)) == [(1, "b"), (2, "c")]
    assert streamed.name == loaded.name
    assert streamed.fingerprint == loaded.fingerprint
    assert sorted(map(str, shuffled(loaded, 0).documents())) == ["a", "b", "c"]
    with pytest.raises(ConfigError, match=r"shuffle_whole: .* --text-download"):
        shuffled(streamed, 0)


def test_a_revision_is_asked_for_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = table_hub(monkeypatch, datasets.Dataset.from_dict({"text": ["a"]}))
    plain, old = open_text("owner/data"), open_text("owner/data", revision="v1")
    assert [each.get("revision") for each in asked] == [None, "v1"]
    assert old.name == "owner/data (split 'train', column 'text', revision 'v1')"
    assert old.fingerprint != plain.fingerprint


def test_columns_of_the_hub_are_found(monkeypatch: pytest.MonkeyPatch, hub: FakeHub) -> None:
    hub.rows = [{"input_ids": [1, 2], "id": 3}]
    text = open_text("owner/data")
    assert text.name == "owner/data (split 'train', column 'input_ids')"
    assert list(text.documents()) == [Tokens([1, 2])]
    hub.rows = [{"a": "x", "b": "y"}]
    assert list(open_text("owner/data", column="a,b").documents()) == ["x\ny"]
    hub.rows = []
    with pytest.raises(DataError, match="is empty"):
        open_text("owner/data")


@pytest.mark.parametrize(("version", "told"), [("3.6.0", {"trust_remote_code": False}), ("5.2.0", {})])
def test_code_of_a_data_set_never_runs(monkeypatch: pytest.MonkeyPatch, version: str, told: dict[str, bool]) -> None:
    """Only datasets 3 could run such code, and asks the keyboard for leave; later versions have no such argument."""
    asked = table_hub(monkeypatch, datasets.Dataset.from_dict({"text": ["a"]}), __version__=version)
    open_text("owner/data")
    assert {name: value for name, value in asked[0].items() if name == "trust_remote_code"} == told


@pytest.mark.parametrize(("name", "value"), [("dtype", "uint16"), ("separator", 0)])
def test_settings_of_token_files_mean_nothing_there(hub: FakeHub, name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"text_{name}: expected nothing beside a data set of the hub"):
        open_text("owner/data", **{name: value})
