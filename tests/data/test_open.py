"""Where a default cache goes."""

from __future__ import annotations

import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flashsae.data import language_model
from flashsae.data import open as open_module
from flashsae.data.open import ActivationsConfig, Prepared, prepare_activations
from flashsae.data.sources import identity_of
from flashsae.errors import CheckpointError, ConfigError, DataError
from helpers import tiny_models


def interrupt(n_rows: int) -> None:
    raise KeyboardInterrupt


IDS = [list(range(2, 18))[: 3 + number % 13] for number in range(12)]
CHATS = [[{"role": "cat", "content": "the mat"}, {"role": "assistant", "content": "went out"}]] * 12


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model whose tokenizer has a chat template."""
    folder = tmp_path_factory.mktemp("chatty") / "model"
    tiny_models.gpt2().save_pretrained(folder)  # type: ignore[operator]
    tiny_models.chat_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize(
    ("rows", "settings", "expected"),
    [
        ([{"text": " ".join(tiny_models.WORDS[id - 2] for id in ids)} for ids in IDS], {}, IDS),
        ([{"input_ids": ids} for ids in IDS], {}, IDS),
        ([{"input_ids": [0, *ids, 1], "attention_mask": [1] * (len(ids) + 1) + [0]} for ids in IDS], {}, IDS),
        (
            [{"input_ids": ids, "loss_mask": [0] * (len(ids) - 2) + [1, 1]} for ids in IDS],
            {"text_column": "input_ids,loss_mask"},
            [ids[-2:] for ids in IDS],
        ),
        ([{"messages": chat} for chat in CHATS], {}, [[3, 2, 7, 19, 11, 12]] * 12),
        ([{"messages": chat} for chat in CHATS], {"assistant_only": True}, [[11, 12]] * 12),
    ],
)
def test_documents_of_every_kind_become_the_rows_of_their_tokens(
    chatty: Path, tmp_path: Path, rows: list[Any], settings: dict[str, Any], expected: list[list[int]], pack: bool
) -> None:
    text = tmp_path / "documents.jsonl"
    text.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    config = ActivationsConfig(
        str(chatty), str(text), hookpoint="h.1", context_length=8, held_out=0.3, overlap=2, pack=pack, **settings
    )
    prepared = prepare_activations(config, tokens=1000, folder=tmp_path, device="cpu")
    assert f"documents {'packed' if pack else 'apart'}, the last 2 again" in prepared.inputs()
    (source,) = prepared.compute(lambda rows: None).sources.values()
    chunks = [chunk for split in ("train", "held_out") for chunk, _ in source.chunks(split)]
    rows_of: dict[int, list[int]] = {number: [] for number in range(12)}
    for chunk in chunks:
        for number, token in zip(chunk.group.tolist(), tiny_models.need(chunk.token_ids).tolist()):
            rows_of[number].append(token)
    assert [sorted(rows_of[number]) for number in range(12)] == [sorted(ids) for ids in expected]


def test_another_chat_template_is_another_reading_of_chats_alone(chatty: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(chatty, model)
    for name, rows in (("chats", [{"messages": chat} for chat in CHATS]), ("text", [{"text": "the cat"}] * 12)):
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    def prepared(text: str, **place: Path) -> Prepared:
        config = ActivationsConfig(str(model), str(tmp_path / f"{text}.jsonl"), hookpoint="h.1", **place, held_out=0.3)
        config = replace(config, context_length=8)
        return prepare_activations(config, tokens=30, folder=tmp_path / "activations", device="cpu")

    named = {text: tmp_path / f"acts-{text}" for text in ("chats", "text")}
    for text, place in named.items():
        prepared(text, activations=place).compute(lambda rows: None)
        assert prepared(text, activations=place).ready
    places = {text: prepared(text).config.activations for text in named}
    (template,) = model.glob("*.jinja")
    template.write_text(template.read_text().replace("<turn>", "<turn> the "))
    assert prepared("text").config.activations == places["text"]
    assert prepared("text", activations=named["text"]).ready
    assert prepared("chats").config.activations != places["chats"]
    with pytest.raises(DataError, match=r"the model .* was changed since"):
        prepared("chats", activations=named["chats"])


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
def test_several_hookpoints_are_streamed_in_one_reading_where_nothing_is_cached(
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
    assert both.source.endswith("streamed beside the training")
    assert (both.row_bytes, both.cache_bytes) == (2 * 384 * 4, 0)
    activations = both.compute(lambda rows: None)
    sources = activations.sources
    assert list(sources) == ["encoder.layer.0", "encoder.layer.1"]
    for hookpoint, source in sources.items():
        alone = prepare(hookpoint, both.config)  # as its part of the run is resumed by itself
        chunk = next(source.chunks("train"))[0].acts
        expected = next(alone.compute(lambda rows: None).sources[hookpoint].chunks("train"))[0].acts
        assert list(chunk) == [hookpoint]
        assert identity_of(source) == identity_of(alone.compute(lambda rows: None).sources[hookpoint])
        assert torch.equal(chunk[hookpoint], expected[hookpoint])
    joint = next(activations.of(list(sources)).chunks("train"))[0].acts
    assert all(torch.equal(joint[name], next(source.chunks("train"))[0].acts[name]) for name, source in sources.items())
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
