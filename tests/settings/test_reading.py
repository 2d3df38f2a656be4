"""The settings of reading: their relations, and that each reaches the model and tells caches apart."""

from __future__ import annotations

import ast
import functools
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flashsae
from flashsae.data import language_model
from flashsae.data.cache import ActivationCache
from flashsae.data.cache_writer import changes
from flashsae.data.existing import open_configured_text
from flashsae.data.open import prepare_activations
from flashsae.errors import ConfigError, DataError
from flashsae.settings import reading
from flashsae.settings.reading import ActivationsConfig, ReadingConfig
from flashsae.settings.run import RunConfig
from flashsae.settings.training import TrainConfig

CHOSEN: dict[str, Any] = {
    "skip_first": 3,
    "exclude_ids": (1010, 1996),
    "mask_special": False,
    "max_norm_ratio": 4.0,
    "shuffle_documents": False,
    "document_seed": 7,
    "pack": True,
    "overlap": 2,
    "shuffle_whole": True,
}


def test_defaults_are_those_that_are_documented() -> None:
    filled = ReadingConfig().filled()
    assert (filled.skip_first, filled.exclude_ids, filled.prepend_bos) == (0, (), None)
    assert (filled.shuffle_documents, filled.document_seed) == (True, 0)
    assert filled.filled() == filled
    plain = ReadingConfig(shuffle_documents=False).filled()
    assert plain.filled() == plain


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"skip_first": 256}, "skip_first: expected fewer than the 256 tokens of an input"),
        ({"skip_first": 8, "context_length": 8}, "skip_first: expected fewer than the 8 tokens"),
        ({"skip_first": -1}, "skip_first: expected a number that is not negative, got -1"),
        ({"exclude_ids": (3, -1)}, "exclude_ids: expected a list of whole numbers"),
        ({"exclude_ids": 3}, "exclude_ids: expected a list of whole numbers, got 3"),
        ({"shuffle_documents": False, "document_seed": 1}, "document_seed: expected nothing beside --no-shuffle"),
        ({"shuffle_documents": False, "shuffle_whole": True}, "shuffle_whole: expected nothing beside --no-shuffle"),
        ({"text_dtype": "float16"}, "text_dtype: expected one of uint16, uint32, int32, int64, got 'float16'"),
        ({"dataset": ["a", 3]}, "dataset: expected a string, got"),
        ({"prepend_bos": "yes"}, "prepend_bos: expected true or false, got 'yes'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ReadingConfig(**settings).filled()


def test_what_is_told_of_tokens_is_what_caches_and_runs_were_named_after() -> None:
    """A setting that is added now belongs to _ADDED_LATER: this list, and with it every name and fingerprint, stays."""
    assert ReadingConfig().filled().of_tokens() == {
        "context_length": 256, "mask_special": True, "max_norm_ratio": None, "skip_first": 0, "exclude_ids": [],
        "prepend_bos": None, "shuffle_documents": True, "document_seed": 0, "max_documents": None,
        "forward_tokens": 8192,
    }  # fmt: skip


def test_a_setting_that_was_added_later_is_told_only_where_it_changes_something(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ReadingConfig().filled().of_tokens().keys()
    monkeypatch.setattr(reading, "_ADDED_LATER", (*reading._ADDED_LATER, "skip_first", "exclude_ids"))
    for same in (ReadingConfig(), ReadingConfig(skip_first=0), ReadingConfig(exclude_ids=())):
        assert same.filled().of_tokens().keys() == names - {"skip_first", "exclude_ids"}
    changed = ReadingConfig(skip_first=3, exclude_ids=(5,)).filled().of_tokens()
    assert (changed["skip_first"], changed["exclude_ids"]) == (3, [5])
    assert "skip_first" not in ReadingConfig().of_tokens()
    assert ReadingConfig(skip_first=0).of_tokens(whole=True)["skip_first"] == 0
    old, new = {"skip_first": 0}, {"skip_first": 3}
    assert (changes({}, old), changes(old, {})) == ([], [])
    assert changes({}, new) == ["skip_first is 0 there and 3 here"]
    assert changes(new, {}) == ["skip_first is 3 there and 0 here"]


def test_several_texts_may_be_a_list() -> None:
    assert ReadingConfig(dataset=["a@0.7", "b"]) == ReadingConfig(dataset="a@0.7, b")  # type: ignore[arg-type]


def test_the_settings_of_a_text_reach_it(tmp_path: Path) -> None:
    np.arange(300, dtype=np.uint32).tofile(tmp_path / "x.bin")
    config = ReadingConfig(dataset=str(tmp_path / "x.bin"), text_dtype="uint32", text_separator=7)
    assert [len(content) // 4 for content in open_configured_text(config).documents()] == [7, 292]
    (tmp_path / "x.jsonl").write_text('{"a": "b", "c": "d"}')
    config = ReadingConfig(dataset=str(tmp_path / "x.jsonl"), text_column="a,c")
    assert list(open_configured_text(config).documents()) == ["b\nd"]
    for name, value in (("subset", "x"), ("revision", "x"), ("download", True), ("split", "test")):
        with pytest.raises(ConfigError, match=f"^text_{name}: "):
            open_configured_text(replace(config, **{f"text_{name}": value}))


def test_ids_are_a_set() -> None:
    assert ReadingConfig(exclude_ids=(5, 3, 5)) == ReadingConfig(exclude_ids=(3, 5))


def test_settings_survive_toml(tmp_path: Path) -> None:
    config = RunConfig(ActivationsConfig(**{**CHOSEN, "shuffle_documents": True}, prepend_bos=False).filled())
    (tmp_path / "config.toml").write_text(config.to_toml())
    assert RunConfig.from_toml(tmp_path / "config.toml") == config


def prepared(tmp_path: Path, **settings: Any) -> Any:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"the cat {i} sat on the mat, and then it went out" for i in range(60)))
    config = ActivationsConfig(dataset=str(text), context_length=16, **settings)
    return prepare_activations(config, tokens=100, folder=tmp_path / "activations", device="cpu")


def test_each_setting_reaches_the_model_and_has_a_cache_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language_model, "load_with_account", functools.cache(language_model.load_with_account))
    streamed = prepared(tmp_path, stream=True).compute(lambda rows: None).sources["encoder.layer.2"]
    reached = {name: getattr(streamed.config, name) for name in CHOSEN}
    places = {prepared(tmp_path).config.activations}
    for name, value in CHOSEN.items():
        source = prepared(tmp_path, stream=True, **{name: value}).compute(lambda rows: None).sources["encoder.layer.2"]
        changed = {other: getattr(source.config, other) for other in CHOSEN if other != "document_seed"}
        assert getattr(source.config, name) == value != reached[name]
        assert changed == {other: reached[other] for other in changed} | ({name: value} if name in changed else {})
        assert source.fingerprint != streamed.fingerprint
        places.add(prepared(tmp_path, **{name: value}).config.activations)
    assert len(places) == len(CHOSEN) + 1


def test_a_cache_is_refused_where_documents_are_to_be_cut_otherwise(tmp_path: Path) -> None:
    place = tmp_path / "acts"
    ready = prepared(tmp_path, activations=place, pack=True, overlap=2, held_out=0.1)
    assert ready.inputs().startswith("16 tokens, documents packed, the last 2 again where a document goes on, [CLS] at")
    ready.compute(lambda rows: None)
    for asked in ({}, {"pack": True}, {"overlap": 2}):
        cached = prepare_activations(
            ActivationsConfig(activations=place, held_out=0.1, **asked), tokens=9, folder=tmp_path, device="cpu"
        )
        assert cached.inputs() == "16 tokens, documents packed, the last 2 again where a document goes on"
    for asked, there in (
        ({"pack": False}, "pack is True there, False was"),
        ({"overlap": 0}, "overlap is 2 there, 0 was"),
        ({"bos_every": "document"}, "bos_every is 'context' there, 'document' was"),
    ):
        with pytest.raises(DataError, match=there):
            prepare_activations(
                ActivationsConfig(activations=place, held_out=0.1, **asked), tokens=9, folder=tmp_path, device="cpu"
            )
    with pytest.raises(ConfigError, match=r"^held_out: the documents in the cache .* are packed for held_out = 0\.1"):
        prepare_activations(ActivationsConfig(activations=place), tokens=9, folder=tmp_path, device="cpu")


def test_a_default_cache_of_packed_documents_has_a_name_for_each_held_out_fraction(tmp_path: Path) -> None:
    def place(**settings: Any) -> Path:
        return Path(prepared(tmp_path, **settings).config.activations)

    assert place(held_out=0.1) == place(held_out=0.105)  # of as many rows
    assert place(held_out=0.1, pack=True) != place(held_out=0.105, pack=True)


def test_a_cache_that_tells_nothing_of_a_later_setting_has_its_default(tmp_path: Path) -> None:
    place = tmp_path / "acts"
    prepared(tmp_path, activations=place).compute(lambda rows: None)
    assert not reading.defaults_of_later().keys() & ActivationCache.read_settings(place).keys()
    for asked in reading.defaults_of_later().items():
        config = ActivationsConfig(activations=place, **dict([asked]))
        prepare_activations(config, tokens=9, folder=tmp_path, device="cpu")
    with pytest.raises(DataError, match="pack is False there, True was asked for"):
        prepare_activations(ActivationsConfig(activations=place, pack=True), tokens=9, folder=tmp_path, device="cpu")


def test_one_document_is_refused_before_the_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashsae.data.open.LanguageModelSource", lambda *args, **kwargs: pytest.fail("loaded"))
    text = tmp_path / "lines.txt"
    text.write_text("".join(f"document {i}\n" for i in range(1000)))
    with pytest.raises(Exception, match=r"it is one document.*cut into documents at blank lines"):
        prepare_activations(ActivationsConfig(dataset=str(text)), tokens=100, folder=tmp_path / "x", device="cpu")
    assert not (tmp_path / "x").exists()


def test_every_option_that_a_message_names_exists() -> None:
    options = {f.name for config in (ActivationsConfig, TrainConfig) for f in fields(config)}
    options |= {"out", "max_tokens", "run", "resume", "config", "report", "verify", "merge", "describe"}
    package = Path(flashsae.__file__).parent
    named = {}
    for path in [*package.glob("data/*.py"), *package.glob("settings/*.py"), *package.glob("train/*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found = re.findall(r"(?<![\w-])--(?:no-)?([a-z][a-z-]*)", node.value)
                named |= {option.replace("-", "_"): path.name for option in found}
    assert len(named) > 5
    assert not {option: name for option, name in named.items() if option not in options}
