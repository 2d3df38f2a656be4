"""Python code that comes with a model, a tokenizer or a cache never runs unless the user's own option says so."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from flashsae.data.cache import ActivationCache
from flashsae.data.cache_index import TOKENIZER_FOLDER, CacheIndex, folder_crc32
from flashsae.data.cache_writer import write_cache
from flashsae.data.language_model import LanguageModelSource
from flashsae.errors import ConfigError
from flashsae.lm.loading import load_language_model
from flashsae.lm.options import LoadOptions
from flashsae.settings.reading import ReadingConfig
from flashsae.text.open import open_text

CODE = """
import pathlib
pathlib.Path({mark!r}).touch()
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
class OwnConfig(GPT2Config):
    model_type = "own"
class OwnForCausalLM(GPT2LMHeadModel):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture(autouse=True)
def _modules_stay_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    for module in (transformers.dynamic_module_utils, transformers.utils.hub):
        monkeypatch.setattr(module, "HF_MODULES_CACHE", str(tmp_path / "modules"))


def change(file: Path, **settings: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "it ran"


@pytest.fixture
def folder(tiny: ModuleType, tmp_path: Path, mark: Path) -> Path:
    """Return a model that is there with a head alone, of code of its own, which leaves a mark when it runs."""
    place = tmp_path / "own"
    tiny.gpt2().save_pretrained(place)
    tiny.word_tokenizer().save_pretrained(place)
    (place / "own.py").write_text(CODE.format(mark=str(mark)))
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    change(place / "config.json", model_type="own", auto_map=auto, architectures=["OwnForCausalLM"])
    return place


def test_code_of_a_model_runs_only_if_it_is_trusted(tiny: ModuleType, folder: Path, mark: Path) -> None:
    with pytest.raises(ConfigError, match="brings Python code along that has to run, with all your rights") as caught:
        load_language_model(str(folder), torch.float32)
    assert "--trust-remote-code (trust_remote_code = true)" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not mark.exists()
    config = ReadingConfig(str(folder), hookpoint="h.1", context_length=16, forward_tokens=64, trust_remote_code=True)
    source = LanguageModelSource(config, tiny.TEXT, held_out=0.0, device="cpu")
    assert mark.exists()
    assert type(source._model.model).__name__ == "GPT2Model"  # the base of a model that is there with a head alone
    expected = tiny.source(tiny.SMALL, held_out=0.0, model=tiny.gpt2())
    ours, theirs = (tiny.collect(each, None)[0].acts["h.1"] for each in (source, expected))
    assert len(ours) == len(theirs)
    torch.testing.assert_close(ours.norm(dim=1).sort()[0], theirs.norm(dim=1).sort()[0], rtol=1e-5, atol=1e-5)
    assert source.identity["trust_remote_code"] is True


def test_code_of_a_known_kind_of_model_does_not_run(tiny: ModuleType, folder: Path, mark: Path) -> None:
    change(folder / "config.json", model_type="gpt2")
    model, _ = load_language_model(str(folder), torch.float32)
    assert type(model).__name__ == "GPT2Model"
    assert not mark.exists()


@pytest.mark.parametrize("of_class", ["OwnTokenizer", "PreTrainedTokenizerFast"])
def test_code_of_a_tokenizer_does_not_run(tiny: ModuleType, folder: Path, mark: Path, of_class: str) -> None:
    change(folder / "config.json", model_type="gpt2", auto_map={})
    tokenizer = {"AutoTokenizer": [None, "own.OwnTokenizer"]}
    change(folder / "tokenizer_config.json", tokenizer_class=of_class, auto_map=tokenizer)
    try:
        load_language_model(str(folder), torch.float32)
    except ConfigError as error:
        assert "trust" in str(error)  # noqa: PT017 - either is right: reading it without its code, or refusing
    assert not mark.exists()


def test_nothing_in_a_cache_runs_code(tiny: ModuleType, folder: Path, mark: Path, tmp_path: Path) -> None:
    place = tmp_path / "cache"
    write_cache(place, tiny.source(tiny.CACHED), shard_rows=tiny.SHARD_ROWS)
    tokens = place / TOKENIZER_FOLDER
    change(
        tokens / "tokenizer_config.json",
        tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": [None, "own.OwnTokenizer"]},
        trust_remote_code=True,
    )
    (tokens / "own.py").write_text((folder / "own.py").read_text())
    (tokens / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}))
    index = CacheIndex.read(place)  # an attacker writes the checksums anew, and the settings too
    index.tokenizer = folder_crc32(tokens)
    index.settings["trust_remote_code"] = True
    index.write(place)
    cache = ActivationCache(place, "h.0")
    try:
        cache.read_tokenizer()
    except ConfigError as error:
        assert "trust_remote_code" in str(error)  # noqa: PT017
    assert not mark.exists()
    cache.read_tokenizer(trust_remote_code=True)
    assert mark.exists()


def test_attention_that_is_code_of_the_hub_is_asked_for_by_the_user_alone(
    tiny: ModuleType, folder: Path, mark: Path
) -> None:
    change(folder / "config.json", model_type="gpt2", auto_map={}, attn_implementation="someone/their-kernel")
    with pytest.raises(ConfigError, match="asks for code of the hub, someone/their-kernel, to compute with") as caught:
        load_language_model(str(folder), torch.float32)
    assert "\n" not in str(caught.value)
    options = LoadOptions(model_kwargs=("attn_implementation=sdpa",))
    assert load_language_model(str(folder), torch.float32, options)[0].config._attn_implementation == "sdpa"


def test_no_file_of_a_run_but_its_settings_trusts(tmp_path: Path) -> None:
    assert ReadingConfig("x", hookpoint="h").filled().trust_remote_code is False
    assert open_text(["a"]) is not None
