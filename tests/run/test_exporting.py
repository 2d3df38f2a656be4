from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import flashsae
from flashsae import SAE, SAEConfig
from flashsae.cli.several import read_sweep
from flashsae.errors import ConfigError, StorageError
from flashsae.formats.registry import format_named
from flashsae.run import execute as run_module
from flashsae.run import start
from flashsae.run.execute import execute, new_run
from flashsae.run.exporting import check_held, export_set, write_several
from flashsae.settings import ActivationsConfig, RunConfig
from flashsae.settings.run import CONFIG_FILE
from flashsae.train import TrainConfig
from helpers.quick_runs import quick_runs

slow = pytest.mark.slow
pytestmark = pytest.mark.xdist_group("exporting")
QUIET = Console(quiet=True)
METADATA = {"model": "gpt2", "hookpoint": "h.3"}


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    with quick_runs():
        yield


def config_of(text: Path, **changes: Any) -> RunConfig:
    reading = {"dataset": str(text), "hookpoint": "encoder.layer.0", "context_length": 16}
    train = TrainConfig(d_sae=24, k=3, tokens=128, batch_tokens=32, device="cpu", shuffle_tokens=128)
    config = RunConfig(ActivationsConfig(**reading, held_out=0.2), train, export=("saelens", "sparsify"))
    return replace(config, **changes)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("home") / "text.txt"
    path.write_text("\n\n".join(f"the cat {i} sat on the mat and saw {i * i} mice" for i in range(40)))
    return path


@pytest.fixture(scope="module")
def whole(text: Path) -> Path:
    assert execute(new_run(config_of(text), text.parent / "run"), QUIET) == {}
    return text.parent / "run"


def bytes_of(run: Path) -> dict[str, bytes]:
    folders = [run / name for name in ("sae", "saelens", "sparsify")]
    return {str(path.relative_to(run)): path.read_bytes() for each in folders for path in sorted(each.rglob("*.*"))}


@slow
def test_a_run_ends_with_its_sae_in_every_format_that_was_asked_for(whole: Path) -> None:
    x = torch.randn(30, 384)
    sae = flashsae.load(whole)
    for name in ("saelens", "sparsify"):
        assert torch.equal(flashsae.load(whole / name)(x), sae(x))
    assert (whole / "saelens" / "sparsity.safetensors").exists()
    assert RunConfig.from_toml(whole / CONFIG_FILE).export == ("saelens", "sparsify")


@slow
def test_a_saved_sae_tells_what_is_known_of_it(whole: Path) -> None:
    metadata = json.loads((whole / "sae" / "flashsae.json").read_text())["metadata"]
    figures = json.loads((whole / "evaluation.json").read_text())
    known = ("model", "hookpoint", "dataset", "context_length", "prepend_bos", "model_dtype")
    assert {name: metadata[name] for name in known} == {
        "model": "minilm",
        "hookpoint": "encoder.layer.0",
        "dataset": "text.txt",
        "context_length": 16,
        "prepend_bos": False,
        "model_dtype": "float32",
    }
    assert metadata["metrics"]["fvu"] == figures["fvu"]
    assert metadata["metrics"]["l0"] == figures["l0"]
    assert metadata["train"]["d_sae"] == 24
    assert "tokens_per_second" not in json.dumps(metadata)
    assert str(whole.parent) not in json.dumps(metadata)


@slow
@pytest.mark.parametrize("moment", ["add_metrics", "export_one", "write_evaluation", "render_report"])
def test_a_run_that_was_killed_behind_its_training_ends_with_the_same_bytes(
    moment: str, whole: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    (tmp_path / "activations").symlink_to(whole.parent / "activations")

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_module, moment, killed)
        with pytest.raises(KeyboardInterrupt):
            execute(new_run(config_of(text), run), QUIET)
    assert not (run / "report.html").exists()
    execute(run, QUIET)
    assert bytes_of(run) == bytes_of(whole)
    shutil.rmtree(run / "saelens")
    execute(run, QUIET)  # what was lost is written again, and nothing else changes
    assert bytes_of(run) == bytes_of(whole)


@slow
def test_a_run_that_is_extended_exports_the_sae_that_it_ends_with(whole: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "activations").symlink_to(whole.parent / "activations")
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    config = start.extended(start.saved_config(run), run, 64)
    start.write_extended(config, run)
    execute(run, QUIET)
    sae = flashsae.load(run)
    assert not torch.equal(sae.W_dec, flashsae.load(whole).W_dec)
    assert torch.equal(flashsae.load(run / "saelens").W_dec, sae.W_dec)


@slow
def test_each_sae_of_several_is_exported_beside_itself(text: Path, tmp_path: Path, whole: Path) -> None:
    (tmp_path / "activations").symlink_to(whole.parent / "activations")
    config = config_of(text, sae=({"k": 2}, {"k": 3}), report=False)
    execute(new_run(config, tmp_path / "run"), QUIET)
    for k in (2, 3):
        folder = tmp_path / "run" / f"k{k}"
        folder = folder if folder.exists() else next((tmp_path / "run").glob(f"*k{k}*"))
        assert flashsae.load(folder / "saelens").config.arch.k == k
        assert torch.equal(flashsae.load(folder / "sparsify").W_dec, flashsae.load(folder).W_dec)


def test_what_no_format_can_hold_is_refused_before_anything_is_done(text: Path, tmp_path: Path) -> None:
    for names, message in (
        (("sealens",), r"^export: expected one of flashsae, .*, got 'sealens'"),
        (("gemma_scope",), r"^export: gemma_scope is read and not written; expected one of"),
    ):
        with pytest.raises(ConfigError, match=message):
            start.check(config_of(text, export=names))
    config = config_of(text, train=TrainConfig(d_sae=24, arch="batch_topk", k=3, tokens=128, batch_tokens=32))
    with pytest.raises(
        ConfigError, match=r"^export: sparsify .*, or convert the run behind its end \(flashsae convert RUN"
    ):
        execute(new_run(config, tmp_path / "run"), QUIET)
    assert not (tmp_path / "activations").exists()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [CONFIG_FILE]


@pytest.mark.parametrize("arch", flashsae.architecture.architecture_names(installed=False))
def test_our_own_format_holds_every_architecture(arch: str) -> None:
    if arch == "crosscoder":
        settings = flashsae.architecture.settings_of(arch, sites=("a", "b"), widths=(3, 5))
        config = TrainConfig(48, arch=settings).resolve({"a": 3, "b": 5})
    else:
        config = TrainConfig(48, arch=arch).resolve(8 if arch.count("coder") == 0 else {"in": 8, "out": 6})
    check_held(["flashsae"], {"": (config, METADATA)})


def test_names_may_stand_with_commas_and_each_counts_once() -> None:
    assert RunConfig(export=("saelens, sparsify", "saelens")).export == ("saelens", "sparsify")
    assert "export" not in RunConfig().to_toml()


def transcoders(run: Path, layers: int) -> list[Path]:
    arch = flashsae.architecture.settings_of("transcoder", k=2)
    for number in range(layers):
        metadata = {"model": "gpt2", "hookpoint": f"h.{number}.mlp:in, h.{number}.mlp"}
        SAE(SAEConfig(4, 8, arch=arch), seed=number).save(run / f"h.{number}" / "sae", metadata=metadata)
    return [run / f"h.{number}" for number in range(layers)]


def test_a_set_is_one_folder_of_the_run(tmp_path: Path) -> None:
    folders = transcoders(tmp_path, 2)
    for _ in range(2):  # written again, it is the same
        assert export_set(tmp_path, folders, ["saelens", "circuit_tracer"]) == [tmp_path / "circuit_tracer"]
        assert sorted(path.name for path in (tmp_path / "circuit_tracer").iterdir()) == [
            "config.yaml",
            "layer_0.safetensors",
            "layer_1.safetensors",
        ]
    (tmp_path / "circuit_tracer" / "notes.md").write_text("mine")
    with pytest.raises(StorageError, match=r"holds notes.md beside the SAE"):
        export_set(tmp_path, folders, ["circuit_tracer"])
    assert (tmp_path / "circuit_tracer" / "notes.md").read_text() == "mine"


def test_a_set_with_a_gap_is_refused_before_the_training() -> None:
    arch = flashsae.architecture.settings_of("transcoder", k=2)
    config = TrainConfig(8, arch=arch).resolve({"in": 4, "out": 4})
    planned = {name: (config, {"model": "gpt2", "hookpoint": f"{name}:in, {name}"}) for name in ("h.0.mlp", "h.2.mlp")}
    with pytest.raises(
        ConfigError, match=r"^export: circuit_tracer: expected a transcoder of every layer of the model"
    ):
        check_held(["circuit_tracer"], planned)


def test_several_are_written_all_or_none(tmp_path: Path) -> None:
    contents = {str(seed): flashsae.sae.saved.content_of(SAE(SAEConfig(4, 8, 2), seed=seed)) for seed in range(2)}
    form = format_named("flashsae")
    assert write_several(contents, tmp_path / "out", form, lossy=False, overwrite=False) == []
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0", "1"]
    with pytest.raises(
        StorageError, match=r"out exists already and is not overwritten; give overwrite=True, or --over"
    ):
        write_several(contents, tmp_path / "out", form, lossy=False, overwrite=False)
    with pytest.raises(StorageError, match=r"holds 1 and 2 more beside the SAE"):
        write_several({"0": contents["0"]}, tmp_path / "out", form, lossy=False, overwrite=True)
    with pytest.raises(ConfigError, match="expected a name that a folder can have"):
        write_several({"../x": contents["0"]}, tmp_path / "other", form, lossy=False, overwrite=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@slow
def test_what_only_numbers_stand_against_is_told_and_the_run_ends(
    text: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(folder: Path, names: list[str]) -> None:
        raise ConfigError(f"{names[0]} holds no rows of this norm.")

    (tmp_path / "activations").symlink_to(whole.parent / "activations")
    monkeypatch.setattr(run_module, "export_one", refuses)
    console = Console(record=True, file=io.StringIO(), width=200)
    execute(new_run(config_of(text, export=("saelens",), report=False), tmp_path / "run"), console)
    assert "Warning: saelens: not written: saelens holds no rows of this norm." in console.export_text()
    assert (tmp_path / "run" / "evaluation.json").exists()


def test_a_file_of_a_sweep_may_say_what_is_exported(tmp_path: Path) -> None:
    (tmp_path / "sweep.toml").write_text('k = [2, 3]\nexport = ["saelens"]')
    assert read_sweep(tmp_path / "sweep.toml").base == {"export": ["saelens"]}
