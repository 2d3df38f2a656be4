from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

import flashsae
from flashsae.errors import CheckpointError, ConfigError
from flashsae.formats import circuit_tracer
from flashsae.formats.content import Content
from flashsae.sae.saved import sae_of
from flashsae.testing import assert_as_accurate
from helpers.contents import random_content
from helpers.pages import ROOT, code_blocks

F, D, K = 19, 7, 3
KINDS = [
    "transcoder", "transcoder:relu", "transcoder:jump_relu", "transcoder:batch_topk", "transcoder:matryoshka",
    "transcoder:matryoshka:topk", "transcoder:hierarchical_topk", "skip_transcoder", "skip_transcoder:relu",
    "skip_transcoder:jump_relu", "skip_transcoder:batch_topk",
]  # fmt: skip
SETTINGS = {"relu": {}, "jump_relu": {"target_l0": 4.0}}


@pytest.fixture(autouse=True)
def _the_same_numbers_each_time() -> None:
    torch.manual_seed(0)


def transcoder(kind: str, layer: int = 0, d: int = D, **changes: Any) -> Content:
    settings = SETTINGS.get(kind.rpartition(":")[2], {"k": K})
    metadata = {"model": "gpt2", "hookpoint": f"h.{layer}.mlp:in, h.{layer}.mlp"}
    return replace(random_content(kind, d, F, seed=layer, metadata=metadata, **settings), **changes)


def strict(folder: Path) -> list[Callable[[Tensor], tuple[Tensor, Tensor]]]:
    """Read a folder as its specification says, and nothing beyond it; return what each layer does to x."""
    config = yaml.safe_load((folder / "config.yaml").read_text("utf-8"))
    assert config["model_kind"] == "transcoder_set"
    assert {"model_name", "feature_input_hook", "feature_output_hook", "scan"} <= config.keys()
    activation = config.get("activation")
    assert activation in (None, "topk", "relu")
    assert (activation == "topk") == ("k" in config)
    files = sorted(folder.glob("layer_*.safetensors"))
    assert {path.name for path in folder.iterdir()} == {"config.yaml", *(path.name for path in files)}
    return [layer(load_file(folder / f"layer_{i}.safetensors"), activation, config.get("k")) for i in range(len(files))]


def layer(w: dict[str, Tensor], activation: str | None, k: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    d_sae, d = w["W_enc"].shape
    shapes = {"W_enc": (d_sae, d), "W_dec": (d_sae, d), "b_enc": (d_sae,), "b_dec": (d,)}
    if activation is None and "activation_function.threshold" in w:
        shapes["activation_function.threshold"] = (d_sae,)
    if "W_skip" in w:
        shapes["W_skip"] = (d, d)
    assert {name: tuple(tensor.shape) for name, tensor in w.items()} == shapes

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.to(w["W_enc"].dtype)
        z = x @ w["W_enc"].T + w["b_enc"]
        if activation == "topk":
            acts = torch.zeros_like(z).scatter(-1, *(lambda top: (top.indices, top.values))(z.topk(k, dim=-1)))
        elif "activation_function.threshold" in w:
            acts = z * (z > w["activation_function.threshold"])
        else:
            acts = z.relu()
        y = acts @ w["W_dec"] + w["b_dec"]
        return acts, y + x @ w["W_skip"].T if "W_skip" in w else y

    return forward


def double(content: Content) -> Content:
    return replace(content, tensors={name: tensor.double() for name, tensor in content.tensors.items()})


@pytest.mark.parametrize("kind", KINDS)
def test_a_strict_reader_has_the_numbers_of_ours(kind: str, tmp_path: Path) -> None:
    contents = {f"h.{i}.mlp": transcoder(kind, i) for i in (1, 0, 2)}
    assert circuit_tracer.write_set(tmp_path, contents, False) == []
    x = torch.randn(23, D) * 2
    for i, theirs in enumerate(strict(tmp_path)):
        content = contents[f"h.{i}.mlp"]
        ours = sae_of(content)
        (acts, y), exact = theirs(x), sae_of(double(content))
        code = ours.encode(x)
        assert torch.equal(code.to_dense() > 0, acts > 0)
        assert_as_accurate(code.to_dense(), acts, exact.encode(x.double()).to_dense())
        assert_as_accurate(ours(x), y, exact(x.double()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["transcoder", "transcoder:relu", "skip_transcoder:jump_relu"])
def test_what_is_read_again_is_bitwise_what_was_written(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    written = transcoder(kind)
    written = replace(written, tensors={name: tensor.to(dtype) for name, tensor in written.tensors.items()})
    circuit_tracer.FORMAT.write(tmp_path, written, False)  # type: ignore[misc]
    read = circuit_tracer.read(tmp_path)
    assert (read.architecture, read.apply_b_dec_to_input) == (kind, False)
    assert read.settings.get("k") == written.settings.get("k")
    kept = {
        name for name in written.tensors if name not in ("unit", "l0_multiplier", "l0_excess")
    } & read.tensors.keys()
    assert kept >= {"W_enc_T", "b_enc", "W_dec", "b_dec"}
    assert read.tensors.keys() == kept
    for name, tensor in read.tensors.items():
        assert torch.equal(tensor, written.tensors[name])
        assert tensor.dtype == dtype
        assert tensor.is_contiguous()
    assert read.metadata["model"] == "gpt2"
    assert read.metadata["hookpoint"] == "h.0.mlp:in, h.0.mlp"


def test_a_selection_of_batches_is_written_as_its_threshold(tmp_path: Path) -> None:
    content = transcoder("transcoder:batch_topk")
    for threshold, spread in ((0.5, 0.5), (-1.0, 0.0), (0.0, 0.0)):
        folder = tmp_path / str(threshold)
        folder.mkdir()
        tensors = {**content.tensors, "threshold": torch.tensor(threshold)}
        circuit_tracer.write(folder, replace(content, tensors=tensors))
        read = circuit_tracer.read(folder / "layer_0.safetensors")
        assert read.architecture == "transcoder:jump_relu"
        assert torch.equal(read.tensors["threshold"], torch.full([F], spread))


def test_layers_of_relu_and_of_thresholds_stand_in_one_folder(tmp_path: Path) -> None:
    circuit_tracer.write_set(
        tmp_path, {"h.0.mlp": transcoder("transcoder:relu"), "h.1.mlp": transcoder("transcoder:jump_relu", 1)}
    )
    assert "activation" not in yaml.safe_load((tmp_path / "config.yaml").read_text())
    kinds = [circuit_tracer.read(tmp_path / f"layer_{i}.safetensors").architecture for i in range(2)]
    assert kinds == ["transcoder:relu", "transcoder:jump_relu"]


def test_a_b_dec_that_is_subtracted_goes_into_b_enc(tmp_path: Path) -> None:
    content = transcoder("transcoder:relu", apply_b_dec_to_input=True)
    circuit_tracer.write(tmp_path, content)
    x = torch.randn(5, D)
    w = {name: tensor.double() for name, tensor in content.tensors.items()}
    expected = ((x.double() - w["b_dec"]) @ w["W_enc_T"].T + w["b_enc"]).relu()
    torch.testing.assert_close(strict(tmp_path)[0](x)[0].double(), expected, rtol=1e-5, atol=1e-5)


def made(folder: Path, layers: int = 1, *, skip: bool = False, **config: Any) -> dict[str, Tensor]:
    """Write a folder as others do; return the tensors of its layers."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (F, D), "W_dec": (F, D), "b_enc": (F,), "b_dec": (D,), **({"W_skip": (D, D)} if skip else {})}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for i in range(layers):
        save_file(tensors, folder / f"layer_{i}.safetensors")
    told = {
        "model_name": "google/gemma-2-2b", "model_kind": "transcoder_set", "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "hook_mlp_out", "scan": "gemma", **config,
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump({name: value for name, value in told.items() if value != ""}))
    return tensors


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("activation", ["topk", "relu", None, "jumprelu"])
def test_folders_of_others_are_read(activation: str | None, skip: bool, tmp_path: Path) -> None:
    tensors = made(tmp_path, skip=skip, activation=activation, **({"k": K} if activation == "topk" else {}))
    if activation == "jumprelu":
        tensors["activation_function.threshold"] = torch.rand(F) * 2
        save_file(tensors, tmp_path / "layer_0.safetensors")
    assert circuit_tracer.detects(tmp_path)
    assert circuit_tracer.detects(tmp_path / "layer_0.safetensors")
    content = circuit_tracer.read(tmp_path)
    base = {"topk": "", "relu": ":relu", None: ":relu", "jumprelu": ":jump_relu"}[activation]
    assert content.architecture == ("skip_transcoder" if skip else "transcoder") + base
    x = torch.randn(11, D)
    acts, y = layer(tensors, None if activation == "jumprelu" else activation, K)(x)
    sae = sae_of(content)
    torch.testing.assert_close(sae.encode(x).to_dense(), acts)
    torch.testing.assert_close(sae(x), y)
    assert content.metadata == {
        "model": "google/gemma-2-2b",
        "hookpoint": "layers.0.mlp:in, layers.0.post_feedforward_layernorm",
        "circuit_tracer": {
            "layer": 0, "feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out", "scan": "gemma",
        },
    }  # fmt: skip


def test_what_equals_its_threshold_is_not_active(tmp_path: Path) -> None:
    tensors = made(tmp_path, activation="")
    whole = {name: torch.randint(-2, 3, tensor.shape).float() for name, tensor in tensors.items()}
    whole["activation_function.threshold"] = torch.randint(-1, 4, [F]).float()
    save_file(whole, tmp_path / "layer_0.safetensors")
    x = torch.randint(-2, 3, [50, D]).float()
    acts, y = layer(whole, None, 0)(x)
    assert (x @ whole["W_enc"].T + whole["b_enc"] == whole["activation_function.threshold"]).any()
    sae = sae_of(circuit_tracer.read(tmp_path))
    assert torch.equal(sae.encode(x).to_dense(), acts)
    assert torch.equal(sae(x), y)


def test_one_threshold_may_stand_for_all(tmp_path: Path) -> None:
    for shape in ([], [1]):
        tensors = {**made(tmp_path), "activation_function.threshold": torch.full(shape, 0.25)}
        save_file(tensors, tmp_path / "layer_0.safetensors")
        assert torch.equal(circuit_tracer.read(tmp_path).tensors["threshold"], torch.full([F], 0.25))


def test_a_list_of_the_files_beside_it_changes_nothing(tmp_path: Path) -> None:
    made(tmp_path, 2, transcoders=[f"hf://me/repo/layer_{i}.safetensors?revision=abc" for i in range(2)])
    assert circuit_tracer.read(tmp_path / "layer_1.safetensors").d_sae == F


def test_k_may_stand_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "layer_0.safetensors"
    save_file({**made(tmp_path, activation="topk"), "k": torch.tensor(K)}, file)
    assert circuit_tracer.read(tmp_path).settings == {"k": K}
    for k in (torch.tensor(4), torch.tensor(3.0), torch.tensor([3, 3]), torch.tensor(0)):
        save_file({**made(tmp_path, activation="topk", k=K), "k": k}, file)
        with pytest.raises(CheckpointError, match=r"layer_0\.safetensors is damaged: its k is not the one"):
            circuit_tracer.read(tmp_path)
    made(tmp_path, activation="topk")
    with pytest.raises(CheckpointError, match=r"the activation is topk, and there is no k in config\.yaml: write it"):
        circuit_tracer.read(tmp_path)


def test_layers_have_names(tmp_path: Path) -> None:
    made(tmp_path, 11)
    (tmp_path / "layer_03.safetensors").touch()
    (tmp_path / "README.md").touch()
    found = circuit_tracer.parts(tmp_path)
    assert found == {f"layer_{i}": tmp_path / f"layer_{i}.safetensors" for i in range(11)}
    assert circuit_tracer.parts(found["layer_3"]) == {}
    metadata = circuit_tracer.read(tmp_path / "layer_10.safetensors").metadata
    assert metadata["circuit_tracer"]["layer"] == 10
    assert metadata["hookpoint"] == "layers.10.mlp:in, layers.10.post_feedforward_layernorm"
    made(tmp_path, feature_input_hook="ln2.hook_normalized", feature_output_hook="hook_nowhere")
    content = circuit_tracer.read(tmp_path / "layer_3.safetensors")
    assert "hookpoint" not in content.metadata
    with pytest.raises(CheckpointError, match=r"holds 11 transcoders; name one of them: .*layer_0\.safetensors\.$"):
        circuit_tracer.read(tmp_path)
    (tmp_path / "layer_2.safetensors").unlink()
    for call in (circuit_tracer.parts, circuit_tracer.read):
        with pytest.raises(CheckpointError, match=r"has no layer_2\.safetensors, and every layer must be there"):
            call(tmp_path)
    assert circuit_tracer.read(tmp_path / "layer_3.safetensors").d_sae == F  # of one, the others need not be there


def test_layers_that_were_read_are_written_again_with_what_is_known_of_them(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    made(tmp_path / "a", 3, feature_input_hook="ln2.hook_normalized", activation="relu")
    read = {name: circuit_tracer.read(path) for name, path in circuit_tracer.parts(tmp_path / "a").items()}
    assert list(read) == ["layer_0", "layer_1", "layer_2"]
    circuit_tracer.write_set(tmp_path / "b", read)
    for name in ("config.yaml", *(f"layer_{i}.safetensors" for i in range(3))):
        if name == "config.yaml":
            assert yaml.safe_load((tmp_path / "b" / name).read_text()) == yaml.safe_load(
                (tmp_path / "a" / name).read_text()
            )
        else:
            first, second = (load_file(tmp_path / folder / name) for folder in "ab")
            assert first.keys() == second.keys()
            assert all(torch.equal(first[each], second[each]) for each in first)


@pytest.mark.parametrize(
    ("model", "hookpoint", "hooks"),
    [
        ("gpt2", "h.0.mlp:in, h.0.mlp", ("mlp.hook_in", "hook_mlp_out")),
        ("openai-community/gpt2", "h.0.mlp", ("mlp.hook_in", "hook_mlp_out")),
        ("google/gemma-2-2b", "layers.0.mlp", ("mlp.hook_in", "mlp.hook_out")),
        ("google/gemma-2-2b", "layers.0.mlp:in, layers.0.post_feedforward_layernorm", ("mlp.hook_in", "hook_mlp_out")),
        ("meta-llama/Llama-3.2-1B", "layers.0.post_attention_layernorm:in, layers.0.mlp",
         ("hook_resid_mid", "hook_mlp_out")),
        ("me/my-own", "layers.0.mlp:in, layers.0.mlp", ("mlp.hook_in", "mlp.hook_out")),
        (None, "h.0:in, h.0", ("hook_resid_pre", "hook_resid_post")),
        (None, None, ("mlp.hook_in", "hook_mlp_out")),
    ],
)  # fmt: skip
def test_places_have_the_names_of_transformer_lens(
    model: str | None, hookpoint: str | None, hooks: tuple[str, str], tmp_path: Path
) -> None:
    named = {"model": model, "hookpoint": hookpoint}
    metadata = {name: value for name, value in named.items() if value is not None}
    circuit_tracer.write(tmp_path, transcoder("transcoder", metadata=metadata))
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert (config["feature_input_hook"], config["feature_output_hook"]) == hooks
    assert config["model_name"] == (model and model.removeprefix("openai-community/"))
    assert config["k"] == K
    both = f"{hookpoint}:in, {hookpoint}"
    assert circuit_tracer.read(tmp_path).metadata.get("hookpoint") in (hookpoint, both)
    assert ("hookpoints" in config) == (model == "me/my-own" or hookpoint == "h.0:in, h.0")  # where names do not tell


def test_the_name_of_a_set_says_the_hookpoint_where_nothing_else_does(tmp_path: Path) -> None:
    contents = {f"layers.{i}.mlp": transcoder("transcoder:relu", metadata={"model": "gpt2"}) for i in range(2)}
    with pytest.raises(ConfigError, match=r"transformer-lens has no name for 'layers\.0\.nowhere' of the model gpt2"):
        circuit_tracer.write_set(tmp_path, {"layers.0.mlp:in, layers.0.nowhere": next(iter(contents.values()))})
    circuit_tracer.write_set(tmp_path, {name.replace("layers", "h"): each for name, each in contents.items()})
    hookpoints = [circuit_tracer.read(path).metadata["hookpoint"] for path in circuit_tracer.parts(tmp_path).values()]
    assert hookpoints == ["h.0.mlp:in, h.0.mlp", "h.1.mlp:in, h.1.mlp"]


def other_width(d_out: int) -> Content:
    content = transcoder("transcoder")
    tensors = {**content.tensors, "W_dec": torch.randn(F, d_out), "b_dec": torch.randn(d_out)}
    return replace(content, tensors=tensors)


def without_threshold() -> Content:
    content = transcoder("transcoder:batch_topk")
    return replace(content, tensors={name: each for name, each in content.tensors.items() if "thresh" not in name})


@pytest.mark.parametrize(
    ("contents", "sentence"),
    [
        ([random_content("topk", k=3)], "holds transcoders alone, and this is topk: save it in another format"),
        ([random_content("crosscoder:relu", sites=("a", "b"), widths=(3, 4))], "holds transcoders alone, and this is"),
        ([transcoder("transcoder:abs_topk")], "has topk, jumprelu and relu, and this is transcoder:abs_topk"),
        ([without_threshold()], "selects what exceeds a threshold, and transcoder:batch_topk came without one"),
        ([other_width(5)], "has one width for all that an SAE reads and writes, got 7, 5"),
        ([transcoder("transcoder", normalize_activations="layer_norm")], "no place for normalize_activations, got 'la"),
        ([transcoder("transcoder", 3)], "of every layer of the model, from 0 on without gaps, got those of 3: train"),
        ([transcoder("transcoder"), transcoder("transcoder", 2)], "without gaps, got those of 0, 2"),
        ([], "without gaps, got those of none"),
        ([transcoder("transcoder"), transcoder("transcoder")], "one transcoder for each layer, got two of layer 0"),
        ([transcoder("transcoder"), transcoder("transcoder", 1, d=5)], "one size for all layers, got 19 latents of "),
        ([transcoder("transcoder"), transcoder("transcoder:relu", 1)], "one k, or none with topk for all layers"),
        (
            [transcoder("transcoder"), transcoder("transcoder", 1, metadata={"model": "x", "hookpoint": "h.1.mlp"})],
            "one model for all layers, got gpt2, x",
        ),
        (
            [transcoder("transcoder", i, metadata={"hookpoint": place}) for i, place in enumerate(("h.0.mlp", "h.1"))],
            "one pair of hooks for all layers",
        ),
        (
            [transcoder("transcoder", metadata={"hookpoint": "h.0.mlp:in, h.1.mlp"})] * 2,
            "that reads and writes one layer, got 'h.0.mlp:in, h.1.mlp'",
        ),
        (
            [transcoder("transcoder", metadata={}), transcoder("transcoder", metadata={})],
            "hookpoints with the number of a layer, such as h.3.mlp, got 'part a'",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("lossy", [False, True])
def test_what_cannot_be_held_is_refused(contents: list[Content], sentence: str, lossy: bool, tmp_path: Path) -> None:
    named = {f"part {'abc'[i]}": content for i, content in enumerate(contents)}
    if "two of layer 0" in sentence or "one layer" in sentence:
        named = {"h.0.mlp": contents[0], **({"g.0.mlp": contents[1]} if "two of" in sentence else {})}
    with pytest.raises(ConfigError, match=rf"^circuit_tracer.*{sentence}.*\.$") as error:
        circuit_tracer.write_set(tmp_path, named, lossy)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            {"model_kind": "cross_layer_transcoder"},
            "holds a cross-layer transcoder, which FlashSAE has no architecture",
        ),
        ({"model_kind": "something"}, "expected transcoder_set as model_kind, got 'something'"),
        ({"model_kind": ""}, "model_kind: expected text, got nothing"),
        ({"feature_input_hook": ""}, "feature_input_hook: expected text, got nothing"),
        ({"feature_output_hook": ["a"]}, "feature_output_hook: expected text"),
        ({"transcoders": ["hf://google/gemma-scope-2b-pt-transcoders/a.npz"]}, "lists transcoders at other places"),
        ({"transcoders": ["/etc/passwd", "../../x"]}, "lists transcoders at other places"),
        ({"transcoders": ["hf://a/b/layer_1.safetensors"]}, "lists transcoders at other places"),
        ({"transcoders": 3}, "transcoders: expected a list"),
        ({"activation": "gelu"}, "expected topk, relu or jumprelu as the activation in config.yaml, got 'gelu'"),
        ({"activation": "jumprelu"}, "the activation in config.yaml is jumprelu, and there are no thresholds"),
        ({"activation": "topk", "k": 0}, "k: expected a number of at least 1"),
        ({"activation": "topk", "k": 2.5}, "k: expected a whole number"),
        ({"activation": "topk", "k": 20}, "has 19 latents, and k is 20 in config.yaml"),
        ({"scan": {"a": 1}}, "scan: expected"),
    ],
)
def test_a_description_that_does_not_fit_is_one_sentence(config: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    made(tmp_path, **config)
    with pytest.raises(CheckpointError, match=sentence) as error:
        circuit_tracer.read(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"b_dec": None}, "it has no b_dec"),
        ({"threshold": torch.zeros(F)}, "threshold is none of its tensors"),
        ({"W_enc": torch.zeros(D, F)}, "W_dec: expected floats"),
        ({"W_enc": torch.zeros(F, D, 1)}, "W_enc: expected floats"),
        ({"W_enc": torch.zeros(0, D)}, "W_enc: expected floats"),
        ({"W_skip": torch.zeros(D, F)}, r"W_skip: expected floats \[7, 7\], got float32 \[7, 19\]"),
        ({"W_dec": torch.zeros(F, D, dtype=torch.int32)}, "W_dec: expected floats"),
        ({"activation_function.threshold": torch.zeros(F - 1)}, "threshold: expected floats"),
        ({"activation_function.threshold": torch.full([F], float("nan"))}, "a threshold is no number"),
    ],
)
def test_tensors_that_do_not_fit_are_one_sentence(
    changes: dict[str, Tensor | None], sentence: str, tmp_path: Path
) -> None:
    tensors = {**made(tmp_path), **changes}
    save_file({name: each for name, each in tensors.items() if each is not None}, tmp_path / "layer_0.safetensors")
    with pytest.raises(CheckpointError, match=rf"layer_0\.safetensors is damaged.*{sentence}.*Fetch it again\.$"):
        circuit_tracer.read(tmp_path)


@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_thresholds_beside_another_activation_are_refused(activation: str, tmp_path: Path) -> None:
    tensors = {**made(tmp_path, activation=activation, k=K), "activation_function.threshold": torch.ones(F)}
    save_file(tensors, tmp_path / "layer_0.safetensors")
    with pytest.raises(CheckpointError, match=f"is {activation}, and there are thresholds"):
        circuit_tracer.read(tmp_path)


def test_damage_is_one_sentence(tmp_path: Path) -> None:
    made(tmp_path)
    config, weights = tmp_path / "config.yaml", tmp_path / "layer_0.safetensors"
    for path in (weights, config):
        whole = path.read_bytes()
        for size in (0, 1, 9, len(whole) // 3, len(whole) // 2, len(whole) - 1 if path == weights else 40):
            path.write_bytes(whole[:size])
            with pytest.raises(CheckpointError, match=path.name):
                circuit_tracer.read(tmp_path)
        path.write_bytes(whole)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"has no layer_0\.safetensors"):
        circuit_tracer.read(tmp_path)
    weights.mkdir()
    with pytest.raises(CheckpointError, match="it is a folder, where a file is expected"):
        circuit_tracer.read(tmp_path)


def test_no_name_in_a_file_leads_anywhere(tmp_path: Path) -> None:
    folder, outside = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    outside.mkdir()
    names = {"scan": "../../x", "feature_input_hook": "../../a", "feature_output_hook": "/etc", "model_name": "../m"}
    made(folder, 2, **names, hookpoints=["../../h.0", "/h.1"])
    found = circuit_tracer.parts(folder)
    assert sorted(path.parent for path in found.values()) == [folder, folder]
    contents = {name: circuit_tracer.read(path) for name, path in found.items()}
    circuit_tracer.write_set(outside, contents)
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(
        ["in", "out", *["config.yaml", "layer_0.safetensors", "layer_1.safetensors"] * 2]
    )


def test_other_folders_are_not_taken_for_it(tmp_path: Path) -> None:
    assert not circuit_tracer.detects(tmp_path)
    assert not circuit_tracer.detects(tmp_path / "nothing")
    (tmp_path / "config.yaml").write_text("model: x\n")
    assert not circuit_tracer.detects(tmp_path)
    (tmp_path / "layer_0.safetensors").touch()
    assert not circuit_tracer.detects(tmp_path / "layer_0.safetensors")
    (tmp_path / "config.yaml").write_bytes(b"\xff\x00")
    assert not circuit_tracer.detects(tmp_path)
    (tmp_path / "config.yaml").write_text('{"model_kind": "cross_layer_transcoder"}')
    assert circuit_tracer.detects(tmp_path)


def test_a_layer_is_loaded_as_people_name_it(tmp_path: Path) -> None:
    made(tmp_path, 2)
    x = torch.randn(3, D)
    for place in ("layer_1", "layer_1.safetensors"):
        assert flashsae.load(tmp_path / place)(x).shape == (3, D)
    with pytest.raises(CheckpointError, match="holds 2 SAEs: layer_0, layer_1"):
        flashsae.load(tmp_path)


def test_what_the_page_says_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "transcoders").mkdir()
    made(tmp_path / "transcoders", 4)
    (code,) = [code for code in code_blocks(ROOT / "docs" / "interop.md") if "transcoders/layer_3" in code]
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["transcoder"].config.d_in == D
