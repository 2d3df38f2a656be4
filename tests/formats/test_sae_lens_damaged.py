from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from flashsae.errors import CheckpointError
from flashsae.formats import sae_lens
from helpers.sae_lens_files import D, F, K, check_read, foreign

WRONG: dict[str, list[tuple[Any, str]]] = {
    "architecture": [
        (..., "architecture: expected a name, got nothing"), (3, "architecture: expected a name, got 3"),
        ("temporal", "temporal, which FlashSAE does not have: its codes depend on the tokens before"),
        ("matching_pursuit", "matching_pursuit, which FlashSAE does not have: its latents are chosen one after"),
        ("mine", "expected one of standard, gated, .* got 'mine'"),
    ],
    "d_in": [
        (D + 1, r"W_dec: expected floats \[37, 8\], got float32"), (..., "d_in: expected a whole number"),
        (0, "d_in: expected a number from 1"), (-7, "d_in"), (7.0, "d_in"), (True, "d_in"), (10**30, "d_in"),
        ("7", "d_in"),
    ],
    "d_sae": [(F - 1, r"expected floats \[36"), (None, "d_sae"), (float("nan"), "d_sae"), ([37], "d_sae")],
    "k": [
        (float("nan"), "k: expected a whole number, got nan"), (0, "k: expected"), (-1, "k: expected"),
        (2.5, "k: expected a"),
        (True, "k: expected"), ("5", "k: expected a whole number, got 5"), (None, "k: expected a whole"),
    ],
    "dtype": [("float8", "dtype: expected one of float32"), (3, "dtype"), ("torch.int8", "dtype")],
    "apply_b_dec_to_input": [("yes", "apply_b_dec_to_input: expected true or false"), (1, "apply_b_dec_to_input")],
    "normalize_activations": [("other", "normalize_activations: expected one of none"), (True, "normalize")],
    "rescale_acts_by_decoder_norm": [(1, "rescale_acts_by_decoder_norm: expected true or false")],
    "metadata": [
        ([], "metadata: expected an object"), ("x", "metadata: expected an object"), (None, "metadata: expected"),
        ({"sae_lens_version": "new"}, "version: expected one, got 'new'"), ({"sae_lens_version": 6}, "got '6'"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_each_wrong_setting_is_one_sentence(name: str, tmp_path: Path) -> None:
    for wrong, said in WRONG[name]:
        config = {"k": K, "metadata": {"sae_lens_version": "6.54.12"}, name: wrong}
        foreign(tmp_path, config.pop("architecture", "topk"), **config)
        with pytest.raises(CheckpointError, match=said) as caught:
            sae_lens.read(tmp_path)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 600


def test_a_transcoder_has_its_own_refusals(tmp_path: Path) -> None:
    config: dict[str, Any] = {"d_out": 3, "apply_b_dec_to_input": False}
    w = {"W_dec": torch.randn(F, 3), "b_dec": torch.randn(3)}
    content = check_read(foreign(tmp_path, "transcoder", w, **config))
    assert (content.architecture, content.d_out, content.apply_b_dec_to_input) == ("transcoder:relu", 3, False)
    assert sae_lens.read(foreign(tmp_path, "transcoder", w, apply_b_dec_to_input=...)).d_out == 3
    skip = check_read(foreign(tmp_path, "skip_transcoder", {**w, "W_skip": torch.randn(3, D)}, **config))
    assert (skip.architecture, skip.tensors["W_skip"].shape) == ("skip_transcoder:relu", (3, D))
    with pytest.raises(
        CheckpointError, match="apply_b_dec_to_input: expected false of a transcoder, whose b_dec is of"
    ):
        sae_lens.read(foreign(tmp_path, "transcoder", w, **{**config, "apply_b_dec_to_input": True}))
    with pytest.raises(
        CheckpointError, match="layer_norm of a transcoder, which SAELens does to the input and does not"
    ):
        sae_lens.read(foreign(tmp_path, "transcoder", w, normalize_activations="layer_norm", **config))
    with pytest.raises(CheckpointError, match=r"W_dec: expected floats \[37, 4\], got float32 \[37, 3\]"):
        sae_lens.read(foreign(tmp_path, "transcoder", w, **{**config, "d_out": 4}))
    with pytest.raises(CheckpointError, match="it has no W_skip"):
        sae_lens.read(foreign(tmp_path, "skip_transcoder", w, **config))


def test_damaged_and_foreign_files_are_one_sentence_each(tmp_path: Path) -> None:
    def refused(said: str) -> None:
        with pytest.raises(CheckpointError, match=said) as caught:
            sae_lens.read(tmp_path)
        assert "\n" not in str(caught.value)

    long = torch.zeros(3)
    for tensors, said in (
        ({"W_dec": None}, r"it has no W_dec; expected W_dec, W_enc, b_dec, b_enc, scaling_factor"),
        ({"extra": long}, "extra is none of its tensors"),
        ({"threshold": torch.zeros(F)}, "threshold is none of its tensors"),
        ({"b_enc": torch.zeros(F + 1)}, r"b_enc: expected floats \[37\], got float32 \[38\]"),
        ({"W_enc": torch.zeros(F, D)}, r"W_enc: expected floats \[7, 37\], got float32 \[37, 7\]"),
        ({"b_dec": torch.zeros(D, dtype=torch.int32)}, r"b_dec: expected floats \[7\], got int32 \[7\]"),
        ({"W_dec": torch.zeros(())}, r"W_dec: expected floats"),
    ):
        foreign(tmp_path, "topk", tensors, k=K)  # type: ignore[arg-type]
        refused(said)
    weights, config = tmp_path / "sae_weights.safetensors", tmp_path / "cfg.json"
    foreign(tmp_path, "jumprelu")
    refused("it has no threshold")
    foreign(tmp_path, "batchtopk", {"topk_threshold": torch.zeros(1)})
    refused(r"topk_threshold: expected floats \[\], got float32 \[1\]")
    foreign(tmp_path, "topk", k=K)
    save_file({"sparsity": torch.zeros(F + 1)}, tmp_path / "sparsity.safetensors")
    refused(r"sparsity: expected floats \[37\], got float32 \[38\]")
    (tmp_path / "sparsity.safetensors").unlink()
    whole = weights.read_bytes()
    for content in (b"", whole[:-1], b"\xff" * 16, pickle.dumps({"W_enc": 1}), b"\x08\0\0\0\0\0\0\0{}      "):
        weights.write_bytes(content)
        refused("sae_weights.safetensors")
    weights.unlink()
    assert not sae_lens.detects(tmp_path)
    refused(r"cannot read .*sae_weights\.safetensors: there is no such file\.")
    weights.write_bytes(whole)
    good = config.read_text("utf-8")
    nested = '{"metadata": ' * 100_000
    for text in ("", "[]", "[1]", "3", "null", '"x"', good[:-1], "{}", nested, '{"k": 1, "k": 2}'):
        config.write_text(text)
        refused(r"cfg\.json")
    config.write_bytes(b"\xff\xfe\x00")
    refused(r"cfg\.json")
    config.unlink()
    refused(r"cannot read .*cfg\.json: there is no such file")
