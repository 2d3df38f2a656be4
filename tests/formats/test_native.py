from __future__ import annotations

import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from flashsae import SAE, BatchTopKSettings, SAEConfig
from flashsae.errors import CheckpointError, ConfigError, DtypeError, FlashSAEError, ShapeError, StorageError
from flashsae.files.documents import sealed
from flashsae.sae import load_extras
from helpers import kill

OLD, NEW = SAE(SAEConfig(3, 5, 2), seed=0), SAE(SAEConfig(3, 5, 2), seed=1)


def test_replacing_a_saved_sae_survives_a_kill_at_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def old_or_new(root: Path) -> None:
        found = SAE.load(root / "sae").W_dec
        assert any(torch.equal(found, sae.W_dec) for sae in (OLD, NEW))

    moments = kill.survive_every_kill(
        tmp_path,
        monkeypatch,
        prepare=lambda root: OLD.save(root / "sae"),
        work=lambda root: NEW.save(root / "sae", overwrite=True),
        after_kill=old_or_new,
    )
    assert moments > 10


def test_behind_a_link_the_folder_that_it_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    OLD.save(tmp_path / "disk" / "sae")
    for link, target in (("link", Path("disk", "sae")), ("to_link", Path("link")), ("to_nothing", Path("disk", "new"))):
        (tmp_path / link).symlink_to(target)
        with pytest.raises(StorageError, match="exists already") if link != "to_nothing" else nullcontext():
            OLD.save(tmp_path / link)
        NEW.save(tmp_path / link, overwrite=True)
        assert (tmp_path / link).is_symlink()
        assert torch.equal(SAE.load(tmp_path / target).W_dec, NEW.W_dec)
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(
        [*("disk", "sae", "new", "link", "to_link", "to_nothing"), *("flashsae.json", "flashsae.safetensors") * 2]
    )


def test_replacing_an_sae_deletes_nothing_else(tmp_path: Path) -> None:
    OLD.save(tmp_path / "sae")
    (tmp_path / "sae" / ".DS_Store").touch()
    NEW.save(tmp_path / "sae", overwrite=True)
    for name in ("notes.md", ".gitattributes", "plots"):
        place = tmp_path / name / "sae"
        OLD.save(place)
        (place / name).mkdir() if name == "plots" else (place / name).write_text("mine")
        with pytest.raises(StorageError, match=f"holds {name} beside the SAE, .* move that away, or choose another"):
            NEW.save(place, overwrite=True)
        assert (place / name).exists()
        assert torch.equal(SAE.load(place).W_dec, OLD.W_dec)


WRONG = [None, "x", "../x", -1, 0, 1.5, 10**30, True, [], {}, float("nan")]


FIELDS = ("architecture", "settings", "apply_b_dec_to_input", "dtype", "d_in", "d_out", "d_sae", "sha256")


@pytest.mark.parametrize("name", ["format", "format_version", *FIELDS])
@pytest.mark.parametrize("seal", [True, False])
def test_each_field_of_each_wrong_kind_is_one_sentence(name: str, seal: bool, tmp_path: Path) -> None:
    OLD.save(tmp_path / "sae")
    path = tmp_path / "sae" / "flashsae.json"
    good = json.loads(path.read_text())
    for wrong in [*WRONG, ...]:
        if wrong is good[name]:
            continue
        edited = {key: value for key, value in {**good, name: wrong}.items() if value is not ...}
        path.write_text(json.dumps(sealed(edited) if seal else edited))
        with pytest.raises(CheckpointError):
            SAE.load(tmp_path / "sae")


@pytest.mark.parametrize("name", ["flashsae.json", "flashsae.safetensors"])
def test_every_flipped_byte_is_found(name: str, tmp_path: Path) -> None:
    OLD.save(tmp_path / "sae")
    path = tmp_path / "sae" / name
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            loaded = SAE.load(tmp_path / "sae")
        except FlashSAEError:
            continue
        assert loaded.config == OLD.config
        assert torch.equal(loaded.W_dec, OLD.W_dec)


def test_metadata_are_what_json_holds(tmp_path: Path) -> None:
    given: dict[str, Any] = {"path": tmp_path, "dtype": torch.bfloat16, "n": torch.tensor([1, 2]), "t": (1, 2)}
    OLD.save(tmp_path / "sae", metadata=given)
    metadata = json.loads((tmp_path / "sae" / "flashsae.json").read_text())["metadata"]
    assert metadata == {"path": str(tmp_path), "dtype": "bfloat16", "n": [1, 2], "t": [1, 2]}
    circle: dict[str, Any] = {}
    circle["c"] = circle
    for wrong in ({"f": print}, {(1, 2): 3}, circle, {"a": [float("nan")]}, {"a": float("inf")}):
        with pytest.raises(ConfigError, match="metadata: expected what JSON can hold"):
            OLD.save(tmp_path / "other", metadata=wrong)
    with pytest.raises(ConfigError, match=r"^overwrite: expected true or false, got 'no'"):
        OLD.save(tmp_path / "other", overwrite="no")  # type: ignore[arg-type]
    assert not (tmp_path / "other").exists()


def test_a_device_that_is_not_here_is_one_sentence(tmp_path: Path) -> None:
    OLD.save(tmp_path / "sae")
    with pytest.raises(ConfigError, match="device: expected auto, cpu or a CUDA device that exists, got 'cuda:77'"):
        SAE.load(tmp_path / "sae", device="cuda:77")


@pytest.mark.parametrize("seal", [True, False])
def test_what_version_1_wrote_is_read(seal: bool, tmp_path: Path) -> None:
    OLD.save(tmp_path / "sae")
    path = tmp_path / "sae" / "flashsae.json"
    new = json.loads(path.read_text())
    same = {
        name: new[name] for name in ("format", "flashsae_version", "architecture", "dtype", "d_in", "d_sae", "sha256")
    }
    old = {**same, "format_version": 1, "k": 2, "metadata": {"hookpoint": "layers.3"}}
    path.write_text(json.dumps(sealed(old) if seal else old))
    loaded = SAE.load(tmp_path / "sae")
    assert loaded.config == OLD.config
    assert torch.equal(loaded.W_dec, OLD.W_dec)
    for wrong in ({"k": 6}, {"k": 0}, {"k": None}, {"architecture": "batch_topk"}, {"d_in": 4}):
        path.write_text(json.dumps(sealed({**old, **wrong}) if seal else {**old, **wrong}))
        with pytest.raises(CheckpointError):
            SAE.load(tmp_path / "sae")


def test_any_architecture_is_written_with_its_settings_and_parameters(tmp_path: Path) -> None:
    sae = SAE(SAEConfig(3, 6, arch=BatchTopKSettings(2)), dtype=torch.float64)
    sae.threshold.fill_(0.25)
    density = torch.rand(6)
    sae.save(tmp_path / "sae", extras={"latent_density": density})
    content = json.loads((tmp_path / "sae" / "flashsae.json").read_text())
    assert {name: content[name] for name in FIELDS[:-1]} == {
        "architecture": "batch_topk",
        "settings": {"k": 2},
        "apply_b_dec_to_input": True,
        "dtype": "float64",
        "d_in": 3,
        "d_out": 3,
        "d_sae": 6,
    }
    loaded = SAE.load(tmp_path / "sae")
    assert (loaded.config, loaded.training) == (sae.config, False)
    for name, tensor in sae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert torch.equal(load_extras(tmp_path / "sae")["latent_density"], density)
    with pytest.raises(ShapeError, match=r"extras: latent_density: expected the shape \[6\], got \[5\]"):
        sae.save(tmp_path / "other", extras={"latent_density": density[:5]})


def test_extras_may_share_memory_and_what_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    sae = SAE(SAEConfig(4, 6, 2))
    density = torch.rand(6)
    sae.save(tmp_path / "sae", extras={"density": density, "again": density, "bias": sae.b_enc})
    assert torch.equal(load_extras(tmp_path / "sae")["again"], density)
    sae.b_enc = torch.nn.Parameter(sae.b_enc.double())
    with pytest.raises(DtypeError, match=r"b_enc: expected torch.float32, the dtype of W_dec, got torch.float64"):
        sae.save(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_an_architecture_that_is_not_known_here_is_one_sentence(tmp_path: Path) -> None:
    OLD.save(tmp_path / "sae")
    path = tmp_path / "sae" / "flashsae.json"
    content = {**json.loads(path.read_text()), "architecture": "theirs"}
    path.write_text(json.dumps(sealed(content)))
    with pytest.raises(
        CheckpointError, match=r"sae cannot be read here: arch: expected one of .* got 'theirs'\. One of"
    ):
        SAE.load(tmp_path / "sae")
    path.write_text(json.dumps(sealed({**content, "architecture": "topk", "settings": {"k": 2, "slope": 1}})))
    with pytest.raises(CheckpointError, match="slope: topk has no such setting; it has k"):
        SAE.load(tmp_path / "sae")


def test_saved_weights_obey_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        OLD.save(tmp_path / "sae")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "sae").iterdir()} == {0o644}
