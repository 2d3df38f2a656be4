"""What is pushed: the SAE to the same bytes, what others may see of its run, and the card."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import flashsae
from flashsae.architecture import settings_of
from flashsae.errors import CheckpointError, ConfigError
from flashsae.files.reading import sha256
from flashsae.places.finding import find
from flashsae.places.hub import Place
from flashsae.publish.folder import Asked, make_folder
from flashsae.settings.run import RunConfig, load_settings
from flashsae.train.failure import write_failure
from helpers import published as runs

OURS = Asked(())
PLACE = Place("me/saes")


def made(source: Path, folder: Path, asked: Asked = OURS, place: Place = PLACE) -> str:
    folder.mkdir()
    make_folder(source, folder, place, asked)
    return (folder / "README.md").read_text("utf-8")


def head_of(card: str) -> Any:
    return yaml.safe_load(card.split("---\n")[1])


def test_the_folder_of_a_run(finished: Path, tmp_path: Path) -> None:
    card = made(finished, tmp_path / "out", Asked((), "mit"))
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    pictures = {name for name in names if name.startswith("pictures/")}
    assert names - pictures == {"README.md", "flashsae.json", "flashsae.safetensors", "config.toml", "evaluation.json"}
    for name in ("flashsae.json", "flashsae.safetensors"):
        assert sha256(tmp_path / "out" / name) == sha256(finished / "sae" / name)
    assert RunConfig.from_toml(tmp_path / "out" / "config.toml") == RunConfig.from_toml(finished / "config.toml")
    shown = re.findall(r"!\[.*?\]\((pictures/\S+\.svg)\)", card)
    assert set(shown) == pictures
    assert {"pictures/fvu.svg", "pictures/density.svg"} <= pictures
    assert head_of(card) == {
        "library_name": "flashsae",
        "tags": ["sparse-autoencoder", "sae", "interpretability", "mechanistic-interpretability", "topk"],
        "base_model": "openai-community/gpt2",
        "datasets": ["org/texts"],
        "license": "mit",
    }
    for told in (
        "# TopK SAE of openai-community/gpt2, h.6",
        "TopK SAE (sparse autoencoder) with 20 latents for the 6 numbers of the activations of `h.6`",
        "Trained on 2,048 tokens of `org/texts`, 256 tokens at a time.",
        "| held-out FVU | 0.1250 (87.5% of the variance explained) | Fraction of the variance of tokens that",
        "`Σ‖x − x_hat‖² / Σ‖x − mean x‖²`",
        "| `k` | 3 |",
        "Trained by [FlashSAE]",
    ):
        assert told in card


def test_the_code_of_the_card_loads_the_sae(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = made(finished, tmp_path / "out")
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.setattr(
        "flashsae.places.finding.fetched", lambda uri, *_, **__: {"hf://me/saes": tmp_path / "out"}[uri]
    )
    names: dict[str, Any] = {"x": torch.randn(4, runs.D_IN)}
    exec(snippet, names)
    expected = flashsae.SAE.load(finished / "sae")(names["x"])
    assert torch.equal(names["x_hat"], expected)


def test_the_same_run_makes_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        made(finished, tmp_path / name)
    for path in (tmp_path / "a").rglob("*.*"):
        assert sha256(path) == sha256(tmp_path / "b" / path.relative_to(tmp_path / "a"))


def test_no_path_of_the_machine_leaves_it(tmp_path: Path) -> None:
    secret = tmp_path / "ann" / "wiki.jsonl"
    run = runs.write_run(tmp_path / "run", dataset=f"org/texts@0.5, {secret}@0.5", model=str(tmp_path / "ann" / "gpt2"))
    out = tmp_path / "out"
    out.mkdir()
    (sae,), _ = make_folder(run, out, PLACE, OURS)
    assert {name.rpartition(": ")[2] for name in sae.shortened} == {"dataset", "model"}
    for path in out.rglob("*.*"):
        assert str(tmp_path).encode() not in path.read_bytes()
    card = (out / "README.md").read_text("utf-8")
    assert "only the last part of the path is told: `model`, `dataset`" in card
    assert "base_model" not in head_of(card)
    assert "datasets" not in head_of(card)
    assert load_settings(out / "config.toml")["dataset"] == "org/texts@0.5, wiki.jsonl@0.5"
    assert sha256(out / "flashsae.safetensors") == sha256(run / "sae" / "flashsae.safetensors")
    assert torch.equal(flashsae.SAE.load(out).W_dec, flashsae.SAE.load(run / "sae").W_dec)


def test_a_secret_is_refused_and_nothing_is_made(tmp_path: Path) -> None:
    run = runs.write_run(tmp_path / "run", model_kwargs=("token=hf_" + "a1" * 16,))
    with pytest.raises(ConfigError, match=r"config.toml: model_kwargs holds what looks like a token or a password"):
        made(run, tmp_path / "out")


def test_what_lies_here_is_not_told_to_be_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = runs.write_run(tmp_path / "run", dataset="org/texts", model="minilm", hookpoint="encoder.layer.2")
    monkeypatch.chdir(tmp_path)
    Path("org/texts").mkdir(parents=True)
    head = head_of(made(run, tmp_path / "out"))
    assert "datasets" not in head
    assert head["base_model"] == "sentence-transformers/all-MiniLM-L6-v2"


def test_several_saes_have_a_folder_each_and_one_card(tmp_path: Path) -> None:
    sweep = runs.write_sweep(tmp_path / "sweep")
    shutil.copytree(sweep / "seed0", sweep / "seed2")
    write_failure(sweep / "seed2", "the loss is not finite")
    card = made(sweep, tmp_path / "out", place=Place("me/saes", "v1", "sweep"))
    assert {path.parent.name for path in (tmp_path / "out").glob("*/flashsae.json")} == {"seed0", "seed1"}
    assert "# 2 × TopK SAE of openai-community/gpt2, h.6" in card
    assert "| SAE | seed | held-out FVU | L0 | dead latents |" in card
    assert "| `seed1` | 1 | 0.2500 | 3.0 | 1 |" in card
    assert "![h.6](pictures/pareto-0.svg)" in card
    assert 'flashsae.load("hf://me/saes@v1/sweep/seed0")' in card
    assert "1 more of the run failed and are not here." in card
    assert "| `seed` |" not in card.split("## Settings")[1]


def test_transcoders_of_a_model_are_one_set_of_circuit_tracer(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for layer in range(2):
        place = f"h.{layer}.mlp:in, h.{layer}.mlp"
        runs.write_run(run / f"h.{layer}", arch="transcoder:topk", hookpoint=place, seed=layer)
    shutil.copy(run / "h.0" / "config.toml", run)
    card = made(run, tmp_path / "out", Asked(("circuit_tracer", "sparsify")))
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*") if path.is_file()}
    assert {f"circuit_tracer/{name}" for name in ("config.yaml", "layer_0.safetensors", "layer_1.safetensors")} <= names
    assert {f"h.{layer}/sparsify/cfg.json" for layer in range(2)} <= names
    assert not any(name.startswith("h.0/circuit_tracer") for name in names)
    assert 'load_transcoder_from_hub("me/saes/circuit_tracer")' in card
    assert "# 2 × TopK transcoder of openai-community/gpt2" in card
    assert {"circuit_tracer", "sparsify", "transcoder"} <= set(head_of(card)["tags"])
    assert flashsae.load(tmp_path / "out" / "h.1").config.d_sae == runs.D_SAE


def test_what_a_format_cannot_hold(tmp_path: Path) -> None:
    run = runs.write_run(tmp_path / "run", arch="skip_transcoder:topk", hookpoint="h.0.mlp:in, h.0.mlp")
    with pytest.raises(ConfigError, match="dictionary_learning"):
        made(run, tmp_path / "out1", Asked(("dictionary_learning",)))
    with pytest.raises(ConfigError, match=r"expected one of flashsae, .*got 'zip'"):
        made(run, tmp_path / "out2", Asked(("zip",)))
    with pytest.raises(ConfigError, match="gemma_scope is read and not written"):
        made(run, tmp_path / "out3", Asked(("gemma_scope",)))
    sweep = tmp_path / "sweep"
    for arch in ("topk", "batch_topk"):
        runs.write_run(sweep / arch, arch=arch)
    shutil.copy(sweep / "topk" / "config.toml", sweep)
    with pytest.raises(ConfigError, match=r"^batch_topk: sparsify holds TopK alone"):
        made(sweep, tmp_path / "out5", Asked(("sparsify",)))
    crosscoder = settings_of("crosscoder:topk", k=3, sites=("h.0", "h.1"), widths=(3, 3))
    flashsae.SAE(flashsae.SAEConfig(6, 20, arch=crosscoder)).save(tmp_path / "crosscoder")
    card = made(tmp_path / "crosscoder", tmp_path / "out4", Asked())
    assert "Not there in the format of SAELens: " in card
    assert not (tmp_path / "out4" / "saelens").exists()


def test_the_same_sae_in_other_formats_below_makes_no_doubt(tmp_path: Path) -> None:
    formats = ("saelens", "sparsify", "dictionary_learning", "llamascopium")
    made(runs.write_run(tmp_path / "run"), tmp_path / "one", Asked(formats))
    made(runs.write_sweep(tmp_path / "sweep"), tmp_path / "two", Asked(formats))
    assert {form.name for form, _ in find(tmp_path / "one").values()} == {"flashsae"}
    assert {name: form.name for name, (form, _) in find(tmp_path / "two").items()} == dict.fromkeys(
        ("seed0", "seed1"), "flashsae"
    )
    for name in formats:
        assert {form.name for form, _ in find(tmp_path / "one" / name).values()} == {name}


def test_an_sae_without_a_run(finished: Path, tmp_path: Path) -> None:
    sae = flashsae.SAE.load(finished / "sae")
    sae.save(tmp_path / "sae", metadata={"metrics": {"fvu": 0.25, "of_mine": 3}, "model": "gpt2"})
    card = made(tmp_path / "sae", tmp_path / "out")
    assert "| held-out FVU | 0.2500 |" in card
    assert "of_mine" not in card
    assert "| `d_sae` | 20 |" in card
    assert "Written by [FlashSAE]" in card
    assert head_of(card)["base_model"] == "openai-community/gpt2"
    assert "## Pictures" not in card
    sae.save(tmp_path / "bare")
    assert "# TopK SAE\n" in made(tmp_path / "bare", tmp_path / "bare-out")


def test_hostile_names_are_text(tmp_path: Path) -> None:
    name = 'org/x"\n---\n<img src=x onerror=alert(1)>|`'
    run = runs.write_run(tmp_path / "run", model="org/model", dataset=name)
    card = made(run, tmp_path / "out")
    assert head_of(card)["library_name"] == "flashsae"
    assert "datasets" not in head_of(card)
    assert not re.search(r"(?m)^---$", card.split("---\n", 2)[2])
    assert "\n<img" not in card


def test_pictures_stand_alone(finished: Path, tmp_path: Path) -> None:
    made(finished, tmp_path / "out")
    svg = (tmp_path / "out" / "pictures" / "fvu.svg").read_text("utf-8")
    assert svg.startswith('<svg xmlns="http://www.w3.org/2000/svg"')
    assert "var(" not in svg
    assert 'fill="#fdfdfc"' in svg


def test_a_run_without_a_report_has_a_card_without_its_latents(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "latents.safetensors").unlink()
    card = made(run, tmp_path / "out")
    assert "pictures/fvu.svg" in card
    assert "pictures/density.svg" not in card


def test_what_cannot_be_pushed(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        CheckpointError, match=r"neither the folder of a run nor an SAE of ours: expected config.toml or"
    ):
        made(tmp_path / "empty", tmp_path / "out1")
    with pytest.raises(CheckpointError, match=r"neither the folder of a run nor an SAE of ours"):
        made(tmp_path / "nothing", tmp_path / "out2")
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "evaluation.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"its training has not ended: finish it with `flashsae train --resume .*run`"
    ):
        made(run, tmp_path / "out3")
    run = shutil.copytree(finished, tmp_path / "extended")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(CheckpointError, match=r"its figures are not of the end of its log: finish it with"):
        made(run, tmp_path / "out4")
    sweep = tmp_path / "sweep"
    shutil.copytree(finished, sweep / "a")
    shutil.copy(finished / "config.toml", sweep)
    write_failure(sweep / "a", "the loss is not finite")
    with pytest.raises(CheckpointError, match=r"all of its SAEs failed, so there is nothing to push"):
        made(sweep, tmp_path / "out5")
    run = shutil.copytree(finished, tmp_path / "damaged")
    content = json.loads((run / "sae" / "flashsae.json").read_text())
    (run / "sae" / "flashsae.json").write_text(json.dumps({**content, "d_sae": 21}))
    with pytest.raises(CheckpointError, match="its checksum does not fit"):
        made(run, tmp_path / "out6")
    run = shutil.copytree(finished, tmp_path / "cut")
    (run / "sae" / "flashsae.safetensors").write_bytes(b"cut short")
    with pytest.raises(CheckpointError, match=r"flashsae.safetensors is damaged: .* Put a copy of it back"):
        made(run, tmp_path / "out7")
