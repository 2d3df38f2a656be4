from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import flashsae
from flashsae import SAE, BatchTopKSettings, SAEConfig
from flashsae.architecture import architecture_names, settings_of
from flashsae.errors import CheckpointError, ConfigError, DtypeError, ShapeError
from flashsae.files.documents import sealed
from flashsae.formats import native
from flashsae.formats.content import Content
from flashsae.sae.saved import content_of, sae_of

METADATA = {"model": "gpt2", "hookpoint": "h.3"}


def small(name: str) -> SAE:
    beside: dict[str, Any] = {}
    if name == "crosscoder":
        beside = {"sites": ("a", "b"), "widths": (3, 5)}
    return SAE(SAEConfig(8, 48, arch=settings_of(name, **beside)), seed=1).eval()


@pytest.mark.parametrize("name", architecture_names(installed=False))
def test_the_value_is_the_sae(name: str) -> None:
    sae = small(name)
    content = content_of(sae, METADATA, {"density": torch.rand(48)})
    assert (content.architecture, content.d_in, content.d_sae) == (sae.architecture.name, 8, 48)
    assert content.metadata == METADATA
    again = sae_of(content)
    assert (again.config, again.training) == (sae.config, False)
    assert all(torch.equal(value, again.state_dict()[row]) for row, value in sae.state_dict().items())


def test_what_no_other_library_has_may_be_left_out() -> None:
    content = content_of(SAE(SAEConfig(3, 6, arch=BatchTopKSettings(2))))
    assert sae_of(lacking(content, "threshold_steps")).threshold_steps == 0
    with pytest.raises(
        CheckpointError, match=r"^x does not fit BatchTopK: expected tensors .*b_enc float32 \[6\].*, got"
    ):
        sae_of(lacking(content, "b_enc"), "x")


def lacking(content: Content, *names: str) -> Content:
    return replace(content, tensors={name: value for name, value in content.tensors.items() if name not in names})


def with_tensor(content: Content, name: str, value: torch.Tensor) -> Content:
    return replace(content, tensors={**content.tensors, name: value})


CONTENT = content_of(SAE(SAEConfig(3, 6, 2)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lacking(CONTENT, "W_enc_T"), "holds no SAE: expected a matrix W_enc_T in it, got none"),
        (with_tensor(CONTENT, "W_dec", torch.zeros(6)), r"holds no SAE: expected a matrix W_dec in it, got \[6\]"),
        (with_tensor(CONTENT, "W_dec", torch.zeros(5, 3)), r"does not fit TopK: expected tensors"),
        (with_tensor(CONTENT, "W_skip", torch.zeros(3, 3)), r"does not fit TopK: expected tensors .* W_skip"),
        (with_tensor(CONTENT, "b_enc", torch.zeros(6).double()), r"does not fit TopK: .* got .*b_enc float64 \[6\]"),
        (
            replace(CONTENT, tensors={name: value.to(torch.int8) for name, value in CONTENT.tensors.items()}),
            "cannot be read here: expected weights of a float dtype, got torch.int8",
        ),
        (replace(CONTENT, architecture="theirs"), "cannot be read here: arch: expected one of .*, got 'theirs'"),
        (replace(CONTENT, settings={"k": 7}), "cannot be read here: k: expected k <= d_sae = 6, got 7"),
        (replace(CONTENT, settings={"slope": 7}), "cannot be read here: slope: topk has no such setting"),
        (
            replace(CONTENT, normalize_activations="whitening"),
            "cannot be read here: normalize_activations: expected one",
        ),
        (
            replace(content_of(small("transcoder")), apply_b_dec_to_input=True),
            "cannot be read here: apply_b_dec_to_input: TopK transcoder subtracts no b_dec",
        ),
    ],
)
def test_what_is_no_sae_is_one_sentence(content: Content, message: str) -> None:
    with pytest.raises(CheckpointError, match=f"^place {message}"):
        sae_of(content, "place")


def test_what_cannot_be_held_is_refused_before_a_format_sees_it() -> None:
    sae = SAE(SAEConfig(3, 6, 2))
    with pytest.raises(ConfigError, match=r"^metadata: expected what JSON can hold"):
        content_of(sae, {"f": float("nan")})
    with pytest.raises(ShapeError, match=r"^extras: density: expected the shape \[6\], got \[5\]"):
        content_of(sae, {}, {"density": torch.zeros(5)})
    sae.b_enc = torch.nn.Parameter(sae.b_enc.double())
    with pytest.raises(DtypeError, match=r"^b_enc: expected torch.float32, the dtype of W_dec, got torch.float64"):
        content_of(sae)


def test_a_normalisation_that_a_version_does_not_know_is_refused(tmp_path: Path) -> None:
    SAE(SAEConfig(3, 6, 2, normalize_activations="token_norm")).save(tmp_path / "sae")
    path = tmp_path / "sae" / "flashsae.json"
    content = json.loads(path.read_text())
    for version in (2, 3):
        path.write_text(json.dumps(sealed({**content, "format_version": version})))
        with pytest.raises(
            CheckpointError, match=f"normalize_activations is token_norm, which is none of version {version}"
        ):
            SAE.load(tmp_path / "sae")
    path.write_text(json.dumps(sealed({**content, "format_version": 5})))
    with pytest.raises(CheckpointError, match="has format version 5, this FlashSAE reads"):
        flashsae.load(tmp_path / "sae")


def test_what_is_measured_later_is_added_without_a_touch_of_the_weights(tmp_path: Path) -> None:
    SAE(SAEConfig(3, 6, 2)).save(tmp_path / "sae", metadata=METADATA)
    weights, folder = tmp_path / "sae" / "flashsae.safetensors", tmp_path / "sae"
    before = weights.stat().st_mtime_ns, weights.read_bytes()
    for fvu in (0.5, 0.25):
        native.add_metadata(folder, {"metrics": {"fvu": fvu}})
    assert (weights.stat().st_mtime_ns, weights.read_bytes()) == before
    assert native.read(folder).metadata == {**METADATA, "metrics": {"fvu": 0.25}}
    (folder / "flashsae.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is something else"):
        native.add_metadata(folder, {"metrics": {}})
