"""Latents of a run for Neuronpedia: checked field by field against what it reads."""

from __future__ import annotations

import gzip
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import flashsae
from flashsae.cli import main
from flashsae.errors import CheckpointError, ConfigError, StorageError
from flashsae.files.schema import parse
from flashsae.neuronpedia import Asked, export
from flashsae.neuronpedia.logits import ends_of
from flashsae.neuronpedia.records import (
    ActivationRow,
    FeatureRow,
    ModelRow,
    ReleaseRow,
    SourceRow,
    SourceSetRow,
    UploadBatch,
)
from flashsae.report.snippet_file import LatentSnippets, Picture, Snippet, Snippets, write_snippets
from flashsae.settings.reading import ActivationsConfig
from flashsae.settings.run import RunConfig
from flashsae.settings.training import TrainConfig
from helpers import tiny_models

SET = "res-mine_1.0"


def latent_of(index: int, texts: int = 2) -> LatentSnippets:
    snippets = [Snippet(["The", " cat", "", "é"], [0.0, 2.0 - 0.5 * i, 0.0, 0.25], 1, "held_out") for i in range(texts)]
    return LatentSnippets(index, 0.25, 2.0, 1.0, [" cat"], [10, 0, 5, 10], snippets)


def make_run(folder: Path, latents: list[LatentSnippets] | None = None, **settings: Any) -> Path:
    """Write what a finished run of text leaves that an export reads."""
    folder.mkdir(parents=True)
    reading = {"model": "openai-community/gpt2", "hookpoint": "h.6", "dataset": "some/text", "context_length": 32}
    config = RunConfig(ActivationsConfig(**{**reading, **settings}), TrainConfig(d_sae=200, tokens=1000))
    (folder / "config.toml").write_text(config.to_toml(), "utf-8")
    write_snippets(folder / "snippets.json", Snippets(100, [latent_of(3)] if latents is None else latents, 50))
    flashsae.SAE(flashsae.SAEConfig(16, 200, 4)).save(folder / "sae")
    return folder


def packed(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode("utf-8").splitlines()]


def names_in(content: Any) -> set[str]:
    if isinstance(content, dict):
        return set(content) | {name for value in content.values() for name in names_in(value)}
    return {name for value in content for name in names_in(value)} if isinstance(content, list) else set()


def test_requests_hold_what_the_client_sends(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [latent_of(i, i % 3) for i in range(150)])
    out = export(run, tmp_path / "out", Asked(SET))
    assert sorted(path.name for path in out.iterdir()) == ["batch-0.json", "batch-1.json"]
    contents = [json.loads((out / f"batch-{i}.json").read_text("utf-8")) for i in range(2)]
    batches = [parse(UploadBatch, content, "batch") for content in contents]
    assert [len(batch.features) for batch in batches] == [128, 22]
    assert {(batch.modelId, batch.source) for batch in batches} == {("gpt2-small", f"6-{SET}")}
    assert [feature.index for batch in batches for feature in batch.features] == list(range(150))
    assert names_in(contents) == {
        "modelId", "source", "features", "index", "density", "activations", "explanations", "topLogits", "bottomLogits",
        "tokens", "values", "quantileMin", "quantileMax", "quantileFraction",
    }  # fmt: skip
    first = batches[0].features[2]
    assert (first.density, first.explanations, first.topLogits, first.bottomLogits) == (0.25, [], [], [])
    assert [activation.values for activation in first.activations] == [[0.0, 2.0, 0.0, 0.25], [0.0, 1.5, 0.0, 0.25]]
    assert first.activations[0].tokens == ["The", " cat", "", "é"]
    bins = [(each.quantileMin, each.quantileMax, each.quantileFraction) for each in first.activations]
    assert bins == [(1.5, 2.0, 0.1), (1.5, 2.0, 0.1)]  # 10 of the 100 tokens read lie in the last of four bins


def test_the_folder_for_an_import_holds_rows_of_its_tables(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [latent_of(i) for i in range(130)], dataset=str(tmp_path / "secret" / "my.jsonl"))
    folder = export(run, tmp_path / "exports", Asked(SET, kind="bulk", creator="Me"))
    assert folder == tmp_path / "exports" / "gpt2-small" / f"6-{SET}"
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == [
        "activations/batch-0.jsonl.gz", "activations/batch-1.jsonl.gz", "features/batch-0.jsonl.gz",
        "features/batch-1.jsonl.gz", "model.jsonl", "release.jsonl", "source.jsonl", "sourceset.jsonl",
    ]  # fmt: skip
    rows: dict[str, Any] = {}
    kinds = {"release": ReleaseRow, "model": ModelRow, "sourceset": SourceSetRow, "source": SourceRow}
    for name, kind in kinds.items():
        (line,) = (folder / f"{name}.jsonl").read_text("utf-8").splitlines()
        rows[name] = parse(kind, json.loads(line), name)
    assert (rows["source"].id, rows["source"].setName, rows["source"].modelId) == (f"6-{SET}", SET, "gpt2-small")
    assert (rows["source"].dataset, rows["source"].num_tokens_in_prompt) == ("my.jsonl", 32)
    assert (rows["sourceset"].releaseName, rows["release"].name, rows["model"].id) == (SET, SET, "gpt2-small")
    assert rows["release"].creatorName == "Me"
    features = [parse(FeatureRow, row, "features") for row in packed(folder / "features" / "batch-1.jsonl.gz")]
    assert [feature.index for feature in features] == ["128", "129"]
    assert (features[0].maxActApprox, features[0].frac_nonzero) == (2.0, 0.25)
    assert features[0].freq_hist_data_bar_values == [0.25, 0.75, 1.25, 1.75]
    found = packed(folder / "activations" / "batch-0.jsonl.gz") + packed(folder / "activations" / "batch-1.jsonl.gz")
    texts = [parse(ActivationRow, row, "activations") for row in found]
    assert len({text.id for text in texts}) == len(texts) == 260
    assert (texts[1].maxValue, texts[1].maxValueTokenIndex, texts[1].minValue) == (1.5, 1, 0.0)
    again = export(run, tmp_path / "again", Asked(SET, kind="bulk"))
    assert [row["id"] for row in packed(again / "activations" / "batch-0.jsonl.gz")] == [t.id for t in texts[:256]]


def test_values_of_both_signs_and_texts_that_no_database_holds(tmp_path: Path) -> None:
    snippet = Snippet(["a\0b", "\ud800"], [-3.0, 0.5], 0, None)
    latent = replace(latent_of(0), max_act=-3.0, least_act=0.5, histogram=[4, 1], snippets=[snippet])
    silent = replace(latent, index=1, max_act=0.0, least_act=0.0, histogram=[], snippets=[snippet])
    run = make_run(tmp_path / "run")
    content = json.loads((run / "snippets.json").read_text("utf-8"))
    write_snippets(run / "snippets.json", Snippets(10, [latent, silent]))
    assert content["format"] == 1
    out = export(run, tmp_path / "out", Asked(SET))
    batch = parse(UploadBatch, json.loads((out / "batch-0.json").read_text("utf-8")), "batch")
    (activation,), (other,) = (feature.activations for feature in batch.features)
    assert activation.tokens == ["a b", "?"]
    assert (activation.quantileMin, activation.quantileMax, activation.quantileFraction) == (-3.0, -1.25, 0.4)
    assert (other.quantileMin, other.quantileMax, other.quantileFraction) == (None, None, None)


@pytest.mark.parametrize(
    ("settings", "asked", "expected"),
    [
        ({"model": "google/gemma-2-2b", "hookpoint": "layers.12.mlp"}, {}, ("gemma-2-2b", 12)),
        ({"hookpoint": "h.0.mlp:in, h.0.mlp"}, {}, ("gpt2-small", 0)),
        ({"hookpoint": "h.2, h.3"}, {"layer": 3}, ("gpt2-small", 3)),
        ({"model": "meta-llama/Llama-3.1-8B"}, {"model_id": "llama3.1-8b"}, ("llama3.1-8b", 6)),
    ],
)
def test_sources_are_named_by_model_and_layer(
    tmp_path: Path, settings: dict[str, Any], asked: dict[str, Any], expected: tuple[str, int]
) -> None:
    out = export(make_run(tmp_path / "run", **settings), tmp_path / "out", Asked("s", **asked))
    content = json.loads((out / "batch-0.json").read_text("utf-8"))
    assert (content["modelId"], content["source"]) == (expected[0], f"{expected[1]}-s")


@pytest.mark.parametrize(
    ("asked", "settings", "sentence"),
    [
        ({"set_name": "../up"}, {}, r"^set: expected a name of letters and digits, .* got '\.\./up'\.$"),
        ({"set_name": ""}, {}, "^set: expected a name"),
        ({"model_id": "a/b"}, {}, "^model_id: expected a name of letters and digits, .* got 'a/b'"),
        ({}, {"hookpoint": "h.2, h.3"}, "^layer: h.2, h.3 tells no one layer, .*: give its number"),
        ({}, {"hookpoint": "wte"}, "^layer: wte tells no one layer"),
    ],
)
def test_names_that_cannot_be_are_refused(
    tmp_path: Path, asked: dict[str, Any], settings: dict[str, Any], sentence: str
) -> None:
    run = make_run(tmp_path / "run", **settings)
    for kind in ("upload", "bulk"):
        with pytest.raises(ConfigError, match=sentence):
            export(run, tmp_path / "out", Asked(**{"set_name": SET, "kind": kind, **asked}))
    assert not (tmp_path / "out").exists()


def test_what_is_no_finished_run_of_texts_is_refused(tmp_path: Path) -> None:
    def refused(run: Path, kind: type[Exception], sentence: str) -> None:
        with pytest.raises(kind, match=sentence):
            export(run, tmp_path / "out", Asked(SET))

    refused(tmp_path, CheckpointError, "is not the folder of a training run: it has no config.toml")
    run = make_run(tmp_path / "run")
    write_snippets(run / "snippets.json", Snippets(10, []))
    refused(run, ConfigError, "has no latent that was active on a text: there is nothing to show")
    write_snippets(run / "snippets.json", Snippets(10, [latent_of(0)], pictures=[Picture("a.png", 1, 1, 8, 8, "")]))
    refused(run, ConfigError, "has read images, and Neuronpedia shows texts")
    (run / "snippets.json").write_text("{", "utf-8")
    refused(run, CheckpointError, "snippets.json")
    (run / "snippets.json").unlink()
    refused(run, CheckpointError, "has no snippets.json, so its training has not finished: finish it with")
    make_run(run / "seed=0")
    refused(run, ConfigError, f"holds several SAEs: name the folder of one, such as {re.escape(str(run / 'seed=0'))}")
    other = make_run(tmp_path / "other", model=None, dataset=None, activations=Path("acts"), context_length=None)
    (other / "snippets.json").unlink()
    refused(other, ConfigError, "knows no texts, as it was trained on activations alone")
    (tmp_path / "there").mkdir()
    with pytest.raises(StorageError, match="give another folder"):
        export(make_run(tmp_path / "third"), tmp_path / "there", Asked(SET))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_models.gpt2().save_pretrained(folder)
    tiny_models.word_tokenizer().save_pretrained(folder)
    return folder


def test_tokens_that_latents_raise_and_lower_most_come_from_the_model(tmp_path: Path, model_folder: Path) -> None:
    run = make_run(tmp_path / "run", [latent_of(5), latent_of(7)], model=str(model_folder), dataset="some/text")
    out = export(run, tmp_path / "out", Asked(SET, logits=True))
    batch = parse(UploadBatch, json.loads((out / "batch-0.json").read_text("utf-8")), "batch")
    unembedding = tiny_models.gpt2().lm_head.weight.detach()
    for feature in batch.features:
        logits = unembedding @ flashsae.load(run).W_dec[feature.index].detach()
        for each, largest in ((feature.topLogits, True), (feature.bottomLogits, False)):
            expected = logits.topk(10, largest=largest)
            assert [logit.value for logit in each] == pytest.approx(expected.values.tolist(), abs=1e-4)
    folder = export(run, tmp_path / "bulk", Asked(SET, kind="bulk", logits=True))
    feature = parse(FeatureRow, packed(folder / "features" / "batch-0.jsonl.gz")[0], "features")
    assert feature.pos_values == [logit.value for logit in batch.features[0].topLogits]
    assert feature.neg_str == [logit.token for logit in batch.features[0].bottomLogits]


def test_logits_that_cannot_be_had_are_refused(tmp_path: Path, model_folder: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^logits: decoder rows have 8 coordinates and the unembedding of the model 16"
    ):
        ends_of(torch.ones(2, 8), torch.ones(5, 16), tiny_models.word_tokenizer())
    run = make_run(tmp_path / "run", [latent_of(300)], model=str(model_folder))
    with pytest.raises(CheckpointError, match="is damaged: the SAE has no latent 300"):
        export(run, tmp_path / "out", Asked(SET, logits=True))
    run = make_run(tmp_path / "base", model="minilm", hookpoint="encoder.layer.2")
    with pytest.raises(ConfigError, match=r"^logits: minilm is not saved as a model that predicts the next token"):
        export(run, tmp_path / "out", Asked(SET, logits=True))
    assert not (tmp_path / "out").exists()


def test_the_command_writes_and_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    for words in (["up"], ["ex", "--kind", "bulk", "--creator-id", "me"]):
        with pytest.raises(SystemExit, match="0"):
            main(["neuronpedia", str(run), str(tmp_path / words[0]), *words[1:], "--set", SET])
    told = capsys.readouterr().out.split()
    assert told == [str(tmp_path / "up"), str(tmp_path / "ex" / "gpt2-small" / f"6-{SET}")]
    (row,) = packed(tmp_path / "ex" / "gpt2-small" / f"6-{SET}" / "features" / "batch-0.jsonl.gz")
    assert row["creatorId"] == "me"
    with pytest.raises(SystemExit, match="1"):
        main(["neuronpedia", str(run), str(tmp_path / "up"), "--set", SET])
    assert "give another folder" in capsys.readouterr().err
