from __future__ import annotations

import re
from pathlib import Path

import pytest

from flashsae.data.cache import ActivationCache
from flashsae.data.cache_writer import write_cache
from flashsae.data.existing import held_hookpoints, stored_in_words, to_be_stored_in_words
from flashsae.data.language_model import LanguageModelSource
from flashsae.settings.reading import ReadingConfig


@pytest.mark.parametrize("prefix", ["transformer", "model", "bert", "gpt_neox"])
def test_the_name_of_the_base_model_may_stand_before_a_hookpoint(prefix: str) -> None:
    held = ["h.0", "h.1", "h.10"]
    assert held_hookpoints(f"{prefix}.h.1", held) == ["h.1"]
    assert held_hookpoints(f"{prefix}.h.*", held) == held
    assert held_hookpoints(f"base_model.model.{prefix}.h.1", held) == ["h.1"]  # as peft prints it
    assert held_hookpoints(f"{prefix}.h.1", [f"{prefix}.h.1", "h.1"]) == [f"{prefix}.h.1"]


@pytest.mark.parametrize("prefix", ["bogus", "encoder", "decoder", "h", "*", "", "transformer.transformer"])
def test_another_word_before_a_hookpoint_is_not_dropped(prefix: str) -> None:
    assert held_hookpoints(f"{prefix}.h.1", ["h.0", "h.1"]) == [f"{prefix}.h.1"]


def test_a_plan_says_how_activations_are_stored(cache_source: LanguageModelSource, tmp_path: Path) -> None:
    told = {}
    for dtype, compression in (("bf16", "none"), ("int8", "none"), ("bf16", "zstd"), ("float32", "zstd")):
        place = tmp_path / f"{dtype}-{compression}"
        write_cache(place, cache_source, dtype=dtype, compression=compression)
        told[dtype, compression] = stored_in_words([ActivationCache(place, name) for name in ("h.0", "h.1")])
    assert re.fullmatch(r"bfloat16, which rounds away \de-06 of the variance", told["bf16", "none"])
    assert re.fullmatch(r"int8, which rounds away \de-05 of the variance", told["int8", "none"])
    held = "; up to 0.00 GB of it are held decompressed in memory"
    assert told["bf16", "zstd"] == told["bf16", "none"].replace("bfloat16", "bfloat16, compressed") + held
    assert told["float32", "zstd"] == f"float32, compressed{held}"
    assert to_be_stored_in_words(ReadingConfig(hookpoint="h.0").filled()) == ""
    config = ReadingConfig(hookpoint="h.0", cache_dtype="int8", cache_compression="zstd")
    expected = ", as int8, which rounds away some 4e-05 of their variance, compressed"
    assert to_be_stored_in_words(config.filled()) == expected


@pytest.mark.parametrize(
    ("pattern", "held", "found"),
    [
        ("encoder.layer.1", ["layers.0", "layers.1"], ["layers.1"]),
        ("encoder.layer.*", ["layers.0", "layers.1"], ["layers.0", "layers.1"]),
        (
            "encoder.layer.{0,1}.mlp:in",
            ["layers.0.mlp:in", "layers.1.mlp"],
            ["encoder.layer.1.mlp:in", "layers.0.mlp:in"],
        ),
        ("encoder.layers.1", ["vision_model.encoder.layers.1"], ["vision_model.encoder.layers.1"]),
        ("encoder.layer.1", ["encoder.layer.1", "layers.1"], ["encoder.layer.1"]),
    ],
)
def test_layers_of_vision_models_have_two_names(pattern: str, held: list[str], found: list[str]) -> None:
    assert held_hookpoints(pattern, held) == found
