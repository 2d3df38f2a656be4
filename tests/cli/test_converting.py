from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

import flashsae
from flashsae import SAE, SAEConfig
from flashsae.cli import main
from flashsae.errors import CheckpointError, ConfigError
from flashsae.files.documents import save_tensors_atomic
from flashsae.formats.registry import formats
from flashsae.sae import load_extras
from flashsae.sae.saved import content_of
from flashsae.train.failure import write_failure
from helpers import hub as stand_in
from helpers import kill

METADATA = {"model": "gpt2", "hookpoint": "h.3", "context_length": 64}
ALONE = [name for name, form in formats().items() if form.write is not None and not form.is_whole]


def transcoder(seed: int) -> SAE:
    settings = flashsae.architecture.settings_of("transcoder", k=2)
    return SAE(SAEConfig(4, 8, arch=settings), seed=seed)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    SAE(SAEConfig(4, 8, 2)).save(tmp_path / "run" / "sae", metadata=METADATA)
    save_tensors_atomic(tmp_path / "run" / "latents.safetensors", {"latent_density": torch.rand(8)})
    return tmp_path / "run"


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join("".join(capsys.readouterr()).split())


@pytest.mark.parametrize("name", ALONE)
def test_a_topk_sae_is_the_same_by_way_of_every_format_that_holds_it(
    name: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    with pytest.raises(SystemExit):
        main(["convert", str(saved), str(there), "--to", name])
    assert f"topk, d_in 4, d_sae 8, float32 FlashSAE -> {formats()[name].title}: {there}" in said(capsys)
    with pytest.raises(SystemExit):
        main(["convert", str(there), str(back), "--to", "flashsae"])
    x = torch.randn(20, 4)
    torch.testing.assert_close(SAE.load(back)(x), SAE.load(saved / "sae")(x))
    assert flashsae.load(there).config.arch.k == 2


def test_what_is_known_of_latents_in_a_run_goes_along(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["convert", str(saved), str(tmp_path / "out"), "--to", "flashsae"])
    density = load_extras(tmp_path / "out")["latent_density"]
    assert torch.equal(density, flashsae.files.documents.load_tensors(saved / "latents.safetensors")["latent_density"])
    with pytest.raises(SystemExit):
        main(["convert", str(saved / "sae"), str(tmp_path / "again"), "--to", "flashsae"])
    assert torch.equal(load_extras(tmp_path / "again")["latent_density"], density)


def test_what_a_run_has_no_sae_of_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    for name in ("done", "dead", "late", "open"):
        (run / name).mkdir(parents=True)
        (run / name / "config.toml").write_text("")
    for name in ("done", "late"):
        SAE(SAEConfig(4, 8, 2)).save(run / name / "sae", metadata=METADATA)
    for name in ("dead", "late"):
        write_failure(run / name, "the loss is not finite [nan].")
    with pytest.raises(SystemExit) as stopped:
        main(["convert", str(run), str(tmp_path / "out"), "--to", "flashsae"])
    told = said(capsys)
    assert stopped.value.code == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["done", "late"]
    assert "note: dead is left out: its training failed: the loss is not finite [nan]." in told
    assert "note: late is of before its training went on and failed: the loss is not finite [nan]." in told
    assert "note: open is left out: it has no SAE so far" in told
    assert told.count("note:") == 3


def refused(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["convert", *map(str, words)])
    assert stopped.value.code == 1
    return said(capsys)


def test_nothing_is_written_over_and_every_refusal_is_a_sentence(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert "format: expected one of flashsae, " in refused(capsys, saved, out, "--to", "sealens")
    assert "format: gemma_scope is read and not written; expected one of" in refused(
        capsys, saved, out, "--to", "gemma_scope"
    )
    assert "nothing holds no SAE: there is no such file or folder" in refused(
        capsys, tmp_path / "nothing", out, "--to", "saelens"
    )
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    assert "out exists already and is not overwritten; give overwrite=True, or --overwrite" in refused(
        capsys, saved, out, "--to", "flashsae"
    )
    assert "out holds no FlashSAE SAE and is not replaced" in refused(
        capsys, saved, out, "--to", "flashsae", "--overwrite"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]
    (out / "mine.txt").unlink()
    out.rmdir()
    for flags in ([], ["--overwrite"]):
        with pytest.raises(SystemExit) as stopped:
            main(["convert", str(saved), str(out), "--to", "flashsae", *flags])
        assert stopped.value.code == 0
    assert (
        "dst: expected a path on this machine, got 'hf://me/saes'. From the hub flashsae convert fetches SAEs, flashsae"
        in refused(capsys, saved, "hf://me/saes", "--to", "saelens")
    )
    with pytest.raises(ConfigError, match=r"^directory: expected a path on this machine, got 'hf://me/saes'\. "):
        flashsae.load(saved).save("hf://me/saes")
    assert "expected nothing beside a place on this machine" in refused(
        capsys, saved, tmp_path / "x", "--to", "flashsae", "--revision", "main"
    )


@pytest.mark.parametrize("name", ["dictionary_learning", "llamascopium", "saelens", "sparsify"])
def test_what_is_no_number_is_neither_written_for_others_nor_read_of_them(name: str, tmp_path: Path) -> None:
    sae = SAE(SAEConfig(6, 16, 3))
    sae.save(tmp_path / "there", format=name)
    form = formats()[name]
    with torch.no_grad():
        sae.W_enc_T[2, 1] = float("nan")
    sae.save(tmp_path / "ours")
    assert flashsae.load(tmp_path / "ours").W_enc_T.isnan().sum() == 1
    with pytest.raises(ConfigError, match=rf"^W_enc_T holds values that are no numbers \(NaN\): {form.title} is not"):
        sae.save(tmp_path / "out", format=name)
    assert form.write is not None
    form.write(tmp_path / "there", content_of(sae), False)
    with pytest.raises(CheckpointError, match=r"there is damaged: \w+ holds values that are no numbers \(NaN\)\. "):
        flashsae.load(tmp_path / "there")


def test_what_is_given_up_is_told_and_only_where_that_is_allowed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sae = SAE(SAEConfig(4, 8, arch=flashsae.BatchTopKSettings(k=2)))
    sae.threshold.fill_(0.5)
    sae.threshold_steps.fill_(1)
    sae.save(tmp_path / "sae", metadata=METADATA)
    out = tmp_path / "out"
    assert "--lossy" in refused(capsys, tmp_path / "sae", out, "--to", "sparsify")
    assert not out.exists()
    with pytest.raises(SystemExit) as stopped:
        main(["convert", str(tmp_path / "sae"), str(out), "--to", "sparsify", "--lossy"])
    assert stopped.value.code == 0
    assert "given up: " in said(capsys)
    assert flashsae.load(out).config.architecture.name == "topk"


def test_all_saes_of_a_run_are_converted_each_to_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(2):
        SAE(SAEConfig(4, 8, 2), seed=number).save(tmp_path / "run" / f"h.{number}" / "sae", metadata=METADATA)
    out = tmp_path / "out"
    with pytest.raises(SystemExit):
        main(["convert", str(tmp_path / "run"), str(out), "--to", "saelens"])
    told = said(capsys)
    assert "h.0: topk" in told
    assert "h.1: topk" in told
    assert sorted(path.name for path in out.iterdir()) == ["h.0", "h.1"]
    assert torch.equal(flashsae.load(out / "h.1").W_dec, SAE(SAEConfig(4, 8, 2), seed=1).W_dec)
    with pytest.raises(CheckpointError, match=r"out holds 2 SAEs: h.0, h.1\. Name one of them, such as"):
        flashsae.load(out)


def test_a_set_is_written_and_read_as_one(tmp_path: Path) -> None:
    for number in range(3):
        metadata = {"model": "gpt2", "hookpoint": f"h.{number}.mlp:in, h.{number}.mlp"}
        transcoder(number).save(tmp_path / "run" / f"h.{number}.mlp" / "sae", metadata=metadata)
    out, back = tmp_path / "set", tmp_path / "back"
    with pytest.raises(SystemExit):
        main(["convert", str(tmp_path / "run"), str(out), "--to", "circuit_tracer"])
    assert sorted(path.name for path in out.iterdir()) == ["config.yaml", *(f"layer_{n}.safetensors" for n in range(3))]
    with pytest.raises(CheckpointError, match=r"set holds 3 SAEs: layer_0, layer_1, layer_2\. Name one of them, such"):
        flashsae.load(out)
    assert torch.equal(flashsae.load(out / "layer_2").W_dec, transcoder(2).W_dec)
    with pytest.raises(SystemExit):
        main(["convert", str(out), str(back), "--to", "flashsae"])
    assert sorted(path.name for path in back.iterdir()) == ["layer_0", "layer_1", "layer_2"]
    with pytest.raises(CheckpointError, match=r"back holds 3 SAEs: layer_0, layer_1, layer_2\. Name one of them, such"):
        flashsae.load(back)
    one = tmp_path / "one"
    with pytest.raises(SystemExit):
        main(["convert", str(out / "layer_1"), str(one), "--to", "flashsae"])
    assert torch.equal(SAE.load(one).W_dec, transcoder(1).W_dec)


def test_a_kill_at_every_moment_leaves_all_or_nothing(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(root: Path) -> None:
        flashsae.load(saved).save(root / "out", format="saelens", metadata=METADATA, overwrite=True)

    def whole(root: Path) -> None:
        if (root / "out").exists():
            assert flashsae.load(root / "out").config.d_sae == 8

    (tmp_path / "kills").mkdir()
    moments = kill.survive_every_kill(
        tmp_path / "kills", monkeypatch, prepare=lambda root: None, work=work, after_kill=whole
    )
    assert moments > 5


@pytest.mark.parametrize("outside", ["../../outside", "/outside", "..", "a/../../b", "a\0b", ""])
def test_no_file_decides_where_a_byte_is_written(
    outside: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, hookpoint in enumerate(("h.0", outside)):
        SAE(SAEConfig(4, 8, 2)).save(tmp_path / "run" / str(number) / "sae", metadata={"hookpoint": hookpoint})
    out = tmp_path / "out"
    assert "expected a name that a folder can have" in refused(capsys, tmp_path / "run", out, "--to", "sparsify")
    assert sorted(os.listdir(tmp_path)) == ["run"]


def test_metadata_of_a_run_are_written_for_others(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["convert", str(saved), str(tmp_path / "out"), "--to", "saelens"])
    told = json.loads((tmp_path / "out" / "cfg.json").read_text())["metadata"]
    assert (told["hook_name"], told["context_size"]) == ("blocks.3.hook_resid_post", 64)
    with pytest.raises(ConfigError, match=r"^format: gemma_scope is read and not written; expected one of flashsae"):
        SAE.load(saved / "sae").save(tmp_path / "x", format="gemma_scope")


def test_what_is_on_the_hub_is_converted_one_or_all(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flashsae.load(saved).save(tmp_path / "theirs", format="saelens", metadata=METADATA)
    files = {path.name: path.read_bytes() for path in (tmp_path / "theirs").iterdir()}
    with stand_in.running() as hub:
        stand_in.use(hub, tmp_path / "home", monkeypatch)
        hub.put("me/saes", {f"h.{layer}/{name}": content for layer in (3, 11) for name, content in files.items()})
        for place, out in (("hf://me/saes/h.11", "one"), ("hf://me/saes", "all")):
            with pytest.raises(SystemExit) as stopped:
                main(["convert", place, str(tmp_path / out), "--to", "flashsae", "--revision", "main"])
            assert stopped.value.code == 0
        assert "me/other" in refused(capsys, "hf://me/other", tmp_path / "x", "--to", "flashsae")
    x = torch.randn(20, 4)
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == ["h.11", "h.3"]
    for folder in (tmp_path / "one", tmp_path / "all" / "h.3"):
        assert torch.equal(SAE.load(folder)(x), flashsae.load(saved)(x))
