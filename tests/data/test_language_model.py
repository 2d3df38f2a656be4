"""Activations, settings, cursors and splits, on tiny random models and on the packaged one."""

from __future__ import annotations

import dataclasses
import json
import pickle
import threading
from itertools import accumulate, count, islice
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from flashsae.data.language_model import LanguageModelSource, dtype_of_model
from flashsae.data.split import Split, split_mask
from flashsae.errors import ConfigError, DataError
from flashsae.lm.hookpoints import resolve_hookpoints
from flashsae.lm.loading import load_language_model
from flashsae.lm.windows import Block, TokenBatch, Windows
from flashsae.settings.reading import ReadingConfig
from flashsae.text.content import Content, Tokens
from flashsae.text.dataset import TextDataset
from flashsae.text.open import open_text


@pytest.fixture(scope="module")
def minilm() -> tuple[nn.Module, Any]:
    return load_language_model("minilm", torch.float32)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_activations_are_those_of_hidden_states(tiny: ModuleType, name: str) -> None:
    make, pattern = tiny.FAMILIES[name]
    model = make().base_model.eval()
    hookpoint = resolve_hookpoints(model, [pattern])[0]
    reader = tiny.source(
        dataclasses.replace(tiny.SMALL, hookpoint=hookpoint), open_text(["the cat sat on"]), model=model
    )
    ids = torch.tensor([reader.tokenizer("the cat sat on", add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        expected = model(input_ids=ids, output_hidden_states=True).hidden_states[1][0]
    chunk = tiny.collect(reader, None)[0]
    acts = chunk.acts[hookpoint]
    torch.testing.assert_close(acts, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(tiny.need(chunk.token_ids), ids[0].to(torch.int32))
    assert tiny.need(chunk.position).tolist() == [0, 1, 2, 3]
    assert reader.d_in == 16
    assert acts.requires_grad is False
    assert not acts.is_inference()


def test_a_block_of_documents_is_cut_while_the_model_reads_the_one_before(
    tiny: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut: list[int] = []
    second_is_cut = threading.Event()
    batches = Windows.batches

    def watched(self: Windows, block: Block) -> list[TokenBatch]:
        cut.append(block[0][0])
        if len(cut) == 2:
            second_is_cut.set()
        return batches(self, block)

    monkeypatch.setattr(Windows, "batches", watched)
    chunks = tiny.source(text=open_text(tiny.DOCUMENTS * 3)).chunks("train")
    _, cursor = next(chunks)
    assert cursor["document"] == 0
    assert second_is_cut.wait(timeout=60)
    assert cut[1] > 0
    chunks.close()


def test_a_submodule_that_gives_a_tuple_and_one_that_gives_no_sequence(tiny: ModuleType) -> None:
    assert tiny.source(hookpoints=("h.0.attn", "h.0.mlp.c_fc")).widths == {
        "h.0.attn": 16,
        "h.0.mlp.c_fc": 64,
    }
    with pytest.raises(ConfigError, match=r"expected an output of shape \[sequences, length, d\], got \[1, 16\]"):
        tiny.source(dataclasses.replace(tiny.SMALL, hookpoint="pooler"), model=tiny.bert())


def test_d_in_needs_one_hookpoint(tiny: ModuleType) -> None:
    reader = tiny.source(dataclasses.replace(tiny.SMALL, hookpoint="h.*"))
    with pytest.raises(ConfigError, match=r"expected activations of exactly one site here, got h\.0, h\.1, h\.2\."):
        _ = reader.d_in


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_length": 33}, "tiny reads at most 32 tokens, got 33"),
        ({"context_length": 1}, "expected more than the 1 special tokens"),
        ({"context_length": 65}, "context_length: expected context_length <= forward_tokens = 64, got 65"),
        ({"max_norm_ratio": 0.5}, "max_norm_ratio: expected a number above 1, got 0.5"),
        ({"max_documents": 0}, "max_documents: expected a positive number, got 0"),
        ({"model_dtype": "int8"}, "model_dtype: expected one of auto, float32, bfloat16, float16, got 'int8'"),
        ({"hookpoint": ""}, "hookpoint: expected a string, got ''"),
    ],
)
def test_settings_out_of_range_are_refused(tiny: ModuleType, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny.source(dataclasses.replace(tiny.SMALL, **changes), bos=True)


def test_the_device_decides_the_dtype(tiny: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(tiny.SMALL, model_dtype="auto")
    assert dtype_of_model(config, "cpu") == torch.float32
    with pytest.raises(ConfigError, match="device: expected auto, cpu or a CUDA device that exists, got 'tpu9'"):
        dtype_of_model(config, "tpu9")
    monkeypatch.setattr("flashsae.data.language_model.resolve_device", torch.device)
    assert dtype_of_model(config, "cuda") == torch.bfloat16
    assert dtype_of_model(tiny.SMALL, "cuda") == torch.float32


def test_the_norm_filter_drops_what_any_hookpoint_finds_large(tiny: ModuleType) -> None:
    model = tiny.gpt2()
    with torch.no_grad():
        model.base_model.wte.weight[5] *= 1000  # one word becomes an attention sink
    hookpoints = ("wte", "h.0.ln_1")  # behind a norm no token is large
    everything, _ = tiny.collect(tiny.source(hookpoints=hookpoints, model=model), None)
    config = dataclasses.replace(tiny.SMALL, max_norm_ratio=8.0)
    filtered, cursors = tiny.collect(tiny.source(config, hookpoints=hookpoints, model=model), None)
    is_sink = tiny.need(everything.token_ids) == 5
    assert 0 < int(is_sink.sum()) < len(is_sink) / 2
    assert list(filtered.acts) == list(hookpoints)
    assert tiny.same(filtered, everything.select(~is_sink))
    assert cursors[-1]["dropped"] == int(is_sink.sum())


def test_activations_that_are_not_finite_name_model_hookpoint_and_documents(tiny: ModuleType) -> None:
    model = tiny.gpt2()
    reader = tiny.source(text=open_text(["the cat sat", "on a mat"]), model=model)
    with torch.no_grad():
        model.base_model.wte.weight[reader.tokenizer.convert_tokens_to_ids("mat")] = float("nan")
    with pytest.raises(DataError, match=r"tiny gives NaN or Inf at h\.1 for the documents \[1\] of a list of 2 texts"):
        tiny.collect(reader, None)


def test_what_to_do_about_nan_depends_on_the_precision(tiny: ModuleType) -> None:
    for dtype, advice in (
        (torch.float32, r"Take those documents out\.$"),
        (torch.bfloat16, r"as on the CPU \(device cpu"),
    ):
        model = tiny.gpt2().to(dtype)
        reader = tiny.source(text=open_text(["the cat sat"]), model=model, held_out=0.0)
        with torch.no_grad():
            model.base_model.wte.weight[:] = float("nan")
        with pytest.raises(DataError, match=advice):
            tiny.collect(reader, None)


def test_where_every_document_is_not_finite_it_is_the_model(tiny: ModuleType) -> None:
    model = tiny.gpt2()
    reader = tiny.source(text=open_text(["the cat sat", "on a mat"]), model=model, held_out=0.0)
    with torch.no_grad():
        model.base_model.wte.weight[:] = float("inf")
    with pytest.raises(DataError, match=r"^model: tiny gives NaN or Inf at h\.1 whatever it reads: its weights"):
        tiny.collect(reader, None)


@pytest.mark.parametrize("split", ["train", "held_out", None])
def test_any_cursor_goes_on_with_the_same_bytes_and_runs_nothing_twice(tiny: ModuleType, split: Split | None) -> None:
    model = tiny.gpt2()
    config = dataclasses.replace(tiny.SMALL, forward_tokens=16 if split == "held_out" else 32, max_norm_ratio=1.5)
    reader = tiny.source(config, model=model)
    whole = list(reader.chunks(split))
    assert len({cursor["document"] for _, cursor in whole}) > 2
    assert any(cursor["batch"] for _, cursor in whole)
    runs: list[int] = []
    model.base_model.wte.register_forward_hook(lambda module, args, output: runs.append(1))
    for place in {0, len(whole) // 2, len(whole) // 2 + 1, len(whole) - 1}:
        cursor = json.loads(json.dumps(whole[place][1]))
        runs.clear()
        rest = list(reader.chunks(split, cursor))
        assert len(runs) == len(rest) == len(whole) - place - 1
        for (chunk, behind), (expected, expected_behind) in zip(rest, whole[place + 1 :]):
            assert behind == expected_behind
            assert tiny.same(chunk, expected)


INPUTS: list[dict[str, Any]] = [
    {"pack": True},
    {"pack": True, "overlap": 3, "bos_every": "document"},
    {"overlap": 5, "skip_first": 2},
    {"bos_every": "document"},
]


@pytest.mark.parametrize("changes", INPUTS)
@pytest.mark.parametrize("split", ["train", None])
def test_inputs_of_every_kind_go_on_from_any_cursor(
    tiny: ModuleType, split: Split | None, changes: dict[str, Any]
) -> None:
    contents: list[Content] = [*tiny.DOCUMENTS]
    contents[::3] = [Tokens(range(2, 18)[: 1 + place]) for place in range(len(contents[::3]))]
    text = TextDataset("mixed", lambda start: islice(enumerate(contents), start, None))
    config = dataclasses.replace(tiny.SMALL, forward_tokens=32, **changes)
    reader = tiny.source(config, text, bos=True)
    whole = list(reader.chunks(split))
    assert len({cursor["document"] for _, cursor in whole}) > 1
    for place in {0, len(whole) // 2, len(whole) // 2 + 1}:
        rest = list(reader.chunks(split, json.loads(json.dumps(whole[place][1]))))
        assert [cursor for _, cursor in rest] == [cursor for _, cursor in whole[place + 1 :]]
        assert all(tiny.same(chunk, expected) for (chunk, _), (expected, _) in zip(rest, whole[place + 1 :]))
    everything = dataclasses.replace(config, pack=False, overlap=0, bos_every="context")
    plain = tiny.collect(tiny.source(everything, text, bos=True), split)[0]
    if "skip_first" not in changes:
        chunk = tiny.concatenate([chunk for chunk, _ in whole])
        for number in plain.group.unique().tolist():
            rows = [tiny.need(each.token_ids)[each.group == number].sort().values for each in (chunk, plain)]
            assert torch.equal(*rows)


def test_what_is_held_out_is_packed_with_nothing_that_is_trained_on(tiny: ModuleType) -> None:
    model = tiny.gpt2()
    config = dataclasses.replace(tiny.SMALL, pack=True)
    numbers = torch.arange(len(tiny.DOCUMENTS))
    is_held_out = split_mask(numbers, 0.2, "held_out").tolist()
    others = [" ".join(reversed(text.split())) for text in tiny.DOCUMENTS]
    changed = open_text([other if out else text for text, other, out in zip(tiny.DOCUMENTS, others, is_held_out)])
    chunks = [tiny.collect(tiny.source(config, text, model=model), None)[0] for text in (tiny.TEXT, changed)]
    trained, held_out = (
        [chunk.select(split_mask(chunk.group, 0.2, split)) for chunk in chunks] for split in ("train", "held_out")
    )
    assert tiny.same(*trained)
    assert not tiny.same(*held_out)
    assert 0 < len(held_out[0].group) < len(trained[0].group)
    assert len(pickle.dumps(tiny.source(config, model=model)._windows)) < 20_000  # without the model
    together = tiny.collect(tiny.source(config, model=model, held_out=0.0), None)[0]
    assert not torch.equal(together.acts["h.1"], chunks[0].acts["h.1"])
    for split, parts in (("train", trained), ("held_out", held_out)):
        streamed = tiny.collect(tiny.source(config, model=model), split)[0]
        assert sorted(streamed.group.tolist()) == sorted(parts[0].group.tolist())


@pytest.mark.parametrize("changes", [{}, {"max_documents": 7}, {"forward_tokens": 16}])
def test_what_is_left_out_is_told_by_the_first_documents(tiny: ModuleType, changes: dict[str, int]) -> None:
    reader = tiny.source(dataclasses.replace(tiny.SMALL, **changes), bos=True)
    behind = accumulate(len(text) for text in tiny.DOCUMENTS)
    n_of_a_block = next(n for n, size in enumerate(behind, 1) if size >= 32 * reader.config.forward_tokens)
    n_documents = min(n_of_a_block, reader.config.max_documents or 5000)
    told = reader.inputs_in_words()
    assert told.startswith("16 tokens, documents apart, <s> at each; of the tokens read ")
    assert told.endswith(f"of the forwards is padding (by the first {n_documents} documents)")
    many = TextDataset("many", lambda start: ((number, "the cat") for number in count(start)))
    plenty = tiny.source(dataclasses.replace(tiny.SMALL, forward_tokens=10**6), text=many)
    assert "by the first 5,000 documents" in plenty.inputs_in_words()
    filtered = tiny.source(dataclasses.replace(tiny.SMALL, max_norm_ratio=2.5)).inputs_in_words()
    assert filtered.endswith(", beside those that max_norm_ratio = 2.5 will leave out")


def test_the_splits_are_disjoint_and_together_everything(tiny: ModuleType) -> None:
    model = tiny.gpt2()
    parts = {split: tiny.collect(tiny.source(model=model), split)[0] for split in ("train", "held_out")}
    everything = tiny.collect(tiny.source(model=model), None)[0]
    documents = {split: set(chunk.group.tolist()) for split, chunk in parts.items()}
    assert documents["train"].isdisjoint(documents["held_out"])
    assert documents["train"] | documents["held_out"] == set(range(40))
    assert 3 <= len(documents["held_out"]) <= 15
    assert split_mask(parts["held_out"].group, 0.2, "held_out").all()
    assert sum(len(chunk.group) for chunk in parts.values()) == len(everything.group)
    everything_again = tiny.collect(tiny.source(model=model, held_out=0.0), "train")[0]
    assert tiny.same(everything, everything_again)


def test_an_epoch_ends_at_max_documents_in_both_splits(tiny: ModuleType) -> None:
    reader = tiny.source(dataclasses.replace(tiny.SMALL, max_documents=10))
    groups = [tiny.collect(reader, split)[0].group.tolist() for split in ("train", "held_out")]
    assert set(groups[0]) | set(groups[1]) == set(range(10))


def test_blank_documents_keep_their_numbers(tiny: ModuleType) -> None:
    chunk = tiny.collect(tiny.source(text=open_text(["the cat", "", "a mat"])), None)[0]
    assert chunk.group.tolist() == [0, 0, 2, 2]


def test_minilm_reads_its_own_hidden_states(tiny: ModuleType, minilm: tuple[nn.Module, Any]) -> None:
    config = ReadingConfig("minilm", hookpoint="encoder.layer.[25]", model_dtype="float32")
    sentence = "Sparse autoencoders decompose activations."
    reader = LanguageModelSource(config, open_text([sentence]), held_out=0.0, loaded=minilm)
    assert reader.widths == {"encoder.layer.2": 384, "encoder.layer.5": 384}
    model, tokenizer = minilm
    inputs = tokenizer(sentence, return_tensors="pt")
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    chunk, _ = tiny.collect(reader, "train")
    for layer in (2, 5):
        acts = chunk.acts[f"encoder.layer.{layer}"]
        torch.testing.assert_close(acts, states[layer + 1][0, 1:-1], rtol=1e-4, atol=1e-4)
    assert tiny.need(chunk.token_ids).tolist() == inputs["input_ids"][0, 1:-1].tolist()
    assert tiny.need(chunk.position).tolist() == list(range(1, len(chunk.group) + 1))


def test_minilm_masks_cls_and_sep(tiny: ModuleType, minilm: tuple[nn.Module, Any]) -> None:
    config = ReadingConfig("minilm", hookpoint="encoder.layer.0", context_length=32, forward_tokens=256)
    reader = LanguageModelSource(config, open_text(["the cat sat " * 300]), held_out=0.0, loaded=minilm)
    chunk = tiny.concatenate([chunk for chunk, _ in reader.chunks("train")])
    assert len(chunk.group) == 900
    assert not set(tiny.need(chunk.token_ids).tolist()) & set(minilm[1].all_special_ids)
    assert int(tiny.need(chunk.position).max()) == 30
    with pytest.raises(ConfigError, match="minilm reads at most 512 tokens, got 513"):
        LanguageModelSource(
            dataclasses.replace(config, context_length=513, forward_tokens=513), tiny.TEXT, loaded=minilm
        )


def test_a_part_of_the_hookpoints_is_read_as_if_it_stood_alone(tiny: ModuleType) -> None:
    model = tiny.gpt2()
    config = dataclasses.replace(tiny.SMALL, shuffle_documents=True)
    reader = tiny.source(config, hookpoints=("h.*", "h.1.mlp:in"), model=model)
    whole, _ = tiny.collect(reader, "train")
    assert reader.row_bytes == 4 * 4 * 16
    _ = reader.identity, reader.fingerprint
    for name in reader.hookpoints:
        part = reader.at(name)
        alone = tiny.source(dataclasses.replace(config, hookpoint=name), model=model)
        assert (part.hookpoints, part.widths, part.name) == ((name,), {name: 16}, alone.name)
        assert (part.identity, part.fingerprint) == (alone.identity, alone.fingerprint)
        chunk, _ = tiny.collect(part, "train")
        assert tiny.same(chunk, tiny.collect(alone, "train")[0])
        assert torch.equal(chunk.acts[name], whole.acts[name])
    assert reader.hookpoints == ("h.0", "h.1", "h.2", "h.1.mlp:in")
