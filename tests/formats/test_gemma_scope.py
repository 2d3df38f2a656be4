from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import flashsae
from flashsae.cli.converting import Conversion, convert
from flashsae.errors import CheckpointError, ConfigError
from flashsae.formats.gemma_scope import FORMAT
from flashsae.formats.registry import recognised
from helpers.released import D, F, assert_computes, jump_relu, jump_relu_weights, normal

SAE = "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71"
ARRAYS = {name: weight.numpy() for name, weight in jump_relu_weights().items()}
X = normal(19, D)


def made(root: Path, place: str = SAE, **arrays: Any) -> Path:
    """Write params.npz as numpy does, and return its folder; None leaves an array out."""
    (root / place).mkdir(parents=True)
    np.savez(root / place / "params.npz", **{k: v for k, v in (ARRAYS | arrays).items() if v is not None})
    return root / place


def test_what_is_read_computes_what_was_published(tmp_path: Path) -> None:
    folder = made(tmp_path)
    assert_computes(folder, X, *jump_relu(jump_relu_weights(), X))
    assert recognised(folder) is recognised(folder / "params.npz") is FORMAT
    content = FORMAT.read(folder / "params.npz")
    assert content.architecture == "jump_relu"
    assert not content.apply_b_dec_to_input
    assert torch.equal(content.tensors["W_enc_T"].T, jump_relu_weights()["W_enc"])
    assert all(tensor.is_contiguous() and tensor.dtype == torch.float32 for tensor in content.tensors.values())
    assert content.tensors["threshold"].min() == 0  # the ReLU lets nothing below 0 through, whatever the threshold


@pytest.mark.parametrize(
    ("place", "architecture", "model", "hookpoint"),
    [
        (SAE, "jump_relu", "google/gemma-2-2b", "layers.20"),
        ("gemma-scope-9b-it-res/layer_9/width_16k/average_l0_88", "jump_relu", "google/gemma-2-9b-it", "layers.9"),
        (
            "gemma-scope-27b-pt-mlp/layer_0/width_65k/average_l0_71",
            "jump_relu",
            "google/gemma-2-27b",
            "layers.0.post_feedforward_layernorm",
        ),
        (
            "models--google--gemma-scope-2b-pt-att/snapshots/1a2b/layer_3/width_65k/average_l0_6",
            "jump_relu",
            "google/gemma-2-2b",
            "layers.3.self_attn.o_proj:in",
        ),
        ("google/gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6", "jump_relu", "google/gemma-2-2b", None),
        (
            "gemma-scope-2b-pt-transcoders/layer_5/width_16k/average_l0_87",
            "transcoder:jump_relu",
            "google/gemma-2-2b",
            None,
        ),
    ],
)
def test_the_folder_tells_what_it_is_of(
    tmp_path: Path, place: str, architecture: str, model: str, hookpoint: str | None
) -> None:
    content = FORMAT.read(made(tmp_path, place))
    assert content.architecture == architecture
    assert content.metadata["model"] == model
    assert content.metadata.get("hookpoint") == hookpoint
    assert content.metadata["l0"] == int(place.rpartition("_")[2])
    assert content.settings["target_l0"] == min(F, content.metadata["l0"])
    assert content.metadata["gemma_scope"]["repository"].startswith("google/gemma-scope-")


def test_a_transcoder_keeps_the_name_of_what_no_module_gives(tmp_path: Path) -> None:
    folder = made(tmp_path, "gemma-scope-2b-pt-transcoders/layer_5/width_16k/average_l0_87")
    metadata = FORMAT.read(folder).metadata
    assert metadata["gemma_scope"] == {"repository": "google/gemma-scope-2b-pt-transcoders", "layer": 5}
    flashsae.load(folder).save(tmp_path / "theirs", format="saelens", metadata=metadata)
    written = json.loads((tmp_path / "theirs" / "cfg.json").read_text("utf-8"))["metadata"]
    assert written["hook_name"] == "blocks.5.ln2.hook_normalized"
    assert written["hook_name_out"] == "blocks.5.hook_mlp_out"
    assert_computes(folder, X, *jump_relu(jump_relu_weights(), X))


def test_transcoders_of_all_layers_become_a_set_of_circuit_tracer(tmp_path: Path) -> None:
    for layer in range(3):
        made(tmp_path, f"gemma-scope-2b-pt-transcoders/layer_{layer}/width_16k/average_l0_{layer + 7}")
    folder = tmp_path / "gemma-scope-2b-pt-transcoders"
    convert(Conversion(str(folder), tmp_path / "set", "circuit_tracer"), Console(file=io.StringIO()))
    told = (tmp_path / "set" / "config.yaml").read_text("utf-8")
    assert "feature_input_hook: ln2.hook_normalized\nfeature_output_hook: hook_mlp_out" in told
    same = flashsae.load(folder / "layer_2" / "width_16k" / "average_l0_9")
    assert torch.equal(flashsae.load(tmp_path / "set" / "layer_2")(X), same(X))
    convert(Conversion(str(folder), tmp_path / "many", "saelens"), Console(file=io.StringIO()))
    one = flashsae.load(tmp_path / "many" / "layer_2" / "width_16k" / "average_l0_9")
    assert torch.equal(one(X), same(X))


def test_elsewhere_it_is_read_without_what_the_folder_would_tell(tmp_path: Path) -> None:
    content = FORMAT.read(made(tmp_path, "mine"))
    assert content.metadata == {}
    assert content.settings == {"target_l0": 32}
    file = (tmp_path / "mine" / "params.npz").rename(tmp_path / "layer 20.npz")
    assert_computes(file, X, *jump_relu(jump_relu_weights(), X))


def test_names_in_small_letters_and_a_scale_of_1_change_nothing(tmp_path: Path) -> None:
    small = {"W_enc": None, "w_enc": ARRAYS["W_enc"], "W_dec": None, "w_dec": np.asfortranarray(ARRAYS["W_dec"])}
    folder = made(tmp_path, **small, scaling_factor=np.ones(F, np.float32), b_enc=ARRAYS["b_enc"].astype(">f4"))
    assert_computes(folder, X, *jump_relu(jump_relu_weights(), X))


def test_half_precision_stays_and_mixed_dtypes_become_the_widest(tmp_path: Path) -> None:
    half = {name: array.astype(np.float16) for name, array in ARRAYS.items()}
    assert flashsae.load(made(tmp_path, "half", **half)).W_dec.dtype == torch.float16
    assert flashsae.load(made(tmp_path, "mixed", W_enc=half["W_enc"])).W_enc_T.dtype == torch.float32


WRONG = {
    "a scale": ({"scaling_factor": np.full(F, 2.0)}, "scaling_factor that is not 1, .* use it with SAELens"),
    "nothing of it": ({"b_enc": None, "W_enc": None}, "not of this format: it has no W_enc, b_enc; expected W_dec"),
    "a stranger": ({"gate": ARRAYS["b_enc"]}, "gate is none of its tensors"),
    "a shape": ({"W_dec": ARRAYS["W_dec"].T.copy()}, r"W_dec: expected floats \[40, 6\], got float32 \[6, 40\]"),
    "a scalar": ({"b_enc": np.float32(1)}, r"b_enc: expected floats \['?any'?\], got float32 \[\]"),
    "no latents": ({"b_enc": np.zeros(0, np.float32)}, r"b_enc: expected floats \[any\], got float32 \[0\]"),
    "no number": ({"threshold": np.full(F, np.nan, np.float32)}, "threshold holds values that are infinite or no num"),
    "whole numbers": ({"b_dec": np.zeros(D, np.int64)}, "b_dec.npy holds int64, and weights are floats"),
    "wide floats": ({"b_dec": np.zeros(D, np.longdouble)}, "b_dec.npy holds float128, and weights are floats"),
    "objects": ({"b_dec": np.array([{}] * D)}, "b_dec.npy holds objects, which may run something when they are read"),
    "two of a name": ({"w_enc": ARRAYS["W_enc"]}, "a name stands there twice"),
}


@pytest.mark.parametrize(("arrays", "told"), WRONG.values(), ids=WRONG)
def test_what_it_may_not_hold_is_told(tmp_path: Path, arrays: dict[str, Any], told: str) -> None:
    folder = made(tmp_path, **arrays)
    with pytest.raises(CheckpointError, match=told) as caught:
        flashsae.load(folder)
    assert "params.npz" in str(caught.value)
    assert "\n" not in str(caught.value)


class Runs:
    """Runs something when a pickle of it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("ran").touch, ())


def test_nothing_in_it_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = made(tmp_path, threshold=np.array([Runs()] * F))
    with pytest.raises(CheckpointError, match="holds objects"):
        flashsae.load(folder)
    assert not Path("ran").exists()


def written(path: Path, content: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, array in ARRAYS.items():
            whole = io.BytesIO()
            np.save(whole, array)
            archive.writestr(f"{name}.npy", content if name == "b_dec" else whole.getvalue())
    return path


def test_an_array_is_never_larger_than_the_file_has_room_for(tmp_path: Path) -> None:
    whole = io.BytesIO()
    np.save(whole, ARRAYS["b_dec"])
    good = whole.getvalue()
    assert flashsae.load(written(tmp_path / "good.npz", good)).config.d_in == D
    huge = good.replace(b"(6,), }" + b" " * 11, b"(999999999999,), }")
    for name, content in {"huge": huge, "short": good[:-4], "long": good + b"1234"}.items():
        with pytest.raises(CheckpointError, match=r"b_dec.npy is cut short, or not of the shape that it names"):
            flashsae.load(written(tmp_path / f"{name}.npz", content))
    with pytest.raises(CheckpointError, match=r"version 9.0"):
        flashsae.load(written(tmp_path / "version.npz", good[:6] + b"\x09" + good[7:]))
    with pytest.raises(CheckpointError, match=r"are compressed, or larger than the file\). Fetch it again"):
        flashsae.load(written(tmp_path / "compressed.npz", good, zipfile.ZIP_DEFLATED))


def test_damage_is_told_in_one_sentence(tmp_path: Path) -> None:
    folder = made(tmp_path)
    whole = (folder / "params.npz").read_bytes()
    generator = np.random.default_rng(0)
    places = [0, 3, len(whole) - 10, *generator.integers(0, len(whole), 60)]
    before, told = flashsae.load(folder), []
    for place in places:
        (folder / "params.npz").write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        try:
            sae = flashsae.load(folder)
        except CheckpointError as error:
            told.append(str(error))
        else:  # of what is not looked at, such as a date
            assert all(map(torch.equal, sae.state_dict().values(), before.state_dict().values()))
    assert len(told) > len(places) / 2
    assert all("params.npz" in each and "\n" not in each for each in told)
    for content in (b"", whole[: len(whole) // 2], b"PK\x05\x06" + bytes(18), b"no archive"):
        (folder / "params.npz").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"params.npz"):
            flashsae.load(folder)


def test_folders_of_several_are_told_by_their_names(tmp_path: Path) -> None:
    for place in (
        "layer_20/width_16k/average_l0_9",
        "layer_20/width_16k/average_l0_71",
        "layer_3/width_1m/average_l0_5",
    ):
        made(tmp_path, f"gemma-scope-2b-pt-res/{place}")
    root = tmp_path / "gemma-scope-2b-pt-res"
    assert FORMAT.parts is not None
    assert list(FORMAT.parts(root / "layer_20" / "width_16k")) == ["average_l0_9", "average_l0_71"]
    assert list(FORMAT.parts(root / "layer_20")) == ["width_16k/average_l0_9", "width_16k/average_l0_71"]
    assert len(FORMAT.parts(root)) == 3
    assert FORMAT.parts(root / "layer_20" / "width_16k" / "average_l0_9") == {}
    with pytest.raises(CheckpointError, match=r"holds 2 SAEs: average_l0_71, average_l0_9\. Name one of them"):
        flashsae.load(root / "layer_20" / "width_16k")
    with pytest.raises(CheckpointError, match=r"several SAEs: name one of them, .*layer_3/width_1m/average_l0_5"):
        FORMAT.read(root)


def test_it_is_read_and_not_written(tmp_path: Path) -> None:
    sae = flashsae.load(made(tmp_path))
    with pytest.raises(ConfigError, match="gemma_scope is read and not written; expected one of flashsae"):
        sae.save(tmp_path / "new", format="gemma_scope")
    sae.save(tmp_path / "ours")
    assert torch.equal(flashsae.load(tmp_path / "ours")(X), sae(X))


def test_nothing_else_is_taken_for_it(tmp_path: Path) -> None:
    (tmp_path / "params.npz").mkdir()
    (tmp_path / "a.txt").touch()
    for place in (tmp_path, tmp_path / "params.npz", tmp_path / "a.txt", tmp_path / "none.npz", tmp_path / ("x" * 300)):
        assert not FORMAT.detects(place)
