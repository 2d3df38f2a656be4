"""Where a default cache goes."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flashsae.data import language_model
from flashsae.data import open as open_module
from flashsae.data.open import ActivationsConfig, Prepared, prepare_activations
from flashsae.data.sources import identity_of
from flashsae.errors import CheckpointError, ConfigError


def interrupt(n_rows: int) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("change", ["nothing", "dtype", "batch"])
def test_a_default_cache_goes_on_only_with_a_model_that_gives_the_same_bytes(tmp_path: Path, change: str) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(f"the cat {i} sat on the mat" for i in range(30)))
    config = ActivationsConfig(dataset=str(tmp_path / "text.txt"), context_length=16)
    folder = tmp_path / "activations"
    changes: dict[str, Any] = {"dtype": {"model_dtype": "bfloat16"}, "batch": {"forward_tokens": 64}}
    begun = replace(config, **changes.get(change, {}))
    with pytest.raises(KeyboardInterrupt):
        prepare_activations(begun, tokens=100, folder=folder, device="cpu").compute(interrupt)
    for _ in range(2):
        opened = prepare_activations(config, tokens=100, folder=folder, device="cpu").compute(lambda rows: None)
    assert opened.sources["encoder.layer.2"].d_in == 384
    assert len(list(folder.iterdir())) == (1 if change == "nothing" else 2)


@pytest.mark.parametrize("stream", [None, True])
def test_several_hookpoints_are_streamed_one_after_another_where_nothing_is_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool | None
) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(f"the cat {i} sat on the mat" for i in range(30)))
    config = ActivationsConfig("minilm", str(tmp_path / "text.txt"), context_length=16, held_out=0.3, stream=stream)
    monkeypatch.setattr(open_module, "LARGEST_DEFAULT_CACHE", 2 * 142 * 384)  # one hookpoint by itself would fit
    monkeypatch.setattr(language_model, "load_with_account", functools.cache(language_model.load_with_account))

    def prepare(hookpoint: str, config: ActivationsConfig) -> Prepared:
        asked = replace(config, hookpoint=hookpoint)
        return prepare_activations(asked, tokens=100, folder=tmp_path / "activations", device="cpu")

    both = prepare("encoder.layer.[01]", config)
    assert "the model reads it 2 times, once for each SAE" in both.source
    assert (both.row_bytes, both.cache_bytes) == (384 * 4, 0)
    sources = both.compute(lambda rows: None).sources
    assert list(sources) == ["encoder.layer.0", "encoder.layer.1"]
    for hookpoint, source in sources.items():
        alone = prepare(hookpoint, both.config)  # as its part of the run is resumed by itself
        assert "times" not in alone.source
        chunk = next(source.chunks("train"))[0].acts
        expected = next(alone.compute(lambda rows: None).sources[hookpoint].chunks("train"))[0].acts
        assert list(chunk) == [hookpoint]
        assert identity_of(source) == identity_of(alone.compute(lambda rows: None).sources[hookpoint])
        assert torch.equal(chunk[hookpoint], expected[hookpoint])
    assert not (tmp_path / "activations").exists()


def test_a_cache_that_is_not_complete_goes_on_as_it_was_begun_or_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"the cat {i} sat on the mat" for i in range(30)))
    (tmp_path / "other.txt").write_text("\n\n".join(f"the dog {i} sat on the mat" for i in range(30)))
    acts = tmp_path / "acts"
    acts.mkdir()
    bare = ActivationsConfig(activations=acts)
    begun_with = replace(
        bare, model="minilm", dataset=str(text), hookpoint="encoder.layer.[01]", context_length=16, held_out=0.3
    )

    def prepare(config: ActivationsConfig, tokens: int = 100) -> Prepared:
        return prepare_activations(config, tokens=tokens, folder=tmp_path / "activations", device="cpu")

    monkeypatch.setattr(language_model, "load_with_account", functools.cache(language_model.load_with_account))
    with pytest.raises(ConfigError, match=r"there is no cache at .*acts\. Check the path"):
        prepare(bare)
    monkeypatch.setattr(open_module, "SHARD_ROWS", 20)
    monkeypatch.setattr(open_module, "write_cache", functools.partial(open_module.write_cache, shard_rows=20))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flashsae.data.shard_writer.ShardWriter.finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(begun_with).compute(lambda rows: None)
    before = {path: path.read_bytes() for path in acts.rglob("*") if path.is_file()}
    advice = r"is not complete \(\d+ rows so far\): finish it with flashsae cache .* --out .*acts, or give the settings"
    for config, told in (
        (bare, r"begun with\.$"),
        (replace(bare, hookpoint="h.1"), r"begun with\.$"),
        (replace(begun_with, model="gpt2", hookpoint="h.1"), "begun with: model is 'minilm' there and 'gpt2' here"),
        (replace(begun_with, dataset=str(tmp_path / "other.txt")), r"begun with: the text was changed"),
        (replace(begun_with, hookpoint="encoder.layer.0"), "begun with: hookpoints is"),
        (replace(begun_with, context_length=8), r"begun with: context_length is 16 there and 8 here\.$"),
    ):
        with pytest.raises(CheckpointError, match=f"{advice}.* {told}"):
            prepare(config)
    with pytest.raises(CheckpointError, match=f"{advice}.* begun with: max_tokens is 142 there"):
        prepare(begun_with, tokens=90)
    assert {path: path.read_bytes() for path in acts.rglob("*") if path.is_file()} == before
    assert len(prepare(begun_with).compute(lambda rows: None).sources) == 2
