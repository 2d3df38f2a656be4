"""Data sets of the hub: streamed or downloaded, at a revision, and what is said where the hub refuses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from flashsae.errors import DataError
from flashsae.text import hub as hub_module
from flashsae.text.open import open_text


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


def test_the_revision_of_a_hub_data_set_is_part_of_its_fingerprint(hub: FakeHub) -> None:
    unknown = open_text("owner/data").fingerprint
    module = hub_module.require("datasets", "hf")
    revisions = iter("aab")
    module.load_dataset_builder = lambda name, subset: SimpleNamespace(hash=next(revisions))
    first, again, other = (open_text("owner/data").fingerprint for _ in range(3))
    assert first == again
    assert len({unknown, first, other}) == 3
