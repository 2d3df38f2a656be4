"""How a model is loaded: each option reaches transformers, counts in the fingerprint, or is one sentence."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from flashsae.data.language_model import LanguageModelSource
from flashsae.errors import ConfigError, MissingExtraError
from flashsae.lm import loading, options, room
from flashsae.lm.loading import load_language_model
from flashsae.lm.options import PLAIN, LoadOptions, keyword_arguments, quantized_warning
from flashsae.lm.weights import model_fingerprint
from flashsae.settings.reading import ReadingConfig
from flashsae.text.open import open_text

TEXT = open_text(["the cat sat on a mat"] * 3)


@pytest.fixture
def folder(tiny: ModuleType, tmp_path: Path) -> Path:
    return save(tiny, tmp_path / "model")


def save(tiny: ModuleType, folder: Path) -> Path:
    tiny.llama().save_pretrained(folder)
    tiny.word_tokenizer().save_pretrained(folder)
    return folder


def read(folder: Path, **settings: Any) -> LanguageModelSource:
    config = ReadingConfig(str(folder), hookpoint="layers.1", context_length=16, forward_tokens=64, **settings)
    return LanguageModelSource(config, TEXT, held_out=0.0, device="cpu")


def told(caught: pytest.ExceptionInfo[Exception], *words: str) -> None:
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


def test_keyword_arguments_reach_the_model_and_count(folder: Path) -> None:
    plain, eager = read(folder), read(folder, model_kwargs={"attn_implementation": "eager"})
    assert eager._model.model.config._attn_implementation == "eager"
    assert plain._model.model.config._attn_implementation == "sdpa"
    assert eager.identity["model_kwargs"] == ["attn_implementation=eager"]
    assert "model_kwargs" not in plain.identity
    assert eager.fingerprint != plain.fingerprint
    with pytest.raises(ConfigError, match="could not load") as caught:
        read(folder, model_kwargs=("attn_implementation=nonsense",))
    told(caught)


def test_values_are_what_json_makes_of_them() -> None:
    pairs = ReadingConfig(model_kwargs={"a": "eager", "b": 3, "c": "3", "d": True, "e": {"x": 1}}).model_kwargs
    assert keyword_arguments(pairs) == {"a": "eager", "b": 3, "c": "3", "d": True, "e": {"x": 1}}
    assert keyword_arguments(("a=True", "b=x=y")) == {"a": True, "b": "x=y"}
    for wrong in (("word",), ("a=1", "a=2"), ("a b=1",), ("=1",)):
        with pytest.raises(ConfigError, match="model_kwargs: expected NAME=VALUE, each name once, got"):
            ReadingConfig(model_kwargs=wrong)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("torch_dtype=float16", "expected no torch_dtype, which is the setting model_dtype; give that"),
        ("trust_remote_code=true", "which is the setting trust_remote_code"),
        ("load_in_4bit=true", "which is the setting quantize"),
        ("token=abc", "expected no token: log in with hf auth login"),
        ("gguf_file=a.gguf", "FlashSAE reads no GGUF: name the model that the file was made from"),
        ("output_loading_info=false", "FlashSAE sets it"),
    ],
)
def test_what_is_a_setting_by_itself_is_no_keyword_argument(folder: Path, pair: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"model_kwargs: .*{message}") as caught:
        read(folder, model_kwargs=(pair,))
    told(caught)


def test_half_precision_of_both_kinds(folder: Path) -> None:
    for name in ("float16", "bfloat16"):
        source = read(folder, model_dtype=name)
        assert source.dtype == getattr(torch, name)
        assert source.identity["dtype"] == name
        assert next(source.chunks(None))[0].acts["layers.1"].dtype == source.dtype


def test_a_subfolder_is_read_with_the_tokenizer_beside_it_or_above(
    tiny: ModuleType, folder: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    shutil.copytree(folder, whole / "inner")
    inside = read(whole, subfolder="inner")
    assert torch.equal(
        next(inside.chunks(None))[0].acts["layers.1"], next(read(folder).chunks(None))[0].acts["layers.1"]
    )
    before = model_fingerprint(str(whole), LoadOptions(subfolder="inner"))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.move(whole / "inner" / file, whole / file)
    assert read(whole, subfolder="inner").d_in == 16
    assert model_fingerprint(str(whole), LoadOptions(subfolder="inner")) == before
    for wrong in ("nothing", "../model", "inner/config.json"):
        with pytest.raises(ConfigError, match="subfolder: expected a folder inside") as caught:
            read(whole, subfolder=wrong)
        told(caught)
    with pytest.raises(ConfigError, match="revision: expected none beside the folder"):
        read(folder, revision="main")


def test_a_revision_of_the_hub_is_read_and_known_by_its_commit(tiny: ModuleType, folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "hub" / "models--org--name"
    for branch, commit in (("main", "a" * 40), ("v2", "b" * 40)):
        shutil.copytree(folder, place / "snapshots" / commit)
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / branch).write_text(commit)
    config = place / "snapshots" / ("b" * 40) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 0.5}))
    code = """
import torch
from flashsae.lm.loading import load_language_model
from flashsae.lm.options import LoadOptions
from flashsae.lm.weights import model_fingerprint
from flashsae.errors import ConfigError
eps = [load_language_model("org/name", torch.float32, LoadOptions(revision=r))[0].config.rms_norm_eps
       for r in (None, "main", "v2", "b" * 40)]
assert eps[0] == eps[1] != 0.5 and eps[2:] == [0.5, 0.5], eps
prints = [model_fingerprint("org/name", LoadOptions(revision=r)) for r in (None, "main", "v2", "b" * 40)]
assert prints[0] == model_fingerprint("org/name") and prints[1] != prints[2] == prints[3], prints
try:
    load_language_model("org/name", torch.float32, LoadOptions(revision="v3"))
except ConfigError as error:
    print(error)
"""
    paths = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **paths})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("model: could not load 'org/name' (")
    assert done.stdout.count("\n") == 1


class QuantizedError(Exception):
    """Raised by the stand-in for a loader that needs a GPU."""


@pytest.mark.parametrize(("bits", "expected"), [("8bit", "load_in_8bit"), ("4bit", "load_in_4bit")])
def test_quantised_loading_hands_bitsandbytes_its_settings(
    folder: Path, monkeypatch: pytest.MonkeyPatch, bits: str, expected: str
) -> None:
    import transformers

    seen: dict[str, Any] = {}

    def stand_in(place: str, **arguments: Any) -> None:
        seen.update(arguments)
        raise QuantizedError("here")

    with pytest.raises(MissingExtraError, match=r"quantize: this needs the package bitsandbytes.*: pip install bitsa"):
        read(folder, quantize=bits)
    monkeypatch.setattr(options, "find_spec", lambda package: object())
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", stand_in)
    with pytest.raises(ConfigError, match=r"could not load .* \(here\)"):
        read(folder, quantize=bits, model_dtype="bfloat16")
    assert getattr(seen["quantization_config"], expected)
    assert seen["device_map"] == "auto"
    if bits == "4bit":
        assert seen["quantization_config"].bnb_4bit_compute_dtype == torch.bfloat16
        assert seen["quantization_config"].bnb_4bit_quant_type == "nf4"


def test_weights_that_are_quantised_are_warned_of_and_not_quantised_again(folder: Path, tiny: ModuleType) -> None:
    model = tiny.llama()
    assert quantized_warning("it", model) == ()
    model.config.quantization_config = options.quantization("8bit", torch.float32)
    (warning,) = quantized_warning("it", model)
    assert warning.startswith("the weights of it are quantised (bitsandbytes): its activations, and so the latents")
    config = folder / "config.json"
    method = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    config.write_text(json.dumps(json.loads(config.read_text()) | method))
    with pytest.raises(ConfigError, match=r"quantize: the weights of .* are quantised already, by gptq") as caught:
        read(folder, quantize="4bit")
    told(caught)
    with pytest.raises(ConfigError, match=r"could not load .*\(.*(gptq|optimum|GPTQ)") as caught:
        read(folder)
    told(caught)


def test_a_device_map_needs_accelerate(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "find_spec", lambda package: None)
    with pytest.raises(MissingExtraError, match="device_map: this needs the package accelerate, which is not instal"):
        read(folder, device_map="auto")


def test_a_model_that_is_spread_gives_the_same(folder: Path) -> None:
    pytest.importorskip("accelerate")
    plain, spread = read(folder), read(folder, device_map="auto")
    assert plain.fingerprint == spread.fingerprint
    ours, theirs = (next(source.chunks(None))[0].acts["layers.1"] for source in (spread, plain))
    assert torch.equal(ours, theirs)


def test_layers_on_disk_are_read(tiny: ModuleType, folder: Path, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    places = {"embed_tokens": "cpu", "layers.0": "cpu", "layers.1": "disk", "norm": "cpu", "rotary_emb": "cpu"}
    model = accelerate.dispatch_model(tiny.llama(), places, main_device="cpu", offload_dir=str(tmp_path / "disk"))
    assert model.layers[1].mlp.up_proj.weight.is_meta
    config = replace(tiny.SMALL, hookpoint="layers.1, layers.1.mlp.up_proj:in")
    chunk = next(tiny.source(config, TEXT, model=model, held_out=0.0).chunks(None))[0]
    expected = next(tiny.source(config, TEXT, model=tiny.llama(), held_out=0.0).chunks(None))[0]
    assert all(torch.equal(acts, expected.acts[name]) for name, acts in chunk.acts.items())


def test_a_model_without_numbers_is_refused(tiny: ModuleType) -> None:
    model = tiny.llama()
    model.layers[1].mlp.to("meta")
    with pytest.raises(
        ConfigError, match=r"layers\.1\.mlp\.\w+ lies on the device meta, where weights have no"
    ) as caught:
        tiny.source(replace(tiny.SMALL, hookpoint="layers.1"), TEXT, model=model)
    told(caught, "--device-map auto")


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "memory_bytes", lambda device: 10_000)
    monkeypatch.setattr(loading, "_weights", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(ConfigError, match=r"model: the weights of .* take 0\.0 GB, and cpu has") as caught:
        read(folder)
    told(caught, "--device-map auto", "--quantize 4bit")
    assert room._in_files(folder.glob("*.safetensors")) == room._by_config(loading.read_config(str(folder), PLAIN))
    (folder / "model.safetensors").write_bytes(b"\xff" * 12)
    assert room._in_files(folder.glob("*.safetensors")) == 0


def test_what_is_no_checkpoint_of_transformers_is_one_sentence(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "a.gguf").touch()
    for place in (tmp_path / "a.gguf", tmp_path):
        with pytest.raises(ConfigError, match="FlashSAE reads no GGUF: name the model that") as caught:
            load_language_model(str(place), torch.float32)
        told(caught)


def test_settings_of_loading_stand_beside_no_model_that_is_loaded(tiny: ModuleType) -> None:
    for name, value in {"revision": "main", "quantize": "4bit", "model_kwargs": ("a=1",), "adapter": "x"}.items():
        with pytest.raises(ConfigError, match=f"{name}: expected nothing beside a model that is loaded already"):
            tiny.source(replace(tiny.SMALL, **{name: value}))
