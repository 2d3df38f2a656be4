from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flashsae.errors import CheckpointError, ConfigError
from flashsae.formats import sparsify
from flashsae.formats.content import Content
from helpers.dense_content import codes, made, reconstructed, same

D, F, K = 7, 37, 5


def theirs(folder: Path, config: dict[str, Any] | None = None, **tensors: torch.Tensor | None) -> Path:
    """Write what sparsify does; of the defaults what is None is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    default = {
        "W_dec": torch.randn(F, D, generator=generator),
        "b_dec": torch.randn(D, generator=generator),
        "encoder.bias": torch.randn(F, generator=generator),
        "encoder.weight": torch.randn(F, D, generator=generator),
    }
    named = {name.replace("encoder_", "encoder."): value for name, value in tensors.items()}
    save_file(
        {name: each for name, each in {**default, **named}.items() if each is not None}, folder / "sae.safetensors"
    )
    settings = {"activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": F, "k": K,
                "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": D}  # fmt: skip
    changed = {**settings, **(config or {})}
    (folder / "cfg.json").write_text(json.dumps({name: each for name, each in changed.items() if each is not None}))
    return folder


def written(folder: Path, content: Content, *, lossy: bool = False) -> list[str]:
    folder.mkdir(parents=True)
    return sparsify.write(folder, content, lossy)


def test_files_of_theirs_are_read(tmp_path: Path) -> None:
    folder = theirs(tmp_path / "layers.3")
    content, raw = sparsify.read(folder), load_file(folder / "sae.safetensors")
    assert sparsify.detects(folder)
    assert sparsify.parts(folder) == {}
    assert (content.architecture, content.settings, content.apply_b_dec_to_input) == ("topk", {"k": K}, True)
    assert torch.equal(content.tensors["W_enc_T"], raw["encoder.weight"])
    assert torch.equal(content.tensors["b_enc"], raw["encoder.bias"])
    assert torch.equal(content.tensors["W_dec"], raw["W_dec"])
    assert torch.equal(content.tensors["b_dec"], raw["b_dec"])
    assert content.metadata == {"hookpoint": "layers.3", "sparsify": {"normalize_decoder": True}}


@pytest.mark.parametrize(
    ("config", "architecture", "settings", "subtracts"),
    [
        ({"transcode": True}, "transcoder", {"k": K}, False),
        ({"transcode": True, "skip_connection": True}, "skip_transcoder", {"k": K}, False),
        ({"skip_connection": True}, "skip_transcoder", {"k": K}, False),
        ({"multi_topk": True}, "topk", {"k": K, "multi_topk": 0.125}, True),
        ({"signed": True}, "abs_topk", {"k": K}, True),
        ({"signed": False, "unknown": [1]}, "topk", {"k": K}, True),
        ({"signed": True, "multi_topk": True, "transcode": True}, "transcoder:abs_topk", {"k": K}, False),
        ({"k": 1}, "topk", {"k": 1}, True),
        ({"k": F}, "topk", {"k": F}, True),
        ({"k": None}, "topk", {"k": 32}, True),  # as theirs
        (dict.fromkeys(("activation", "expansion_factor", "normalize_decoder", "multi_topk", "transcode")), "topk",
         {"k": K}, True),
    ],
)  # fmt: skip
def test_settings_of_theirs(
    config: dict[str, Any], architecture: str, settings: dict[str, Any], subtracts: bool, tmp_path: Path
) -> None:
    skip = {"W_skip": torch.randn(D, D)} if config.get("skip_connection") else {}
    content = sparsify.read(theirs(tmp_path, config, **skip))
    assert (content.architecture, content.settings, content.apply_b_dec_to_input) == (architecture, settings, subtracts)
    assert ("W_skip" in content.tensors) == bool(skip)


def test_multi_topk_is_written_only_where_they_wrote_it(tmp_path: Path) -> None:
    written(tmp_path / "again", sparsify.read(theirs(tmp_path / "theirs", {"multi_topk": True})))
    assert json.loads((tmp_path / "again" / "cfg.json").read_text())["multi_topk"] is True
    written(tmp_path / "ours", made("topk", multi_topk=0.125))
    assert json.loads((tmp_path / "ours" / "cfg.json").read_text())["multi_topk"] is False


def test_a_number_of_latents_is_an_expansion_factor_where_it_is_0(tmp_path: Path) -> None:
    tensors = {"encoder.weight": torch.randn(35, D), "encoder_bias": torch.randn(35), "W_dec": torch.randn(35, D)}
    assert sparsify.read(theirs(tmp_path, {"num_latents": 0, "expansion_factor": 5}, **tensors)).d_sae == 35
    assert sparsify.read(theirs(tmp_path, {"num_latents": None, "expansion_factor": 5}, **tensors)).d_sae == 35


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    ("architecture", "subtracts"),
    [("topk", True), ("transcoder", False), ("skip_transcoder", False)],
)
def test_what_sparsify_holds_comes_back_bit_for_bit(
    architecture: str, subtracts: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    content = made(architecture, dtype=dtype, apply_b_dec_to_input=subtracts, unit_rows=False)
    assert written(tmp_path / "sae", content) == []
    assert same(sparsify.read(tmp_path / "sae"), content)
    again = sparsify.read(tmp_path / "sae")
    written(tmp_path / "again", again)
    for name in ("cfg.json", "sae.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "sae" / name).read_bytes()


@pytest.mark.parametrize(("d_in", "d_sae", "k"), [(7, 37, 1), (7, 37, 37), (1, 1, 1), (5, 3, 2)])
def test_shapes_and_names_of_what_is_written(d_in: int, d_sae: int, k: int, tmp_path: Path) -> None:
    content = made("topk", d_in, d_sae, k=k, multi_topk=0.5)
    written(tmp_path / "sae", content)
    assert {name: list(each.shape) for name, each in load_file(tmp_path / "sae" / "sae.safetensors").items()} == {
        "encoder.weight": [d_sae, d_in], "encoder.bias": [d_sae], "W_dec": [d_sae, d_in], "b_dec": [d_in],
    }  # fmt: skip
    assert json.loads((tmp_path / "sae" / "cfg.json").read_text()) == {
        "activation": "topk", "expansion_factor": max(1, d_sae // d_in), "normalize_decoder": True,
        "num_latents": d_sae, "k": k, "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": d_in,
    }  # fmt: skip
    assert same(sparsify.read(tmp_path / "sae"), content)


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [("hierarchical_topk", {"budgets": (2, 5)}), ("matryoshka:topk", {"k": 4, "prefixes": (0.5, 1.0)})],
)
def test_what_is_topk_in_inference_is_written_as_it(
    architecture: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    content = made(architecture, **settings)
    assert written(tmp_path / "sae", content) == []
    assert same(sparsify.read(tmp_path / "sae"), replace(content, architecture="topk"))


def test_a_skip_that_subtracts_b_dec_is_read_without_that(tmp_path: Path) -> None:
    W_skip = torch.randn(D, D)
    content = sparsify.read(theirs(tmp_path, {"skip_connection": True}, W_skip=W_skip))
    raw, x = load_file(tmp_path / "sae.safetensors"), torch.randn(20, D)
    z = ((x - raw["b_dec"]) @ raw["encoder.weight"].T + raw["encoder.bias"]).relu()
    code = torch.zeros_like(z).scatter(1, z.topk(K).indices, z.topk(K).values)
    expected = code @ raw["W_dec"] + raw["b_dec"] + x @ W_skip.T
    torch.testing.assert_close(reconstructed(content, x).float(), expected)


@pytest.mark.parametrize("architecture", ["topk", "transcoder", "relu", "skip_transcoder"])
def test_b_dec_is_folded_where_sparsify_has_no_such_flag(architecture: str, tmp_path: Path) -> None:
    subtracts = "transcoder" in architecture
    content = made(architecture, apply_b_dec_to_input=subtracts)
    written(tmp_path / "sae", content)
    read, x = sparsify.read(tmp_path / "sae"), torch.randn(20, D, dtype=torch.float64)
    assert read.apply_b_dec_to_input != subtracts
    moved = content.tensors["W_enc_T"].double() @ content.tensors["b_dec"].double()
    expected = (content.tensors["b_enc"].double() + (-moved if subtracts else moved)).float()
    assert torch.equal(read.tensors["b_enc"], expected)  # rounded once
    torch.testing.assert_close(reconstructed(read, x), reconstructed(content, x), rtol=1e-5, atol=1e-5)


def test_relu_is_written_as_all_latents(tmp_path: Path) -> None:
    content = made("relu")
    assert written(tmp_path / "sae", content) == [
        f"relu is TopK with k = d_sae = {F}: the same numbers, but codes hold those that are 0, too"
    ]
    read, x = sparsify.read(tmp_path / "sae"), torch.randn(20, D, dtype=torch.float64)
    assert torch.equal(codes(read, x), codes(content, x))


@pytest.mark.parametrize(
    ("architecture", "k", "told"),
    [
        ("batch_topk", 5, "the k largest of each token are active, and not all above the threshold"),
        ("matryoshka", 5, "the k largest of each token are active, and not all above the threshold"),
        ("transcoder:batch_topk", 5, "the k largest of each token are active, and not all above the threshold"),
        ("jump_relu", 6, "the k largest of each token are active, and not all above their thresholds"),
        ("gated", 9, "the k largest magnitudes of each token are active, and not all whose gate is open"),
        ("abs_topk", 5, "the k largest of each token are active, and not the k largest by magnitude"),
    ],
)
def test_what_selects_otherwise_is_refused_or_given_up(architecture: str, k: int, told: str, tmp_path: Path) -> None:
    settings = {"target_l0": 6.2} if architecture == "jump_relu" else {}
    settings |= {"prefixes": (0.5, 1.0), "k": 5} if architecture == "matryoshka" else {}
    content = made(architecture, metadata={"l0": 9.4} if architecture == "gated" else {}, **settings)
    with pytest.raises(
        ConfigError, match=rf"^sparsify holds TopK alone, and not {architecture}: .*lossy=True.*{told}.*\.$"
    ):
        written(tmp_path / "refused", content)
    assert not list((tmp_path / "refused").iterdir())
    (sentence,) = written(tmp_path / "sae", content, lossy=True)
    assert sentence.startswith(f"{architecture} is TopK with k = {k}: {told}")
    read = sparsify.read(tmp_path / "sae")
    assert read.settings == {"k": k}
    if architecture != "gated":
        assert torch.equal(read.tensors["W_enc_T"], content.tensors["W_enc_T"])


def test_gated_as_topk_selects_by_its_magnitudes(tmp_path: Path) -> None:
    content = made("gated", metadata={"l0": F})
    written(tmp_path / "sae", content, lossy=True)
    x = torch.randn(20, D, dtype=torch.float64)
    code, is_open = codes(sparsify.read(tmp_path / "sae"), x), codes(content, x) > 0
    torch.testing.assert_close(code[is_open], codes(content, x)[is_open], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            replace(made("topk"), normalize_activations="layer_norm"),
            "no place for normalize_activations, got 'layer_norm'",
        ),
        (replace(made("topk"), architecture="crosscoder:topk"), "sparsify holds no crosscoder"),
        (replace(made("topk"), architecture="own_topk"), "sparsify holds TopK alone, and not own_topk: keep it"),
        (made("gated"), r"nothing says how many latents of gated are active \(l0\)"),
    ],
)
def test_what_sparsify_cannot_hold_is_refused(content: Content, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=sentence):
        written(tmp_path / "sae", content, lossy=True)


def test_two_widths_are_refused(tmp_path: Path) -> None:
    content = made("transcoder")
    wide = {**content.tensors, "W_dec": torch.randn(F, 9), "b_dec": torch.randn(9)}
    with pytest.raises(
        ConfigError, match="sparsify has one width for all that an SAE reads and writes, got 7, 9: save it"
    ):
        written(tmp_path / "sae", replace(content, tensors=wide), lossy=True)


def test_what_is_known_of_the_training_comes_back(tmp_path: Path) -> None:
    metadata = {"model": "gpt2", "hookpoint": "h.6.mlp:in", "dataset": "text", "context_length": 64, "fvu": 0.25}
    written(tmp_path / "sae", made("topk", metadata=metadata))
    run = json.loads((tmp_path / "sae" / "config.json").read_text())
    assert run["sae"] == json.loads((tmp_path / "sae" / "cfg.json").read_text())
    assert (run["model"], run["dataset"], run["ctx_len"], run["hookpoints"]) == ("gpt2", "text", 64, ["h.6.mlp:in"])
    read = sparsify.read(tmp_path / "sae")
    assert read.metadata == {**metadata, "sparsify": {"normalize_decoder": True}}
    written(tmp_path / "again", read)
    assert sparsify.read(tmp_path / "again").metadata == read.metadata


def test_config_json_of_their_run_is_read_and_written_again(tmp_path: Path) -> None:
    theirs(tmp_path / "layers.3" / "seed1", {"normalize_decoder": False})
    run = {"sae": {"k": K}, "model": "gpt2", "dataset": 7, "ctx_len": True, "hookpoints": ["layers.*"], "lr": None,
           "wd": float("nan")}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(run))
    read = sparsify.read(tmp_path / "layers.3" / "seed1")
    kept = {"hookpoints": ["layers.*"], "lr": None, "wd": None}
    assert read.metadata == {
        "model": "gpt2", "hookpoint": "layers.3", "sparsify": {"normalize_decoder": False, "config.json": kept}
    }  # fmt: skip
    written(tmp_path / "again", read)
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert {name: again[name] for name in kept} == kept
    assert json.loads((tmp_path / "again" / "cfg.json").read_text())["normalize_decoder"] is False


def test_config_json_of_something_else_says_nothing(tmp_path: Path) -> None:
    theirs(tmp_path / "mine")
    (tmp_path / "config.json").write_text('{"model": "of a language model"}')
    assert sparsify.read(tmp_path / "mine").metadata == {"sparsify": {"normalize_decoder": True}}
    (tmp_path / "config.json").write_text("{")
    assert sparsify.read(tmp_path / "mine").metadata == {"sparsify": {"normalize_decoder": True}}


def test_several_are_one_folder_each(tmp_path: Path) -> None:
    contents = {name: made("topk", k=k) for k, name in ((3, "h.10"), (4, "h.2"), (5, "h.2.mlp:in"))}
    assert sparsify.write_set(tmp_path, {**contents, "h.3": made("relu")}, False) == [
        f"h.3: relu is TopK with k = d_sae = {F}: the same numbers, but codes hold those that are 0, too"
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["h.10", "h.2", "h.2.mlp@in", "h.3"]
    assert sparsify.detects(tmp_path)
    found = sparsify.parts(tmp_path)
    assert list(found) == ["h.2", "h.2.mlp@in", "h.3", "h.10"]
    assert {name: sparsify.read(path).settings["k"] for name, path in found.items()} == {
        "h.2": 4, "h.2.mlp@in": 5, "h.3": F, "h.10": 3,
    }  # fmt: skip
    with pytest.raises(CheckpointError, match=r"holds several SAEs: .*; there are h\.2, h\.2\.mlp@in, h\.3, h\.10\.$"):
        sparsify.read(tmp_path)


def test_several_seeds_are_written_as_they_are_found(tmp_path: Path) -> None:
    names = ["h.1/seed0", "h.1/seed1", "h.2"]
    sparsify.write_set(tmp_path, {name: made("topk") for name in names}, False)
    assert list(sparsify.parts(tmp_path)) == names


def test_several_seeds_are_found(tmp_path: Path) -> None:
    for place in ("h.1/seed0", "h.1/seed1", "h.2", "not/an/sae"):
        theirs(tmp_path / place)
    (tmp_path / "not" / "an" / "sae" / "sae.safetensors").unlink()
    assert list(sparsify.parts(tmp_path)) == ["h.1/seed0", "h.1/seed1", "h.2"]


@pytest.mark.parametrize(
    "name", ["..", "a/../../b", "a/..", "a//b", "a/", "/etc", "", ".hidden", "a\\b", "a\0b", "a" * 300]
)
def test_no_hookpoint_decides_where_a_byte_is_written(name: str, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    with pytest.raises(ConfigError, match="hookpoint: expected a name that a folder can have"):
        sparsify.write_set(tmp_path / "root", {name: made("topk")}, False)
    assert list(tmp_path.rglob("*")) == [tmp_path / "root"]


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"activation": "groupmax"}, "activation groupmax takes the largest latent of each of k groups"),
        ({"activation": "relu"}, "activation: expected one of topk, groupmax, got 'relu'"),
        ({"k": 0}, "k: expected a number of at least 1, got 0"),
        ({"k": F + 1}, "k: expected a whole number from 1 to 37 as d_sae, got 38"),
        ({"k": 5.5}, "k: expected a whole number, got 5.5"),
        ({"k": True}, "k: expected a whole number, got True"),
        ({"d_in": None}, "d_in: expected a whole number, got nothing"),
        ({"d_in": 8}, r"W_dec: expected floats \[37, 8\], got float32 \[37, 7\]|b_dec: expected floats \[8\]"),
        ({"num_latents": -1}, "num_latents: expected a number of at least 0, got -1"),
        ({"num_latents": 36}, r"W_dec: expected floats \[36, 7\], got float32 \[37, 7\]"),
        ({"num_latents": 10**30}, "num_latents: expected a number of at least 0"),
        ({"transcode": "yes"}, "transcode: expected true or false, got 'yes'"),
        ({"skip_connection": True}, "it has no W_skip"),
    ],
)
def test_settings_that_do_not_fit_are_one_sentence(config: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=told) as error:
        sparsify.read(theirs(tmp_path, config))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"b_dec": None}, "it has no b_dec"),
        ({"W_skip": torch.ones(D, D)}, "W_skip is none of its tensors"),
        ({"b_dec": torch.ones(D, 1)}, r"b_dec: expected floats \[7\], got float32 \[7, 1\]"),
        ({"b_dec": torch.ones(D, dtype=torch.int64)}, r"b_dec: expected floats \[7\], got int64 \[7\]"),
        ({"W_dec": torch.ones(D, F)}, r"W_dec: expected floats \[37, 7\], got float32 \[7, 37\]"),
    ],
)
def test_tensors_that_do_not_fit_are_one_sentence(tensors: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=told):
        sparsify.read(theirs(tmp_path, **tensors))


def test_tensors_of_several_dtypes_are_read_as_the_one_that_holds_them(tmp_path: Path) -> None:
    bias = torch.randn(F)
    content = sparsify.read(theirs(tmp_path, W_dec=torch.ones(F, D, dtype=torch.bfloat16), encoder_bias=bias))
    assert {tensor.dtype for tensor in content.tensors.values()} == {torch.float32}
    assert torch.equal(content.tensors["b_enc"], bias)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"k": 1, "k": 2}', "[" * 10**5])
@pytest.mark.parametrize("name", ["cfg.json", "config.json"])
def test_damaged_json_is_one_sentence(name: str, content: str, tmp_path: Path) -> None:
    folder = theirs(tmp_path)
    (folder / name).write_text(content)
    assert sparsify.detects(folder)
    with pytest.raises(CheckpointError, match=rf"{name}.*Save the SAE again\."):
        sparsify.read(folder)


def test_files_that_are_missing_are_named(tmp_path: Path) -> None:
    (theirs(tmp_path / "a") / "sae.safetensors").unlink()
    (theirs(tmp_path / "b") / "cfg.json").unlink()
    assert sparsify.detects(tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"cannot read .*sae\.safetensors: there is no such file"):
        sparsify.read(tmp_path / "a")
    assert sparsify.detects(tmp_path / "b")
    with pytest.raises(CheckpointError, match=r"cannot read .*cfg\.json: there is no such file"):
        sparsify.read(tmp_path / "b")


def test_cut_weights_are_one_sentence(tmp_path: Path) -> None:
    path = theirs(tmp_path) / "sae.safetensors"
    whole = path.read_bytes()
    for length in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cannot read .*sae\.safetensors"):
            sparsify.read(tmp_path)


def test_other_folders_are_not_of_sparsify(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "cfg.json").write_text('{"architecture": "topk", "num_latents": 3}')
    (tmp_path / "file").write_text("")
    for place in ("a", "file", "none", "."):
        assert not sparsify.detects(tmp_path / place)
        assert sparsify.parts(tmp_path / place) == {}
