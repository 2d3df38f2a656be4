"""What tells how a model was loaded goes from the settings into caches, and from there into warnings and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from flashsae.cli import main
from flashsae.data import language_model
from flashsae.data.cache import ActivationCache
from flashsae.data.cache_index import CacheIndex
from flashsae.data.cache_writer import write_cache
from flashsae.data.language_model import LanguageModelSource
from flashsae.data.open import prepare_activations
from flashsae.errors import ConfigError, DataError
from flashsae.settings.reading import ActivationsConfig, ReadingConfig

WARNING = "the weights of m are quantised (bitsandbytes): and so on"


@pytest.fixture
def folder(tiny: ModuleType, tmp_path: Path) -> Path:
    tiny.gpt2().save_pretrained(tmp_path / "m")
    tiny.word_tokenizer().save_pretrained(tmp_path / "m")
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in tiny.DOCUMENTS[:8]))
    return tmp_path


def prepared(folder: Path, **settings: Any) -> Any:
    config = ActivationsConfig(
        str(folder / "m"), str(folder / "text.jsonl"), hookpoint="h.1", context_length=16, held_out=0.3, **settings
    )
    return prepare_activations(config, tokens=50, folder=folder / "activations", device="cpu")


@pytest.mark.parametrize("stream", [True, False])
def test_activations_of_quantised_weights_are_warned_of(
    folder: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    assert prepared(folder, stream=stream).compute(lambda rows: None).warnings == ()
    monkeypatch.setattr(language_model, "quantized_warning", lambda name, model: (WARNING,))
    again = prepared(folder, stream=stream, model_kwargs=("attn_implementation=eager",))
    assert again.compute(lambda rows: None).warnings == (WARNING,)


def test_a_cache_tells_of_quantised_weights_whenever_it_is_read(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared(folder, stream=False).compute(lambda rows: None)
    (cache,) = (folder / "activations").iterdir()
    index = CacheIndex.read(cache)
    index.settings["quantize"] = "4bit"
    index.write(cache)
    config = ActivationsConfig(activations=cache, hookpoint="h.1")
    (warning,) = prepare_activations(config, tokens=50, folder=folder, device="cpu").compute(lambda rows: None).warnings
    assert (
        "are quantised (bitsandbytes): its activations, and so the latents that are found in them, are not" in warning
    )


def test_a_table_of_arguments_in_a_file_reaches_the_cache(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    file, inline = Path("a.toml"), Path("b.toml")
    shared = 'model = "m"\ndataset = "text.jsonl"\nhookpoint = "h.1"\ncontext_length = 16\n'
    file.write_text(f'{shared}[model_kwargs]\nattn_implementation = "eager"\n')
    inline.write_text(f'{shared}model_kwargs = {{ attn_implementation = "eager" }}\n')
    for number, words in enumerate(
        (
            ["--config", "a.toml"],
            ["--config", "b.toml"],
            ["--config", "a.toml", "--model-kwargs", "attn_implementation=sdpa"],
        )
    ):
        with pytest.raises(SystemExit) as ended:
            main(["cache", *words, "--max-tokens", "20", "--device", "cpu", "--out", f"acts{number}"])
        assert not ended.value.code, capsys.readouterr().err
    held = [ActivationCache.read_settings(f"acts{number}")["model_kwargs"] for number in range(3)]
    assert held == [["attn_implementation=eager"]] * 2 + [["attn_implementation=sdpa"]]


def test_a_cache_goes_on_only_with_the_model_loaded_as_it_was(tiny: ModuleType, folder: Path) -> None:
    def source(**settings: Any) -> LanguageModelSource:
        config = ReadingConfig(str(folder / "m"), hookpoint="h.1", context_length=16, forward_tokens=16, **settings)
        return LanguageModelSource(config, tiny.TEXT, held_out=0.0, device="cpu")

    def stop(rows: int) -> None:
        if rows > 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_cache(folder / "acts", source(), shard_rows=20, on_progress=stop)
    eager = source(model_kwargs=("attn_implementation=eager",))
    with pytest.raises(DataError, match=r"model_kwargs is \[\] there and \['attn_implementation=eager'\] here"):
        write_cache(folder / "acts", eager, shard_rows=20)
    write_cache(folder / "acts", source(), shard_rows=20)


@pytest.mark.parametrize("name", ["revision", "subfolder", "adapter"])
def test_settings_of_loading_say_nothing_beside_a_cache_alone(folder: Path, name: str) -> None:
    prepared(folder, activations=folder / "acts").compute(lambda rows: None)
    config = ActivationsConfig(activations=folder / "acts", **{name: "x"})
    with pytest.raises(ConfigError, match=f"{name}: expected nothing beside --activations .*, a cache whose model has"):
        prepare_activations(config, tokens=50, folder=folder, device="cpu")


def test_float16_goes_through_a_cache_and_a_stream(folder: Path) -> None:
    for stream in (True, False):
        (source,) = prepared(folder, stream=stream, model_dtype="float16").compute(lambda rows: None).sources.values()
        assert source.widths == {"h.1": 16}
        assert source.identity["dtype"] == "float16" if stream else source.dtype == torch.bfloat16
