"""Hookpoints, windows, masks, cursors and splits, on the packaged model and on tiny random ones."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flashsae.data.language_model import (
    LanguageModelConfig,
    LanguageModelSource,
    load_language_model,
    match_hookpoints,
    resolve_hookpoints,
)
from flashsae.data.sources import Chunk, Cursor, Split, split_mask
from flashsae.data.text import TextDataset, open_text
from flashsae.errors import ConfigError, DataError

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "went", "out", "to", "see", "what", "was", "there"]
DOCUMENTS = [" ".join(WORDS[(i * 5 + j * (i + 2)) % len(WORDS)] for j in range(2 + (i * 7) % 45)) for i in range(40)]
TEXT = open_text(DOCUMENTS)


def word_tokenizer(*, bos: bool = False) -> Any:
    """One token a word, no padding token; with a beginning token if asked."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<s>", "<unk>", *dict.fromkeys(WORDS)])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>" if bos else None)


def tiny_gpt2(layers: int = 3) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=layers, n_head=2)
    return GPT2LMHeadModel(config)


def tiny_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaModel(LlamaConfig(vocab_size=64, max_position_embeddings=32, **sizes))


def tiny_bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertModel(BertConfig(vocab_size=64, max_position_embeddings=32, **sizes))


TINY: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "gpt2": (tiny_gpt2, "h.*"),
    "llama": (tiny_llama, "layers.*"),
    "bert": (tiny_bert, "encoder.layer.*"),
}
SMALL = LanguageModelConfig("tiny", ("h.1",), context_length=16, batch_tokens=64)


def source(
    config: LanguageModelConfig = SMALL,
    text: TextDataset = TEXT,
    *,
    model: nn.Module | None = None,
    bos: bool = False,
    held_out: float = 0.2,
) -> LanguageModelSource:
    return LanguageModelSource(config, text, held_out=held_out, loaded=(model or tiny_gpt2(), word_tokenizer(bos=bos)))


def collect(
    reader: LanguageModelSource, split: Split | None, cursor: Cursor | None = None
) -> tuple[dict[str, Chunk], list[Cursor]]:
    """Concatenate an epoch."""
    parts, cursors = [], []
    for chunks, behind in reader.chunks_by_hookpoint(split, cursor):
        parts.append(chunks)
        cursors.append(behind)
    return {name: concatenate([part[name] for part in parts]) for name in reader.hookpoints}, cursors


def concatenate(chunks: list[Chunk]) -> Chunk:
    return Chunk(
        torch.cat([chunk.acts for chunk in chunks]),
        torch.cat([chunk.group for chunk in chunks]),
        torch.cat([need(chunk.token_ids) for chunk in chunks]),
        torch.cat([need(chunk.position) for chunk in chunks]),
    )


def need(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def same(a: Chunk, b: Chunk) -> bool:
    return all(torch.equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(Chunk))


@pytest.fixture(scope="module")
def minilm() -> tuple[nn.Module, Any]:
    return load_language_model(LanguageModelConfig("minilm", ("encoder.layer.2",), dtype="float32", device="cpu"))


# --- hookpoints


def test_wildcards_stay_within_a_level_and_sort_numbers_as_numbers() -> None:
    model = tiny_gpt2(layers=11).base_model
    assert resolve_hookpoints(model, ["h.*"]) == tuple(f"h.{i}" for i in range(11))
    assert resolve_hookpoints(model, ["h.1?", "h.2", "h.*.mlp"])[:4] == ("h.10", "h.2", "h.0.mlp", "h.1.mlp")
    assert resolve_hookpoints(model, ["h.2", "h.[12]"]) == ("h.2", "h.1")
    assert resolve_hookpoints(model, ["transformer.h.3"]) == ("h.3",)
    assert match_hookpoints("h.*", ["h.10", "h.9", "h.9.mlp", "g.1"]) == ["h.9", "h.10"]
    assert match_hookpoints("x.*", ["h.10"]) == []


@pytest.mark.parametrize("pattern", ["h.7", "layers.*", "h.1.mpl", "nothing"])
def test_an_unknown_hookpoint_names_near_ones(pattern: str) -> None:
    with pytest.raises(ConfigError, match=r"no module .*Near: \w.*Its layers are h\.0 to h\.2\.") as caught:
        resolve_hookpoints(tiny_gpt2().base_model, [pattern])
    assert ("h.1.mlp" in str(caught.value)) == (pattern == "h.1.mpl")


@pytest.mark.parametrize(("name", "n_layers"), [("gpt2", 3), ("llama", 2), ("bert", 2)])
def test_the_forward_stops_behind_the_last_hooked_module(name: str, n_layers: int) -> None:
    make, pattern = TINY[name]
    model = make().base_model
    ran: list[str] = []
    for path in resolve_hookpoints(model, [pattern]):
        model.get_submodule(path).register_forward_hook(lambda module, args, output, path=path: ran.append(path))
    layers = resolve_hookpoints(model, [pattern])
    config = dataclasses.replace(SMALL, hookpoints=(layers[0],))
    reader = source(config, model=model)
    assert ran == [layers[0]]
    next(reader.chunks("train"))
    assert ran == [layers[0]] * 2
    ran.clear()
    both = source(dataclasses.replace(config, hookpoints=(layers[1], layers[0])), model=model)
    assert ran == [layers[0], layers[1]]
    assert both.hookpoints == (layers[1], layers[0])
    assert len(layers) == n_layers


def test_hooks_are_gone_and_the_model_is_frozen_afterwards() -> None:
    model = tiny_gpt2()
    reader = source(model=model)
    next(reader.chunks("train"))
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.base_model.parameters())
    assert not model.base_model.training


@pytest.mark.parametrize("name", TINY)
def test_activations_are_those_of_hidden_states(name: str) -> None:
    make, pattern = TINY[name]
    model = make().base_model
    hookpoint = resolve_hookpoints(model, [pattern])[0]
    reader = source(dataclasses.replace(SMALL, hookpoints=(hookpoint,)), open_text(["the cat sat on"]), model=model)
    ids = torch.tensor([reader.tokenizer("the cat sat on", add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        expected = model(input_ids=ids, output_hidden_states=True).hidden_states[1][0]
    chunk = collect(reader, None)[0][hookpoint]
    torch.testing.assert_close(chunk.acts, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(need(chunk.token_ids), ids[0].to(torch.int32))
    assert need(chunk.position).tolist() == [0, 1, 2, 3]
    assert reader.d_in == 16
    assert chunk.acts.requires_grad is False
    assert not chunk.acts.is_inference()


def test_a_later_layer_that_works_in_place_changes_nothing() -> None:
    model = tiny_gpt2()
    expected = collect(source(model=model), None)[0]["h.1"]

    def add_in_place(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        args[0].add_(1.0)

    model.base_model.get_submodule("h.2").register_forward_pre_hook(add_in_place)
    got = collect(source(dataclasses.replace(SMALL, hookpoints=("h.1", "h.2")), model=model), None)[0]["h.1"]
    assert same(got, expected)


def test_a_submodule_that_gives_a_tuple_and_one_that_gives_no_sequence() -> None:
    assert source(dataclasses.replace(SMALL, hookpoints=("h.0.attn", "h.0.mlp.c_fc"))).widths == {
        "h.0.attn": 16,
        "h.0.mlp.c_fc": 64,
    }
    with pytest.raises(ConfigError, match=r"expected an output of shape \[sequences, length, d\], got \[1, 16\]"):
        source(dataclasses.replace(SMALL, hookpoints=("pooler",)), model=tiny_bert())


def test_d_in_and_chunks_need_one_hookpoint() -> None:
    reader = source(dataclasses.replace(SMALL, hookpoints=("h.*",)))
    with pytest.raises(ConfigError, match=r"expected exactly one here, got h\.0, h\.1, h\.2"):
        _ = reader.d_in
    with pytest.raises(ConfigError, match="expected exactly one"):
        reader.chunks("train")


# --- windows and masks


@pytest.mark.parametrize(("name", "bos"), [("gpt2", False), ("llama", True), ("bert", False)])
def test_padding_and_neighbours_do_not_change_a_document(name: str, bos: bool) -> None:
    make, pattern = TINY[name]
    model = make()
    config = dataclasses.replace(SMALL, hookpoints=(pattern,), batch_tokens=128)
    together, _ = collect(source(config, model=model, bos=bos), None)
    for document in (1, 4, 7):
        alone, _ = collect(source(config, open_text([DOCUMENTS[document]]), model=model, bos=bos), None)
        for hookpoint, chunk in alone.items():
            mine = together[hookpoint].select(together[hookpoint].group == document)
            assert torch.equal(need(mine.token_ids), need(chunk.token_ids))
            torch.testing.assert_close(mine.acts, chunk.acts, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bos", [False, True])
def test_every_word_comes_once_and_windows_hold_the_special_tokens(bos: bool) -> None:
    reader = source(bos=bos)
    chunk = collect(reader, None)[0]["h.1"]
    words = [reader.tokenizer(document, add_special_tokens=False)["input_ids"] for document in DOCUMENTS]
    content = 15 if bos else 16
    for document, ids in enumerate(words):
        rows = chunk.select(chunk.group == document)
        place = need(rows.position) - int(bos)
        windows = [ids[start : start + content] for start in range(0, len(ids), content)]
        expected = sorted(tuple(enumerate(window)) for window in windows)
        got = list(zip(place.tolist(), need(rows.token_ids).tolist()))
        starts = [i for i, (position, _) in enumerate(got) if position == 0] + [len(got)]
        assert sorted(tuple(got[a:b]) for a, b in pairwise(starts)) == expected


def test_special_tokens_are_kept_where_asked_and_padding_never() -> None:
    config = dataclasses.replace(SMALL, mask_special=False)
    masked, kept = collect(source(bos=True), None)[0]["h.1"], collect(source(config, bos=True), None)[0]["h.1"]
    is_bos = need(kept.token_ids) == 0
    assert torch.equal(is_bos, need(kept.position) == 0)
    assert same(kept.select(~is_bos), masked)
    n_windows = sum(-(-len(document.split()) // 15) for document in DOCUMENTS)
    assert int(is_bos.sum()) == n_windows


def test_what_the_tokenizer_adds_is_masked_even_where_it_is_an_ordinary_word() -> None:
    from tokenizers import processors

    tokenizer = word_tokenizer()
    ids = {word: tokenizer.convert_tokens_to_ids(word) for word in ("out", "there")}
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="out $A there", special_tokens=list(ids.items())
    )
    text = open_text(["the cat sat " * 20, "went out there"])
    reader = LanguageModelSource(SMALL, text, loaded=(tiny_gpt2(), tokenizer))
    chunk = collect(reader, None)[0]["h.1"]
    long = chunk.select(chunk.group == 0)
    assert len(long.acts) == 60
    assert set(need(long.position).tolist()) == set(range(1, 15))
    assert need(chunk.select(chunk.group == 1).token_ids).tolist()[1:] == list(ids.values())


def test_special_tokens_inside_a_text_are_masked() -> None:
    chunk = collect(source(text=open_text(["the cat xyzzy sat"])), None)[0]["h.1"]
    assert need(chunk.position).tolist() == [0, 1, 3]


def test_a_batch_holds_at_most_batch_tokens() -> None:
    model = tiny_gpt2()
    shapes: list[torch.Size] = []
    model.base_model.wte.register_forward_hook(lambda module, args, output: shapes.append(args[0].shape))
    reader = source(model=model)
    shapes.clear()
    collect(reader, None)
    assert all(shape.numel() <= 64 for shape in shapes)
    assert max(shape.numel() for shape in shapes) > 48
    n_tokens = sum(len(document.split()) for document in DOCUMENTS)
    assert sum(shape.numel() for shape in shapes) < 1.2 * n_tokens


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_length": 33, "batch_tokens": 99}, "tiny reads at most 32 tokens, got 33"),
        ({"context_length": 1}, "expected more than the 1 special tokens"),
        ({"context_length": 65, "batch_tokens": 64}, "batch_tokens 64 and context_length 65"),
        ({"max_norm_ratio": 0.5}, "max_norm_ratio: expected more than 1 or None, got 0.5"),
        ({"max_documents": 0}, "max_documents: expected at least 1"),
        ({"dtype": "int8"}, "dtype: expected 'auto'"),
        ({"hookpoints": ()}, "hookpoints: expected a tuple of at least one"),
        ({"hookpoints": "h.1"}, "hookpoints: expected a tuple of at least one"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        source(dataclasses.replace(SMALL, **changes), bos=True)


def test_devices_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert dataclasses.replace(SMALL).resolved_dtype() == torch.float32
    for device, message in (("cuda", "torch sees no GPU"), ("tpu9", "expected 'auto', 'cpu' or 'cuda', got 'tpu9'")):
        with pytest.raises(ConfigError, match=message):
            dataclasses.replace(SMALL, device=device).resolved_device()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert dataclasses.replace(SMALL).resolved_dtype() == torch.bfloat16


# --- the norm filter, and what is not finite


def test_the_norm_filter_drops_what_any_hookpoint_finds_large() -> None:
    model = tiny_gpt2()
    with torch.no_grad():
        model.base_model.wte.weight[5] *= 1000  # one word becomes an attention sink
    config = dataclasses.replace(SMALL, hookpoints=("wte", "h.0.ln_1"))  # behind a norm no token is large
    everything, _ = collect(source(config, model=model), None)
    filtered, cursors = collect(source(dataclasses.replace(config, max_norm_ratio=8.0), model=model), None)
    is_sink = need(everything["wte"].token_ids) == 5
    assert 0 < int(is_sink.sum()) < len(is_sink) / 2
    for name in config.hookpoints:
        assert same(filtered[name], everything[name].select(~is_sink))
    assert cursors[-1]["dropped"] == int(is_sink.sum())


def test_activations_that_are_not_finite_name_model_hookpoint_and_documents() -> None:
    model = tiny_gpt2()
    reader = source(text=open_text(["the cat sat", "on a mat"]), model=model)
    with torch.no_grad():
        model.base_model.wte.weight[reader.tokenizer.convert_tokens_to_ids("mat")] = float("nan")
    with pytest.raises(DataError, match=r"tiny gives NaN or Inf at h\.1 for the documents \[1\] of a list of 2 texts"):
        collect(reader, None)


# --- cursors and splits


@pytest.mark.parametrize("split", ["train", "held_out", None])
def test_any_cursor_goes_on_with_the_same_bytes_and_runs_nothing_twice(split: Split | None) -> None:
    model = tiny_gpt2()
    config = dataclasses.replace(SMALL, batch_tokens=16 if split == "held_out" else 32, max_norm_ratio=1.5)
    reader = source(config, model=model)
    whole = list(reader.chunks_by_hookpoint(split))
    assert len({cursor["document"] for _, cursor in whole}) > 2
    assert any(cursor["batch"] for _, cursor in whole)
    runs: list[int] = []
    model.base_model.wte.register_forward_hook(lambda module, args, output: runs.append(1))
    for place in {0, len(whole) // 2, len(whole) // 2 + 1, len(whole) - 1}:
        cursor = json.loads(json.dumps(whole[place][1]))
        runs.clear()
        rest = list(reader.chunks_by_hookpoint(split, cursor))
        assert len(runs) == len(rest) == len(whole) - place - 1
        for (chunks, behind), (expected, expected_behind) in zip(rest, whole[place + 1 :]):
            assert behind == expected_behind
            assert same(chunks["h.1"], expected["h.1"])


def test_the_splits_are_disjoint_and_together_everything() -> None:
    model = tiny_gpt2()
    parts = {split: collect(source(model=model), split)[0]["h.1"] for split in ("train", "held_out")}
    everything = collect(source(model=model), None)[0]["h.1"]
    documents = {split: set(chunk.group.tolist()) for split, chunk in parts.items()}
    assert documents["train"].isdisjoint(documents["held_out"])
    assert documents["train"] | documents["held_out"] == set(range(40))
    assert 3 <= len(documents["held_out"]) <= 15
    assert split_mask(parts["held_out"].group, 0.2, "held_out").all()
    assert sum(len(chunk.acts) for chunk in parts.values()) == len(everything.acts)
    everything_again = collect(source(model=model, held_out=0.0), "train")[0]["h.1"]
    assert same(everything, everything_again)


def test_an_epoch_ends_at_max_documents_in_both_splits() -> None:
    reader = source(dataclasses.replace(SMALL, max_documents=10))
    groups = [collect(reader, split)[0]["h.1"].group.tolist() for split in ("train", "held_out")]
    assert set(groups[0]) | set(groups[1]) == set(range(10))


def test_blank_documents_keep_their_numbers() -> None:
    chunk = collect(source(text=open_text(["the cat", "", "a mat"])), None)[0]["h.1"]
    assert chunk.group.tolist() == [0, 0, 2, 2]


# --- real tokenizers and the packaged model


def test_minilm_reads_its_own_hidden_states(minilm: tuple[nn.Module, Any]) -> None:
    config = LanguageModelConfig("minilm", ("encoder.layer.2", "encoder.layer.5"), dtype="float32", device="cpu")
    sentence = "Sparse autoencoders decompose activations."
    reader = LanguageModelSource(config, open_text([sentence]), held_out=0.0, loaded=minilm)
    assert reader.widths == {"encoder.layer.2": 384, "encoder.layer.5": 384}
    model, tokenizer = minilm
    inputs = tokenizer(sentence, return_tensors="pt")
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    chunks, _ = collect(reader, "train")
    for layer in (2, 5):
        chunk = chunks[f"encoder.layer.{layer}"]
        torch.testing.assert_close(chunk.acts, states[layer + 1][0, 1:-1], rtol=1e-4, atol=1e-4)
        assert need(chunk.token_ids).tolist() == inputs["input_ids"][0, 1:-1].tolist()
        assert need(chunk.position).tolist() == list(range(1, len(chunk.acts) + 1))


def test_minilm_masks_cls_and_sep(minilm: tuple[nn.Module, Any]) -> None:
    config = LanguageModelConfig("minilm", ("encoder.layer.0",), context_length=32, batch_tokens=256, device="cpu")
    reader = LanguageModelSource(config, open_text(["the cat sat " * 300]), held_out=0.0, loaded=minilm)
    chunk = concatenate([chunk for chunk, _ in reader.chunks("train")])
    assert len(chunk.acts) == 900
    assert not set(need(chunk.token_ids).tolist()) & set(minilm[1].all_special_ids)
    assert int(need(chunk.position).max()) == 30
    with pytest.raises(ConfigError, match="minilm reads at most 512 tokens, got 513"):
        LanguageModelSource(dataclasses.replace(config, context_length=513, batch_tokens=513), TEXT, loaded=minilm)


def test_loading_and_reading_are_quiet_and_change_no_settings(tmp_path: Path) -> None:
    from transformers import BertForMaskedLM

    BertForMaskedLM(tiny_bert().config).save_pretrained(tmp_path)  # its head is weights that AutoModel has no use for
    tokenizer = word_tokenizer()
    tokenizer.model_max_length = 32
    tokenizer.save_pretrained(tmp_path)
    code = f"""
import transformers
from flashsae.data.language_model import LanguageModelConfig, LanguageModelSource, load_language_model
from flashsae.data.text import open_text
log = transformers.utils.logging
before = log.get_verbosity(), log.is_progress_bar_enabled()
model, tokenizer = load_language_model(LanguageModelConfig("minilm", ("encoder.layer.2",), dtype="bfloat16"))
config = LanguageModelConfig({str(tmp_path)!r}, ("encoder.layer.1",), context_length=32, device="cpu")
source = LanguageModelSource(config, open_text(["the cat sat " * 300]), held_out=0.0)
assert sum(len(chunk.acts) for chunk, _ in source.chunks("train")) == 900
assert (log.get_verbosity(), log.is_progress_bar_enabled()) == before
assert {{str(parameter.dtype) for parameter in model.parameters()}} == {{"torch.bfloat16"}}
"""
    command = [sys.executable, "-W", "error::FutureWarning", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_model_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"could not load '.*nothing' \(.*\)\. Expected 'minilm', a folder") as caught:
        load_language_model(LanguageModelConfig(str(tmp_path / "nothing"), ("h.0",)))
    assert "\n" not in str(caught.value)
