from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import flashsae
from flashsae import SAE, SAEConfig
from flashsae.errors import CheckpointError, ConfigError
from flashsae.formats import native, registry
from flashsae.formats.content import Format

ROOM = Path(native.__file__).parent


def test_every_file_of_the_room_with_a_format_is_found_by_itself() -> None:
    with_format = {path.stem for path in ROOM.glob("*.py") if "\nFORMAT = " in path.read_text("utf-8")}
    homes = {Path(each.read.__code__.co_filename).stem for each in registry.formats().values()}
    assert with_format == homes
    assert next(iter(registry.formats())) == "flashsae"
    assert all(name == each.name and each.title for name, each in registry.formats().items())


def test_a_name_that_no_format_has_is_one_sentence() -> None:
    assert registry.format_named("flashsae") is native.FORMAT
    with pytest.raises(
        ConfigError, match=r"^format: expected one of flashsae.*, got 'sealens'\. Did you mean saelens\?$"
    ):
        registry.format_named("sealens")


def test_exactly_one_format_must_claim_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SAE(SAEConfig(3, 5, 2)).save(tmp_path / "sae")
    assert registry.recognised(tmp_path / "sae") is native.FORMAT
    (tmp_path / "empty").mkdir()
    (tmp_path / "many").mkdir()
    for number in range(7):
        (tmp_path / "many" / f"{number}.bin").touch()
    (tmp_path / "file").touch()
    for name, found in (
        ("empty", "nothing in it"),
        ("file", "a file"),
        ("none", "no such file or folder"),
        ("many", "0.bin, 1.bin, 2.bin, 3.bin, 4.bin and 2 more"),
    ):
        with pytest.raises(CheckpointError, match=rf"holds no SAE of a format that is known .*: found {found}\. Name"):
            registry.recognised(tmp_path / name)
    greedy: Format = replace(native.FORMAT, name="greedy", detects=lambda path: True)
    monkeypatch.setattr(registry, "formats", lambda: {"flashsae": native.FORMAT, "greedy": greedy})
    with pytest.raises(CheckpointError, match=r"may be of the formats flashsae and greedy: say which, .* --format"):
        registry.recognised(tmp_path / "sae")


def test_an_sae_with_its_exports_in_folders_is_that_sae(tmp_path: Path) -> None:
    sae = SAE(SAEConfig(3, 5, 2))
    for form in registry.formats().values():
        if form.write is not None and not form.is_whole:
            place = tmp_path / form.name
            sae.save(place, format=form.name, metadata={"model": "gpt2", "hookpoint": "h.3"})
            for other in ("saelens", "sparsify", "flashsae", "dictionary_learning/trainer_0"):
                inner = other.partition("/")[0]
                sae.save(place / other, format=inner, metadata={"model": "gpt2", "hookpoint": "h.3"})
            assert registry.recognised(place) is form
            assert flashsae.load(place).config.d_sae == 5


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with a name here")
def test_no_format_waits_for_pipes_in_the_place_of_its_files(tmp_path: Path) -> None:
    names = "cfg.json config.json config.yaml params.npz params.safetensors sae.safetensors ae.pt"
    for name in [
        *names.split(),
        "flashsae.json",
        "sae_weights.safetensors",
        "layer_0.safetensors",
        "layer0.sae.pt",
        "l.pth",
    ]:
        os.mkfifo(tmp_path / name)
        for form in registry.formats().values():
            assert not form.detects(tmp_path / name)
    for form in registry.formats().values():
        form.detects(tmp_path)
        with pytest.raises(CheckpointError):
            form.read(tmp_path)


def test_importing_the_library_loads_no_format() -> None:
    code = "import sys, flashsae; print([name for name in sys.modules if name.startswith('flashsae.formats')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
