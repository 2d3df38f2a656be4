from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flashsae.errors import CheckpointError, ConfigError, FlashSAEWarning, StorageError
from flashsae.formats import dictionary_learning
from flashsae.formats.content import Content
from flashsae.formats.dictionary_learning_config import detects, parts
from helpers.dense_content import codes, made, reconstructed, same

D, F, K = 7, 37, 5
KINDS = {
    "AutoEncoderTopK": ("topk", "TopKTrainer"),
    "BatchTopKSAE": ("batch_topk", "BatchTopKTrainer"),
    "MatryoshkaBatchTopKSAE": ("matryoshka", "MatryoshkaBatchTopKTrainer"),
    "JumpReluAutoEncoder": ("jump_relu", "JumpReluTrainer"),
    "AutoEncoder": ("relu", "StandardTrainer"),
    "AutoEncoderNew": ("relu", "StandardTrainer"),
    "GatedAutoEncoder": ("gated", "GatedSAETrainer"),
}
LINEAR = {"encoder.weight": (F, D), "decoder.weight": (D, F)}
TOPK = {**LINEAR, "encoder.bias": (F,), "b_dec": (D,), "k": (), "threshold": ()}
PLAIN = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "AutoEncoderTopK": TOPK,
    "BatchTopKSAE": TOPK,
    "MatryoshkaBatchTopKSAE": {**PLAIN, "k": (), "threshold": (), "group_sizes": (3,)},
    "JumpReluAutoEncoder": {**PLAIN, "threshold": (F,)},
    "AutoEncoder": {**LINEAR, "encoder.bias": (F,), "bias": (D,)},
    "AutoEncoderNew": {**LINEAR, "encoder.bias": (F,), "decoder.bias": (D,)},
    "GatedAutoEncoder": {**LINEAR, "decoder_bias": (D,), "r_mag": (F,), "gate_bias": (F,), "mag_bias": (F,)},
}
SETTINGS = {"matryoshka": {"k": K, "prefixes": [1, 9, F]}, "jump_relu": {"target_l0": 6.0}}


def state_of(kind: str, **changed: Any) -> dict[str, torch.Tensor]:
    """Return what ae.pt of a class of theirs holds, with decoder rows of norm 1; what is None is left out."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Any] = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES[kind].items()}
    for name, dim in (("decoder.weight", 0), ("W_dec", 1)):
        if name in state:
            state[name] /= state[name].norm(dim=dim, keepdim=True)
    state |= {"threshold": state["threshold"].abs()} if "threshold" in state else {}
    state |= {"k": torch.tensor(K, dtype=torch.int32)} if "k" in state else {}
    state |= {"group_sizes": torch.tensor([1, 8, F - 9])} if "group_sizes" in state else {}
    state |= {name.replace("encoder_", "encoder."): value for name, value in changed.items()}
    return {name: value for name, value in state.items() if value is not None}


def theirs(folder: Path, kind: str, trainer: dict[str, Any] | None = None, **changed: Any) -> Path:
    """Write what a training of theirs does."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state_of(kind, **changed), folder / "ae.pt")
    settings = {
        "trainer_class": KINDS[kind][1], "dict_class": kind, "activation_dim": D, "dict_size": F, "layer": 3,
        "lm_name": "EleutherAI/pythia-70m-deduped", "submodule_name": "resid_post_layer_3", "lr": 1e-4,
        **({"k": K} if "k" in SHAPES[kind] else {}), **(trainer or {}),
    }  # fmt: skip
    settings = {name: value for name, value in settings.items() if value is not None}
    buffer = {"d_submodule": D, "io": "out", "ctx_len": 128, "device": "cuda"}
    (folder / "config.json").write_text(json.dumps({"trainer": settings, "buffer": buffer}))
    return folder


def written(folder: Path, content: Content, *, lossy: bool = False) -> list[str]:
    folder.mkdir(parents=True)
    return dictionary_learning.write(folder, content, lossy)


def state_in(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(folder / "ae.pt", weights_only=True)
    return state


def dense(kind: str, state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Return the codes of a class of theirs, by its formula."""
    s = {name: value.double() for name, value in state.items()}
    W = s["W_enc"].T if "W_enc" in s else s["encoder.weight"]
    b_dec = s.get("b_dec", s.get("bias", s.get("decoder_bias", s.get("decoder.bias"))))
    assert b_dec is not None
    raw = (x if kind in ("JumpReluAutoEncoder", "AutoEncoderNew") else x - b_dec) @ W.T
    if kind == "GatedAutoEncoder":
        return (raw * s["r_mag"].exp() + s["mag_bias"]).relu() * (raw + s["gate_bias"] > 0)
    f = (raw + (s["b_enc"] if "b_enc" in s else s["encoder.bias"])).relu()
    if kind == "AutoEncoderTopK":
        top = f.topk(K)
        return torch.zeros_like(f).scatter(1, top.indices, top.values)
    return f * (f > s["threshold"]) if "threshold" in s else f


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_theirs_are_read(kind: str, tmp_path: Path) -> None:
    folder = theirs(tmp_path / "trainer_0", kind)
    assert detects(folder)
    assert parts(folder) == {}
    content, x = dictionary_learning.read(folder), torch.randn(50, D, dtype=torch.float64)
    assert content.architecture == KINDS[kind][0]
    assert content.apply_b_dec_to_input == (kind not in ("JumpReluAutoEncoder", "AutoEncoderNew"))
    assert all(tensor.is_contiguous() for tensor in content.tensors.values())
    torch.testing.assert_close(codes(content, x), dense(kind, state_of(kind), x))
    told = {"model": "EleutherAI/pythia-70m-deduped", "hookpoint": "layers.3", "context_length": 128}
    assert {name: content.metadata[name] for name in told} == told


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "AutoEncoderNew"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_files_of_theirs_come_back_bit_for_bit(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    halves = {name: each.to(dtype) for name, each in state_of(kind).items() if each.is_floating_point()}
    folder = theirs(tmp_path / "theirs", kind, **halves)
    content = dictionary_learning.read(folder)
    assert {tensor.dtype for tensor in content.tensors.values()} == {dtype}
    assert written(tmp_path / "again", content) == []
    state, again = state_in(folder), state_in(tmp_path / "again")
    assert state.keys() == again.keys()
    assert all(torch.equal(state[name].double(), again[name].double()) for name in state)
    assert all(again[name].dtype == dtype for name in again if again[name].dim() and name != "group_sizes")
    trainer, before = (
        json.loads((each / "config.json").read_text())["trainer"] for each in (tmp_path / "again", folder)
    )
    trainer.pop("target_l0", None)
    assert trainer == before


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [(architecture, kind) for kind, (architecture, _) in KINDS.items() if kind != "AutoEncoderNew"]
    + [("hierarchical_topk", "AutoEncoderTopK"), ("matryoshka:topk", "AutoEncoderTopK"),
       ("matryoshka:jump_relu", "JumpReluAutoEncoder"), ("matryoshka:relu", "AutoEncoder")],
)  # fmt: skip
@pytest.mark.parametrize("subtracts", [True, False])
def test_layout_of_what_is_written(architecture: str, kind: str, subtracts: bool, tmp_path: Path) -> None:
    settings = SETTINGS.get(architecture, {"k": 4, "prefixes": [0.5, 1.0]} if ":topk" in architecture else {})
    metadata = {"model": "EleutherAI/pythia-70m-deduped", "hookpoint": "layers.3", "context_length": 64}
    content = made(architecture, apply_b_dec_to_input=subtracts, metadata=metadata, **settings)
    assert written(tmp_path / "sae", content) == []
    state, x = state_in(tmp_path / "sae"), torch.randn(50, D, dtype=torch.float64)
    assert type(state) is dict
    assert {name: tuple(each.shape) for name, each in state.items()} == SHAPES[kind]
    assert all(tensor.is_contiguous() for tensor in state.values())
    if "k" in state:
        assert state["k"].dtype == torch.int32
        assert state["k"].item() == content.settings["k"]
    if "group_sizes" in state:
        assert state["group_sizes"].tolist() == [1, 8, F - 9]
        assert state["group_sizes"].dtype == torch.int64
    config = json.loads((tmp_path / "sae" / "config.json").read_text())
    k = {"k": content.settings["k"]} if "k" in content.settings else {}
    target = {"target_l0": 6.0} if architecture == "jump_relu" else {}
    assert config["trainer"] == {
        "trainer_class": KINDS[kind][1], "dict_class": kind, "activation_dim": D, "dict_size": F, "layer": 3,
        "lm_name": "EleutherAI/pythia-70m-deduped", "submodule_name": "resid_post_layer_3", **k, **target,
    }  # fmt: skip
    assert config["buffer"] == {"ctx_len": 64, "d_submodule": D, "io": "out"}
    read = dictionary_learning.read(tmp_path / "sae")
    torch.testing.assert_close(codes(read, x), codes(content, x), rtol=1e-5, atol=1e-5)
    if subtracts == read.apply_b_dec_to_input:
        assert same(read, replace(content, architecture=read.architecture))
    own = {name: value for name, value in read.metadata.items() if name != "dictionary_learning"}
    assert own == metadata


@pytest.mark.parametrize(("d_in", "d_sae", "k"), [(7, 37, 1), (7, 37, 37), (1, 1, 1), (5, 3, 2)])
@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "matryoshka"])
def test_odd_shapes_come_back(architecture: str, d_in: int, d_sae: int, k: int, tmp_path: Path) -> None:
    prefixes = {"prefixes": [1.0, float(d_sae)] if d_sae > 1 else [1.0]} if architecture == "matryoshka" else {}
    content = made(architecture, d_in, d_sae, k=k, **prefixes)
    written(tmp_path / "sae", content)
    read = dictionary_learning.read(tmp_path / "sae")
    assert same(read, content)
    assert read.settings == content.settings


@pytest.mark.parametrize("architecture", ["relu", "jump_relu", "gated"])
@pytest.mark.parametrize("subtracts", [True, False])
def test_norms_of_rows_go_into_the_activations(architecture: str, subtracts: bool, tmp_path: Path) -> None:
    content = made(architecture, unit_rows=False, apply_b_dec_to_input=subtracts)
    content.tensors["W_dec"][5] = 0.0
    if architecture == "jump_relu":
        content.tensors["threshold"][5] = float("inf")
    assert written(tmp_path / "sae", content) == []
    read, x = dictionary_learning.read(tmp_path / "sae"), torch.randn(50, D, dtype=torch.float64)
    norms = content.tensors["W_dec"].double().norm(dim=1)
    assert torch.allclose(read.tensors["W_dec"].norm(dim=1), torch.ones(F), atol=1e-6)
    torch.testing.assert_close(codes(read, x), codes(content, x) * norms, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(reconstructed(read, x), reconstructed(content, x), rtol=1e-5, atol=1e-5)
    assert not any(tensor.isnan().any() for tensor in read.tensors.values())
    assert not codes(read, x)[:, 5].any()


@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "hierarchical_topk"])
def test_norms_of_rows_that_are_compared_are_kept_and_told(architecture: str, tmp_path: Path) -> None:
    content = made(architecture, unit_rows=False)
    with pytest.warns(
        FlashSAEWarning,
        match=rf"^{architecture} is written with the norms that its decoder rows have, from [\d.]+ to [\d.]+, as with "
        r"norm 1 it would select other latents: dictionary_learning takes it, and SAEBench, which refuses such rows, ",
    ):
        assert written(tmp_path / "sae", content) == []
    kept = dictionary_learning.read(tmp_path / "sae")
    assert same(kept, replace(content, architecture=kept.architecture))


def test_thresholds_below_zero_are_refused_or_told(tmp_path: Path) -> None:
    content = made("jump_relu")
    content.tensors["threshold"][3] = -0.5
    with pytest.raises(ConfigError, match=r"^dictionary_learning holds no jump_relu that lets values below 0 through"):
        written(tmp_path / "refused", content)
    assert not list((tmp_path / "refused").iterdir())
    assert written(tmp_path / "sae", content, lossy=True) == [
        "thresholds below 0 become 0, as there is a ReLU behind them"
    ]
    assert dictionary_learning.read(tmp_path / "sae").tensors["threshold"][3] == 0


@pytest.mark.parametrize("architecture", ["topk", "batch_topk"])
def test_rows_of_one_norm_are_given_another(architecture: str, tmp_path: Path) -> None:
    unit = made(architecture)
    content = replace(unit, tensors={**unit.tensors, "W_dec": unit.tensors["W_dec"] * 3})
    assert written(tmp_path / "sae", content) == []
    read, x = dictionary_learning.read(tmp_path / "sae"), torch.randn(50, D, dtype=torch.float64)
    torch.testing.assert_close(codes(read, x), codes(content, x) * 3, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(reconstructed(read, x), reconstructed(content, x), rtol=1e-5, atol=1e-5)


def test_an_autoencoder_is_read_as_their_loader_gives_it(tmp_path: Path) -> None:
    scale = torch.rand(F) + 0.5
    unit = state_of("AutoEncoder")["decoder.weight"]
    content = dictionary_learning.read(theirs(tmp_path, "AutoEncoder", **{"decoder.weight": unit * scale}))
    state, x = state_of("AutoEncoder"), torch.randn(50, D, dtype=torch.float64)
    torch.testing.assert_close(codes(content, x), dense("AutoEncoder", state, x) * scale, rtol=1e-5, atol=1e-5)
    assert torch.allclose(content.tensors["W_dec"], unit.T, atol=1e-6)
    new = dictionary_learning.read(theirs(tmp_path, "AutoEncoderNew", **{"decoder.weight": unit * scale}))
    assert torch.equal(new.tensors["W_dec"], (unit * scale).T)  # which it does to no other


@pytest.mark.parametrize("kind", ["BatchTopKSAE", "MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder"])
def test_a_threshold_that_is_not_set_lets_through_what_a_relu_does(kind: str, tmp_path: Path) -> None:
    threshold = torch.full(SHAPES[kind]["threshold"], -1.0)
    content, x = dictionary_learning.read(theirs(tmp_path, kind, threshold=threshold)), torch.randn(50, D).double()
    assert not content.tensors["threshold"].any()
    torch.testing.assert_close(codes(content, x), dense(kind, state_of(kind, threshold=threshold), x))


def test_values_at_the_threshold_are_not_active(tmp_path: Path) -> None:
    ones = {"encoder.weight": torch.ones(F, D), "encoder_bias": torch.zeros(F), "b_dec": torch.zeros(D)}
    content = dictionary_learning.read(theirs(tmp_path, "BatchTopKSAE", threshold=torch.tensor(7.0), **ones))
    assert not codes(content, torch.ones(1, D)).any()
    assert codes(content, torch.ones(1, D) * 1.001).all()


def test_the_threshold_of_topk_is_kept_for_whoever_asks_for_it(tmp_path: Path) -> None:
    folder = theirs(tmp_path / "theirs", "AutoEncoderTopK", threshold=torch.tensor(0.3))
    written(tmp_path / "again", dictionary_learning.read(folder))
    assert torch.equal(state_in(tmp_path / "again")["threshold"], torch.tensor(0.3))
    written(tmp_path / "ours", made("topk"))
    assert state_in(tmp_path / "ours")["threshold"].item() == -1.0


def test_numbers_that_old_versions_did_not_save_are_of_config_json(tmp_path: Path) -> None:
    content = dictionary_learning.read(theirs(tmp_path, "AutoEncoderTopK", k=None, threshold=None))
    assert content.settings == {"k": K}
    with pytest.raises(CheckpointError, match=r"ae\.pt has no k, and neither has config\.json"):
        dictionary_learning.read(theirs(tmp_path, "AutoEncoderTopK", {"k": None}, k=None))


def test_checkpoints_go_by_the_config_in_the_folder_above(tmp_path: Path) -> None:
    folder = theirs(tmp_path / "trainer_0", "AutoEncoderTopK")
    (folder / "checkpoints").mkdir()
    for step in (1000, 200):
        annealed = state_of("AutoEncoderTopK", k=torch.tensor(20, dtype=torch.int32))
        torch.save(annealed, folder / "checkpoints" / f"ae_{step}.pt")
    path = folder / "checkpoints" / "ae_200.pt"
    assert detects(path)
    assert dictionary_learning.read(path).settings == {"k": 20}  # as it was then
    assert list(parts(folder / "checkpoints")) == ["ae_200.pt", "ae_1000.pt"]
    assert list(parts(tmp_path)) == ["trainer_0"]
    assert dictionary_learning.read(folder / "ae.pt").settings == {"k": K}
    (folder / "checkpoints" / "ae_1.pt").write_bytes((folder / "checkpoints" / "ae_200.pt").read_bytes())
    (folder / "checkpoints" / "config.json").write_text((folder / "config.json").read_text())  # beside it comes first
    (folder / "config.json").unlink()
    assert dictionary_learning.read(folder / "checkpoints" / "ae_1.pt").settings == {"k": 20}


def test_several_are_one_folder_each(tmp_path: Path) -> None:
    model = "EleutherAI/pythia-70m-deduped"
    contents = {
        "layers.10": made("topk", metadata={"model": model, "hookpoint": "layers.10"}),
        "layers.2": made("relu", metadata={"model": model, "hookpoint": "layers.2"}),
        "layers.2.mlp:in": made("gated", metadata={"model": model, "hookpoint": "layers.2.mlp:in"}),
    }
    assert dictionary_learning.write_set(tmp_path, contents, False) == []
    found = parts(tmp_path)
    assert list(found) == [
        "layers.2.mlp@in/trainer_0", "resid_post_layer_2/trainer_0", "resid_post_layer_10/trainer_0"
    ]  # fmt: skip
    assert {dictionary_learning.read(path).metadata["hookpoint"] for path in found.values()} == set(contents)
    assert detects(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds several SAEs: .*; there are layers\.2\.mlp@in/trainer_0, resid"):
        dictionary_learning.read(tmp_path)


def test_several_at_one_submodule_are_trainers_of_it(tmp_path: Path) -> None:
    contents = {"h.1": made("topk", k=1), "h.1:out": made("topk", k=2), "h.1/seed1": made("topk", k=3)}
    dictionary_learning.write_set(tmp_path, contents, False)
    found = {name: dictionary_learning.read(path).settings["k"] for name, path in parts(tmp_path).items()}
    assert found == {"h.1/seed1/trainer_0": 3, "resid_post_layer_1/trainer_0": 1, "resid_post_layer_1/trainer_1": 2}


@pytest.mark.parametrize("name", ["..", "a/../../b", "/etc", "", ".hidden"])
def test_no_hookpoint_decides_where_a_byte_is_written(name: str, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    with pytest.raises(ConfigError, match="hookpoint: expected a name that a folder can have"):
        dictionary_learning.write_set(tmp_path / "root", {name: made("topk")}, False)
    assert list(tmp_path.rglob("*")) == [tmp_path / "root"]


@pytest.mark.parametrize(
    ("submodule", "model", "hookpoint"),
    [
        ("resid_post_layer_3", "openai-community/gpt2", "h.3"),
        ("resid_out_layer3", "EleutherAI/pythia-70m-deduped", "layers.3"),
        ("mlp_out_layer_3", "EleutherAI/pythia-70m-deduped", "layers.3.mlp"),
        ("attn_out_layer_3", "openai-community/gpt2", "h.3.attn"),
        ("layers.3.mlp:in", None, "layers.3.mlp:in"),
        ("resid_post_layer_3", "unheard of", None),
        ("something", "openai-community/gpt2", None),
        (None, "openai-community/gpt2", None),
        (7, 7, None),
    ],
)
def test_hookpoints_are_told_from_submodules(submodule: Any, model: Any, hookpoint: str | None, tmp_path: Path) -> None:
    content = dictionary_learning.read(theirs(tmp_path, "AutoEncoder", {"submodule_name": submodule, "lm_name": model}))
    assert content.metadata.get("hookpoint") == hookpoint
    assert content.metadata["dictionary_learning"]["trainer"].get("submodule_name") == submodule


def test_metadata_are_what_json_can_hold(tmp_path: Path) -> None:
    folder = theirs(
        tmp_path, "AutoEncoderTopK", {"lr": float("nan"), "steps": [float("inf")]}, threshold=torch.tensor(torch.inf)
    )
    kept = dictionary_learning.read(folder).metadata["dictionary_learning"]
    assert (kept["trainer"]["lr"], kept["trainer"]["steps"]) == (None, [None])
    assert "threshold" not in kept
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "flashsae": {"dictionary_learning": 3, "a": -float("inf")}})
    )
    read = dictionary_learning.read(folder)
    assert "dictionary_learning" not in read.metadata
    assert read.metadata["a"] is None


def test_an_sae_of_nowhere_is_written(tmp_path: Path) -> None:
    written(tmp_path / "sae", made("topk"))
    config = json.loads((tmp_path / "sae" / "config.json").read_text())
    assert (config["trainer"]["layer"], config["trainer"]["lm_name"], config["buffer"]["ctx_len"]) == (None, "", None)
    assert dictionary_learning.read(tmp_path / "sae").metadata == {}


def test_abs_topk_is_refused_or_loses_its_signs(tmp_path: Path) -> None:
    content = made("abs_topk")
    with pytest.raises(
        ConfigError, match=r"holds no abs_topk: write saelens, or give --lossy \(lossy=True\), with which"
    ):
        written(tmp_path / "refused", content)
    (told,) = written(tmp_path / "sae", content, lossy=True)
    assert told == (
        "abs_topk is TopK: the k largest of each token are active, and not the k largest by magnitude: nothing is "
        "negative"
    )
    assert same(dictionary_learning.read(tmp_path / "sae"), replace(content, architecture="topk"))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (made("transcoder"), "dictionary_learning holds no transcoder: save it in another format, such as flashsae"),
        (made("skip_transcoder"), "dictionary_learning holds no skip_transcoder"),
        (replace(made("topk"), architecture="crosscoder"), "dictionary_learning holds no crosscoder"),
        (replace(made("topk"), architecture="own"), "dictionary_learning holds no own: keep it as flashsae"),
        (
            replace(made("topk"), normalize_activations="token_norm"),
            "no place for normalize_activations, got 'token_norm'",
        ),
    ],
)
def test_what_dictionary_learning_cannot_hold_is_refused(content: Content, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=sentence):
        written(tmp_path / "sae", content, lossy=True)


@pytest.mark.parametrize(
    ("kind", "trainer", "told"),
    [
        (
            "AutoEncoder",
            {"dict_class": "IdentityDict"},
            "dict_class: expected one of Auto.* got 'IdentityDict'",
        ),
        ("AutoEncoder", {"dict_class": None}, "trainer.dict_class: expected text, got nothing"),
        ("AutoEncoder", {"dict_class": 3}, "trainer.dict_class: expected text, got 3"),
        ("AutoEncoder", {"activation_dim": 8}, "is of another SAE: it says activation_dim 8 and dict_size 37, and"),
        ("JumpReluAutoEncoder", {"dict_size": 7}, "is of another SAE: it says activation_dim 7 and dict_size 7"),
        ("AutoEncoderTopK", {"k": 6}, r"is of another SAE than config\.json: its k is 5, not 6"),
        ("AutoEncoderTopK", {"k": 0}, "trainer.k: expected a number of at least 1, got 0"),
        ("AutoEncoderTopK", {"k": "5"}, "trainer.k: expected a whole number, got '5'"),
        ("AutoEncoderTopK", {"dict_class": "JumpReluAutoEncoder"}, "it has no W_dec, W_enc, b_enc"),
        ("AutoEncoder", {"dict_class": "AutoEncoderNew"}, "it has no decoder.bias"),
        ("BatchTopKSAE", {"dict_class": "AutoEncoder"}, "it has no bias"),
    ],
)
def test_settings_that_do_not_fit_are_one_sentence(
    kind: str, trainer: dict[str, Any], told: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=told) as error:
        dictionary_learning.read(theirs(tmp_path, kind, trainer))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "changed", "told"),
    [
        ("AutoEncoderTopK", {"k": torch.tensor(F + 1)}, "k: expected a whole number from 1 to 37 as d_sae, got 38"),
        ("AutoEncoderTopK", {"k": torch.tensor([1, 2])}, "k: expected a number, got a Tensor"),
        ("AutoEncoderTopK", {"k": torch.tensor(float("nan"))}, "k: expected a whole number from 1 to 37"),
        ("AutoEncoderTopK", {"k": torch.tensor(1j)}, "k: expected a number, got a Tensor"),
        ("AutoEncoderTopK", {"more": torch.ones(2)}, "more is none of its tensors"),
        ("AutoEncoderTopK", {"more": 3}, "more is none of its tensors"),
        ("AutoEncoderTopK", {"b_dec": None}, "it has no b_dec"),
        ("AutoEncoderTopK", {"b_dec": 3.0}, r"b_dec: expected floats \[7\], got float32 \[\]"),
        (
            "AutoEncoderTopK",
            {"encoder.weight": torch.ones(3)},
            r"encoder.weight: expected floats \[any, any\], got float32 \[3\]",
        ),
        (
            "AutoEncoderTopK",
            {"encoder.weight": torch.ones(0, 7)},
            r"encoder.weight: expected floats \[any, any\], got float32 \[0, 7\]",
        ),
        ("AutoEncoderTopK", {"decoder.weight": torch.ones(F, D)}, r"decoder.weight: expected floats \[7, 37\], got"),
        (
            "AutoEncoderTopK",
            {"decoder.weight": torch.ones(D, F).long()},
            r"decoder.weight: expected floats .* got int64",
        ),
        ("BatchTopKSAE", {"threshold": None}, "it has no threshold"),
        ("BatchTopKSAE", {"threshold": torch.ones(F)}, r"threshold: expected floats \[\], got float32 \[37\]"),
        (
            "JumpReluAutoEncoder",
            {"threshold": torch.tensor(1.0)},
            r"threshold: expected floats \[37\], got float32 \[\]",
        ),
        ("MatryoshkaBatchTopKSAE", {"group_sizes": None}, "group_sizes: expected numbers of latents that sum to 37"),
        ("MatryoshkaBatchTopKSAE", {"group_sizes": torch.tensor([30, 8])}, "group_sizes: expected numbers of latents"),
        ("MatryoshkaBatchTopKSAE", {"group_sizes": torch.tensor([38, -1])}, "group_sizes: expected numbers of latents"),
        ("MatryoshkaBatchTopKSAE", {"group_sizes": torch.tensor([37.0])}, "group_sizes: expected numbers of latents"),
        ("MatryoshkaBatchTopKSAE", {"group_sizes": torch.tensor(37)}, "group_sizes: expected numbers of latents"),
        ("GatedAutoEncoder", {"r_mag": torch.ones(D)}, r"r_mag: expected floats \[37\], got float32 \[7\]"),
    ],
)
def test_tensors_that_do_not_fit_are_one_sentence(
    kind: str, changed: dict[str, Any], told: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=told) as error:
        dictionary_learning.read(theirs(tmp_path, kind, {"k": None}, **changed))
    assert "\n" not in str(error.value)


class Hostile:
    """What would make a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_hostile_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    folder = theirs(tmp_path / "trainer_0", "AutoEncoder")
    torch.save({**state_of("AutoEncoder"), "bias": Hostile(tmp_path / "ran")}, folder / "ae.pt")
    assert detects(folder)
    with pytest.raises(CheckpointError, match=r"ae\.pt is not read: it is damaged, or calls \w+\.mkdir"):
        dictionary_learning.read(folder)
    assert not (tmp_path / "ran").exists()


def test_a_backup_of_a_training_is_one_sentence(tmp_path: Path) -> None:
    folder = theirs(tmp_path, "AutoEncoder")
    torch.save({"step": 3, "ae": state_of("AutoEncoder"), "optimizer": {"state": {}}}, folder / "ae.pt")
    with pytest.raises(CheckpointError, match="'ae' in it is a dict, where tensors and numbers are expected"):
        dictionary_learning.read(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "{}", '{"trainer": 3}', '{"trainer": {}, "trainer": {}}'])
def test_a_damaged_config_is_one_sentence(content: str, tmp_path: Path) -> None:
    folder = theirs(tmp_path, "AutoEncoder")
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json.*Save the SAE again\."):
        dictionary_learning.read(folder)


def test_files_that_are_missing_are_named(tmp_path: Path) -> None:
    (theirs(tmp_path / "a", "AutoEncoder") / "ae.pt").unlink()
    (theirs(tmp_path / "b", "AutoEncoder") / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"cannot read .*ae\.pt: there is no such file"):
        dictionary_learning.read(tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"cannot read .*config\.json: there is no such file"):
        dictionary_learning.read(tmp_path / "b")


def test_other_places_are_not_of_dictionary_learning(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "a" / "ae.pt").write_text("")
    (tmp_path / "other.pt").write_text("")
    for place in ("a", "none", "other.pt", "."):
        assert not detects(tmp_path / place)
        assert parts(tmp_path / place) == {}


def test_folders_are_not_looked_into_for_ever(tmp_path: Path) -> None:
    theirs(tmp_path / "1/2/3/4/5", "AutoEncoder")
    assert parts(tmp_path) == {}
    assert list(parts(tmp_path / "1")) == ["2/3/4/5"]
    (tmp_path / "1" / "loop").symlink_to(tmp_path)
    assert list(parts(tmp_path / "1")) == ["2/3/4/5"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "sae").mkdir()
    (tmp_path / "sae" / "ae.pt").symlink_to("/dev/full")
    with pytest.raises(StorageError, match=r"could not write .*ae\.pt: No space left on device\. Free some space"):
        dictionary_learning.write(tmp_path / "sae", made("topk"), False)
