from __future__ import annotations

import itertools
import json
import math
import pickle
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import flashsae
from flashsae.errors import CheckpointError, ConfigError, FlashSAEWarning
from flashsae.formats import llamascopium
from flashsae.formats.content import Content
from flashsae.formats.llamascopium_writing import _expansion
from flashsae.sae.saved import content_of, sae_of
from flashsae.testing import assert_as_accurate
from helpers.contents import random_content
from helpers.pages import ROOT, code_blocks

D, EXPANSION, F, K = 8, 2.5, 20, 3
IN, OUT = "blocks.3.mlp.hook_in", "blocks.3.hook_mlp_out"
THRESHOLD, NORM = "activation_function.log_jumprelu_threshold", "dataset_average_activation_norm."


@pytest.fixture(autouse=True)
def _the_same_numbers_each_time() -> None:
    torch.manual_seed(0)


def made(folder: Path, *, sites: int = 0, hooks: tuple[str, str] = (IN, IN), **settings: Any) -> dict[str, Tensor]:
    """Write a folder as llamascopium does, with random parameters; return its tensors."""
    generator = torch.Generator().manual_seed(0)
    head = (sites,) if sites else ()
    shapes = {"W_E": (*head, D, F), "b_E": (*head, F), "W_D": (*head, F, D), "b_D": (*head, D)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if settings.get("act_fn") == "jumprelu":
        tensors[THRESHOLD] = torch.randn(F, generator=generator) / 2
    if not settings.get("use_decoder_bias", True):
        del tensors["b_D"]
    names = [f"blocks.{i}.hook_resid_post" for i in range(sites)] if sites else list(hooks)
    for place, name in enumerate(names):
        tensors.setdefault(NORM + name, torch.tensor(7.3 + place))
    places = {"hook_points": names} if sites else {"hook_point_in": hooks[0], "hook_point_out": hooks[1]}
    config = {
        "sae_type": "crosscoder" if sites else "sae", "d_model": D, "expansion_factor": EXPANSION, "top_k": K,
        "norm_activation": "inference", "use_triton_kernel": False, "use_glu_encoder": False, **places, **settings,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=4))
    save_file(tensors, folder / "sae_weights.safetensors")
    return tensors


def theirs(folder: Path) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return what a folder does, as it is specified: x and what is to be reconstructed -> codes, reconstruction."""
    config = json.loads((folder / "config.json").read_text())
    w = load_file(folder / "sae_weights.safetensors")
    d, hooks = config["d_model"], [config["hook_point_in"], config["hook_point_out"]]
    act_fn, is_weighted = config["act_fn"], config["sparsity_include_decoder_norm"]
    b_D = w.get("b_D", torch.zeros(d))
    assert w["W_E"].shape == (d, int(d * config["expansion_factor"]))

    def scale(x: Tensor, hook: str) -> Tensor:
        kinds = {
            "inference": lambda: torch.ones(()),
            "token-wise": lambda: math.sqrt(d) / x.norm(dim=-1, keepdim=True),
            "dataset-wise": lambda: math.sqrt(d) / w[NORM + hook],
        }
        return kinds[config["norm_activation"]]()

    def forward(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        norm = w["W_D"].norm(dim=1) if is_weighted else torch.ones(())
        z = (x * scale(x, hooks[0]) @ w["W_E"] + w["b_E"]) * norm
        acts = z * (z > w[THRESHOLD].float().exp()) if act_fn == "jumprelu" else z.relu()
        if act_fn == "topk":
            acts = torch.zeros_like(z).scatter(1, *(lambda top: (top.indices, top.values))(acts.topk(config["top_k"])))
        if act_fn == "batchtopk":
            least = acts.flatten().topk(config["top_k"] * len(x)).values[-1]
            acts = acts * (acts >= least)
        acts = acts / norm
        return acts, (acts @ w["W_D"] + b_D) / scale(y, hooks[1])

    return forward


def read(folder: Path) -> Content:
    config = json.loads((folder / "config.json").read_text())
    is_batch = config["act_fn"] == "batchtopk"
    with pytest.warns(FlashSAEWarning, match="selects the largest of each batch") if is_batch else nullcontext():
        return llamascopium.read(folder)


@pytest.mark.parametrize("act_fn", ["relu", "jumprelu", "topk", "batchtopk"])
@pytest.mark.parametrize("norm_activation", ["inference", "dataset-wise", "token-wise"])
def test_what_is_read_does_what_is_specified(act_fn: str, norm_activation: str, tmp_path: Path) -> None:
    for is_weighted, has_bias, hooks in itertools.product((True, False), (True, False), ((IN, IN), (IN, OUT))):
        if hooks == (IN, OUT) and norm_activation == "token-wise":
            continue
        made(
            tmp_path, hooks=hooks, act_fn=act_fn, norm_activation=norm_activation, use_decoder_bias=has_bias,
            sparsity_include_decoder_norm=is_weighted,
        )  # fmt: skip
        content = read(tmp_path)
        sae = sae_of(content).train(act_fn == "batchtopk")
        x, y = torch.randn(2, 64, D) * 2
        y = x if hooks[0] == hooks[1] else y
        acts, x_hat = theirs(tmp_path)(x, y)
        code = sae.encode(x).to_dense()
        assert torch.equal(code > 0, acts > 0)
        torch.testing.assert_close(sae(x), x_hat, rtol=2e-5, atol=2e-5)
        norm = content.tensors["W_dec"].new_ones(())
        if is_weighted and "topk" in act_fn:
            norm = load_file(tmp_path / "sae_weights.safetensors")["W_D"].norm(dim=1)
        unit = 7.3 / math.sqrt(D) if norm_activation == "dataset-wise" else 1.0
        torch.testing.assert_close(code, acts * norm * unit, rtol=2e-5, atol=2e-5)
        base = {"relu": "relu", "jumprelu": "jump_relu", "topk": "topk", "batchtopk": "batch_topk"}[act_fn]
        assert content.architecture.removeprefix("transcoder").removeprefix(":") in (base, "")
        assert content.architecture.startswith("transcoder") == (hooks == (IN, OUT))
        assert not content.apply_b_dec_to_input


def test_what_is_not_folded_is_bitwise_what_the_file_holds(tmp_path: Path) -> None:
    tensors = made(tmp_path, act_fn="topk", sparsity_include_decoder_norm=False)
    content = llamascopium.read(tmp_path)
    for name, there in (("W_enc_T", tensors["W_E"].T), ("b_enc", tensors["b_E"]), ("W_dec", tensors["W_D"])):
        assert torch.equal(content.tensors[name], there)
        assert content.tensors[name].is_contiguous()
    made(tmp_path, act_fn="relu")  # which norms of decoders change nothing of
    assert torch.equal(llamascopium.read(tmp_path).tensors["W_dec"], tensors["W_D"])


def test_latents_of_norm_0_are_never_active(tmp_path: Path) -> None:
    for act_fn in ("topk", "jumprelu"):
        tensors = made(tmp_path, act_fn=act_fn)
        tensors["W_D"][4] = 0
        tensors["b_E"][4] = 100
        if act_fn == "jumprelu":
            tensors[THRESHOLD][4] = -math.inf
        save_file(tensors, tmp_path / "sae_weights.safetensors")
        code = sae_of(llamascopium.read(tmp_path)).encode(torch.randn(9, D)).to_dense()
        assert not code[:, 4].any()
        assert code.isfinite().all()


@pytest.mark.parametrize("act_fn", ["relu", "jumprelu", "topk", "batchtopk"])
def test_one_selection_does_for_a_crosscoder_whose_norms_are_alike(act_fn: str, tmp_path: Path) -> None:
    sites = 3
    for norm_activation in ("inference", "dataset-wise", "token-wise"):
        tensors = made(tmp_path, sites=sites, act_fn=act_fn, norm_activation=norm_activation)
        if act_fn != "relu":
            lengths = torch.rand(F) + 0.5
            tensors["W_D"] *= (lengths / tensors["W_D"].norm(dim=2))[..., None]
            save_file(tensors, tmp_path / "sae_weights.safetensors")
        content = read(tmp_path)
        sae = sae_of(content).train(act_fn == "batchtopk")
        x = torch.randn(33, sites, D)
        scales = {
            "inference": torch.ones(sites, 1), "token-wise": math.sqrt(D) / x.norm(dim=2, keepdim=True),
            "dataset-wise": math.sqrt(D) / torch.tensor([7.3, 8.3, 9.3])[:, None],
        }[norm_activation]  # fmt: skip
        z = torch.einsum("bsd,sdf->bf", x * scales, tensors["W_E"]) + tensors["b_E"].sum(0)
        per_site = (z[:, None] * (n := tensors["W_D"].norm(dim=2))).relu()
        if act_fn == "jumprelu":
            per_site = per_site * (per_site > tensors[THRESHOLD].exp())
        if act_fn == "topk":
            per_site = per_site * (per_site >= per_site.topk(K).values[..., -1:])
        if act_fn == "batchtopk":
            per_site = per_site * (per_site >= per_site[:, 0].flatten().topk(K * 33).values[-1] * (1 - 1e-6))
        acts = per_site / n
        x_hat = (torch.einsum("bsf,sfd->bsd", acts, tensors["W_D"]) + tensors["b_D"]) / scales
        code = sae.encode(x.flatten(1)).to_dense()
        torch.testing.assert_close(code, acts[:, 0], rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(sae(x.flatten(1)), x_hat.flatten(1), rtol=2e-5, atol=5e-5)
        assert list(sae.config.columns) == [f"blocks.{i}.hook_resid_post" for i in range(sites)]


@pytest.mark.parametrize("act_fn", ["jumprelu", "topk", "batchtopk"])
def test_a_crosscoder_that_selects_at_each_site_is_refused(act_fn: str, tmp_path: Path) -> None:
    made(tmp_path, sites=2, act_fn=act_fn)
    with pytest.raises(CheckpointError, match=f"a crosscoder of {act_fn} selects latents at each hook point by itself"):
        llamascopium.read(tmp_path)


def test_a_crosscoder_of_one_site_is_an_autoencoder(tmp_path: Path) -> None:
    made(tmp_path, sites=1, act_fn="topk")
    content = llamascopium.read(tmp_path)
    assert content.architecture == "topk"
    assert content.tensors["W_enc_T"].shape == (F, D)
    llamascopium.write(tmp_path, content)
    again = llamascopium.read(tmp_path)
    assert torch.equal(again.tensors["W_enc_T"], content.tensors["W_enc_T"])


KINDS = {
    "topk": "topk", "matryoshka:topk": "topk", "hierarchical_topk": "topk", "relu": "relu", "jump_relu": "jumprelu",
    "batch_topk": "jumprelu", "matryoshka": "jumprelu", "transcoder": "topk", "transcoder:relu": "relu",
    "transcoder:jump_relu": "jumprelu", "transcoder:batch_topk": "jumprelu",
}  # fmt: skip


def ours(kind: str, d: int = D, d_sae: int = F, **metadata: Any) -> Content:
    last = kind.rpartition(":")[2]
    settings = {"relu": {}, "jump_relu": {"target_l0": 4.0}}.get(last, {"k": K})
    if kind.startswith("crosscoder"):
        settings = {**settings, "sites": ("h.1", "h.2"), "widths": (d // 2, d // 2)}
    return random_content(kind, d, d_sae, metadata=metadata, **settings)


def double(content: Content) -> Content:
    return replace(content, tensors={name: tensor.double() for name, tensor in content.tensors.items()})


@pytest.mark.parametrize("normalize", ["none", "token_norm"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_what_is_written_does_what_ours_does(kind: str, normalize: str, tmp_path: Path) -> None:
    content = replace(ours(kind, model="gpt2"), normalize_activations=normalize)
    if kind.startswith("transcoder") and normalize != "none":
        with pytest.raises(ConfigError, match="no place for normalize_activations, got 'token_norm'"):
            llamascopium.write(tmp_path, content)
        return
    assert llamascopium.FORMAT.write(tmp_path, content, False) == []  # type: ignore[misc]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["act_fn"] == KINDS[kind]
    assert config["norm_activation"] == ("inference" if normalize == "none" else "token-wise")
    assert config["sparsity_include_decoder_norm"] is False
    assert load_file(tmp_path / "sae_weights.safetensors").keys() == (
        {"W_E", "b_E", "W_D", "b_D"}
        | ({THRESHOLD} if KINDS[kind] == "jumprelu" else set())
        | {NORM + config["hook_point_in"], NORM + config["hook_point_out"]}
    )
    x = torch.randn(50, D) * 2
    (acts, x_hat), sae = theirs(tmp_path)(x, x), sae_of(content)
    assert torch.equal(sae.encode(x).to_dense() > 0, acts > 0)
    torch.testing.assert_close(acts, sae.encode(x).to_dense(), rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(x_hat, sae(x), rtol=1e-4, atol=5e-5)
    again = sae_of(llamascopium.read(tmp_path))  # and back
    if not content.apply_b_dec_to_input:
        assert torch.equal(again.encode(x).to_dense(), sae.encode(x).to_dense())
    exact = sae_of(double(content))
    assert_as_accurate(again(x), x_hat, exact(x.double()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["topk", "jump_relu", "relu", "transcoder", "crosscoder:relu"])
def test_what_is_read_again_is_bitwise_what_was_written(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    content = ours(kind)
    tensors = {name: tensor.to(dtype) for name, tensor in content.tensors.items()}
    content = replace(content, tensors=tensors, apply_b_dec_to_input=False)
    llamascopium.write(tmp_path, content)
    found = llamascopium.read(tmp_path)
    assert found.architecture == kind
    assert found.settings.get("k") == content.settings.get("k")
    for name, tensor in found.tensors.items():
        assert tensor.dtype == dtype
        if dtype == torch.float64 and name == "threshold":
            torch.testing.assert_close(tensor, tensors[name], rtol=1e-14, atol=0)
        else:
            assert torch.equal(tensor, tensors[name])
    flashsae.load(tmp_path)


@pytest.mark.parametrize("kind", ["topk", "jump_relu", "batch_topk"])
def test_a_fold_of_half_precision_is_not_rounded_to_it(kind: str, tmp_path: Path) -> None:
    content = ours(kind)
    halves = {name: tensor.bfloat16() for name, tensor in content.tensors.items()}
    llamascopium.write(tmp_path, replace(content, tensors=halves))
    assert load_file(tmp_path / "sae_weights.safetensors")["b_E"].dtype == torch.float32
    x = torch.randn(50, D) * 2
    sae = sae_of(replace(content, tensors={name: tensor.float() for name, tensor in halves.items()}))
    torch.testing.assert_close(theirs(tmp_path)(x, x)[1], sae(x), rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("settings", [
    {"act_fn": "topk"}, {"act_fn": "relu", "norm_activation": "dataset-wise"}, {"act_fn": "jumprelu"},
    {"act_fn": "jumprelu", "sparsity_include_decoder_norm": False},
])  # fmt: skip
def test_what_is_folded_of_half_precision_becomes_float32(settings: dict[str, Any], tmp_path: Path) -> None:
    settings = {"norm_activation": "inference", "sparsity_include_decoder_norm": True, **settings}
    halves = {name: tensor.bfloat16() for name, tensor in made(tmp_path, **settings).items()}
    file = tmp_path / "sae_weights.safetensors"
    save_file(halves, file)
    sae = sae_of(llamascopium.read(tmp_path))
    assert sae.W_dec.dtype == torch.float32
    save_file({name: tensor.float() for name, tensor in halves.items()}, file)
    x = torch.randn(50, D) * 2
    torch.testing.assert_close(theirs(tmp_path)(x, x)[1], sae(x), rtol=1e-4, atol=5e-5)


def test_thresholds_at_the_ends_are_kept(tmp_path: Path) -> None:
    content = ours("jump_relu")
    threshold = torch.logspace(-40, 3, F)
    threshold[0], threshold[1] = 0, math.inf
    llamascopium.write(tmp_path, replace(content, tensors={**content.tensors, "threshold": threshold}))
    assert torch.equal(llamascopium.read(tmp_path).tensors["threshold"], threshold)


def test_what_a_batch_selects_stays_so_where_there_is_no_threshold(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    made(tmp_path / "a", act_fn="batchtopk", sparsity_include_decoder_norm=False)
    content = read(tmp_path / "a")
    through = content_of(sae_of(content), content.metadata)
    llamascopium.write(tmp_path / "b", through)
    assert json.loads((tmp_path / "b" / "config.json").read_text())["act_fn"] == "batchtopk"
    assert read(tmp_path / "b").settings["k"] == K
    trained = {**through.tensors, "threshold": torch.tensor(0.5), "threshold_steps": torch.tensor(9.0)}
    llamascopium.write(tmp_path / "b", replace(through, tensors=trained))
    assert torch.equal(llamascopium.read(tmp_path / "b").tensors["threshold"], torch.full([F], 0.5))


@pytest.mark.parametrize("kind", ["relu", "jump_relu", "topk", "batch_topk"])
def test_crosscoders_are_written_where_one_selection_does(kind: str, tmp_path: Path) -> None:
    name = "crosscoder" if kind == "batch_topk" else f"crosscoder:{kind}"
    content = ours(name, 2 * D, F, model="gpt2", hookpoint="h.1, h.2")
    if kind != "relu":
        with pytest.raises(ConfigError, match="selects latents at each hook point by itself"):
            llamascopium.write(tmp_path, content)
    W_dec, scale = content.tensors["W_dec"].view(F, 2, D), torch.tensor([0.5, 2.0]).repeat_interleave(D)
    lengths = torch.rand(F) + 0.5
    alike = (W_dec * (lengths[:, None] / W_dec.norm(dim=2))[..., None]).flatten(1)
    content = replace(content, tensors={**content.tensors, "W_dec": alike, "site_scale": scale})
    llamascopium.write(tmp_path, content)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["hook_points"] == ["blocks.1.hook_resid_post", "blocks.2.hook_resid_post"]
    found = llamascopium.read(tmp_path)
    x = torch.randn(40, 2 * D)
    sae, again = sae_of(content), sae_of(found)
    assert list(again.config.columns) == ["h.1", "h.2"]
    assert found.metadata["hookpoint"] == "h.1, h.2"
    assert torch.equal(sae.encode(x).to_dense() > 0, again.encode(x).to_dense() > 0)
    torch.testing.assert_close(again(x), sae(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("d", "d_sae"), [(49, 49 * 3), (3, 7), (7, 1), (768, 24577), (1, 5), (4095, 131071), (10, 3)])
def test_the_number_of_latents_is_that_which_floats_make_of_the_factor(d: int, d_sae: int) -> None:
    assert int(d * _expansion(d, d_sae)) == d_sae


def test_every_number_of_latents_has_a_factor() -> None:
    for d in range(1, 60):
        for d_sae in range(1, 200):
            assert int(d * _expansion(d, d_sae)) == d_sae
    assert any(int(d * (d_sae / d)) != d_sae for d in range(1, 60) for d_sae in range(1, 200))


@pytest.mark.parametrize(
    ("metadata", "kind", "hooks"),
    [
        ({"model": "gpt2", "hookpoint": "h.6"}, "topk", ["blocks.6.hook_resid_post"] * 2),
        ({"model": "gpt2", "hookpoint": "h.6.mlp:in, h.6.mlp"}, "transcoder",
         ["blocks.6.mlp.hook_in", "blocks.6.hook_mlp_out"]),
        ({"model": "gpt2", "hookpoint": "h.6.mlp"}, "transcoder", ["blocks.6.mlp.hook_in", "blocks.6.hook_mlp_out"]),
        ({"hookpoint": "encoder.6"}, "topk", ["encoder.6"] * 2),
        ({}, "topk", ["activations"] * 2),
        ({}, "transcoder", ["in", "out"]),
        ({"llamascopium": {"hook_point_in": "L3M", "hook_point_out": "L3M"}}, "topk", ["L3M"] * 2),
        ({"llamascopium": {"hook_point_in": "L3M", "hook_point_out": "L3M"}}, "transcoder", ["in", "out"]),
        ({"llamascopium": "?"}, "topk", ["activations"] * 2),
    ],
)  # fmt: skip
def test_places_have_the_names_of_transformer_lens(
    metadata: dict[str, Any], kind: str, hooks: list[str], tmp_path: Path
) -> None:
    llamascopium.write(tmp_path, ours(kind, **metadata))
    config = json.loads((tmp_path / "config.json").read_text())
    assert [config["hook_point_in"], config["hook_point_out"]] == hooks
    again = llamascopium.read(tmp_path).metadata
    assert {name: again[name] for name in metadata if name != "llamascopium"} == {
        name: value for name, value in metadata.items() if name != "llamascopium"
    }
    assert again["llamascopium"]["hook_point_in"] == hooks[0]


def negative() -> Content:
    content = ours("jump_relu")
    return replace(content, tensors={**content.tensors, "threshold": torch.full([F], -0.1)})


def odd_widths() -> Content:
    return random_content("crosscoder:relu", 7, F, sites=("a", "b"), widths=(3, 4))


def changed(content: Content, **tensors: Tensor) -> Content:
    return replace(content, tensors={**content.tensors, **tensors})


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (ours("abs_topk"), "topk, jumprelu and relu, and this is abs_topk"),
        (random_content("gated", D, F), "topk, jumprelu and relu, and this is gated"),
        (ours("skip_transcoder"), "and this is skip_transcoder"),
        (ours("transcoder:abs_topk"), "and this is transcoder:abs_topk"),
        (
            replace(ours("topk"), normalize_activations="layer_norm"),
            "no place for normalize_activations, got 'layer_norm'",
        ),
        (negative(), "has logarithms of thresholds, and here is one below 0"),
        (changed(ours("jump_relu"), threshold=torch.full([F], math.nan)), "has logarithms of thresholds"),
        (
            replace(
                content := ours("batch_topk"),
                tensors={name: tensor for name, tensor in content.tensors.items() if "threshold" not in name},
            ),
            "selects what exceeds a threshold, and batch_topk came without one: train it",
        ),
        (odd_widths(), "one width for all that an SAE reads and writes, got 3, 4"),
        (
            changed(ours("transcoder"), W_dec=torch.randn(F, 5), b_dec=torch.randn(5)),
            "one width for all that an SAE reads and writes, got 8, 5",
        ),
        (changed(ours("crosscoder:relu"), W_dec=torch.eye(F)[:, :D]), "of a crosscoder by the norms of their decoders"),
    ],
)
@pytest.mark.parametrize("lossy", [False, True])
def test_what_cannot_be_held_is_refused(content: Content, sentence: str, lossy: bool, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=rf"^llamascopium .*{sentence}.*save it in another format, such as flashsae\.$"
    ):
        llamascopium.write(tmp_path, content, lossy)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        *(({"sae_type": kind}, f"describes a {kind}, which FlashSAE has no architecture for") for kind in
          ("clt", "lorsa", "molt")),
        ({"sae_type": "other"}, "sae_type: expected one of sae, crosscoder"),
        ({"act_fn": "layertopk"}, "act_fn: expected one of relu, jumprelu, topk, batchtopk"),
        ({"act_fn": 3}, "act_fn: expected"),
        ({"norm_activation": "batch-wise"}, "norm_activation: batch-wise, which makes codes depend on the batch"),
        ({"norm_activation": "token-wise", "hook_point_out": OUT}, "token-wise of a transcoder, whose output has"),
        ({"norm_activation": "none"}, "norm_activation: expected one of"),
        ({"use_glu_encoder": True}, "use_glu_encoder: an encoder with gates of its own"),
        ({"hook_point_out": None}, "expected the names of its hook points"),
        ({"hook_point_in": 5}, "hook_point_in: expected text"),
        ({"d_model": 0}, "d_model: expected a number of at least 1"),
        ({"d_model": 9}, r"W_D: expected floats \[22, 9\], got float32 \[20, 8\]"),
        ({"expansion_factor": 3.0}, r"W_D: expected floats \[24, 8\]"),
        ({"expansion_factor": 0.01}, "0 latents, from d_model and expansion_factor"),
        ({"expansion_factor": 1e300}, "latents, from d_model and expansion_factor"),
        ({"expansion_factor": math.nan}, "expansion_factor: expected a number"),
        ({"act_fn": "topk", "top_k": 0}, "and top_k 0 do not fit each other"),
        ({"act_fn": "batchtopk", "top_k": 21}, "20 latents, from d_model and expansion_factor, and top_k 21 do not"),
        ({"act_fn": "topk", "top_k": 2.5}, "top_k: expected a whole number"),
        ({"metadata": []}, "metadata: expected an object"),
    ],
)  # fmt: skip
def test_a_description_that_does_not_fit_is_one_sentence(
    settings: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    made(tmp_path, **settings)
    with pytest.raises(CheckpointError, match=sentence) as error:
        llamascopium.read(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [{"hook_points": []}, {"hook_points": None}, {"hook_points": ["a", "a"]}, {"hook_points": "ab"},
     {"use_decoder_bias": False}, {"sparsity_include_decoder_norm": False}, {"hook_points": ["a"]}],
)  # fmt: skip
def test_descriptions_of_crosscoders_are_looked_at(settings: dict[str, Any], tmp_path: Path) -> None:
    made(tmp_path, sites=2, **settings)
    with pytest.raises(CheckpointError, match=r"hook_?\s?points|crosscoder without|W_D: expected floats \[1, 20, 8\]"):
        llamascopium.read(tmp_path)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"b_D": None}, "it has no b_D"),
        ({"W_E_glu": torch.zeros(D, F)}, "W_E_glu is none of its tensors"),
        ({THRESHOLD: torch.zeros(F)}, "log_jumprelu_threshold is none of its tensors"),
        ({"W_D": torch.zeros(D, F)}, r"W_D: expected floats \[20, 8\], got float32 \[8, 20\]"),
        ({"b_E": torch.zeros(F, dtype=torch.int64)}, "b_E: expected floats"),
        (
            {NORM + IN: None},
            "norm_activation is dataset-wise, and there is no positive dataset_average_activation_norm",
        ),
        *(({NORM + IN: torch.tensor(value)}, "there is no positive") for value in (0.0, -1.0, math.nan, math.inf)),
        ({NORM + IN: torch.ones(2)}, "there is no positive"),
    ],
)
def test_tensors_that_do_not_fit_are_one_sentence(
    changes: dict[str, Tensor | None], sentence: str, tmp_path: Path
) -> None:
    tensors = {**made(tmp_path, norm_activation="dataset-wise"), **changes}
    save_file({name: each for name, each in tensors.items() if each is not None}, tmp_path / "sae_weights.safetensors")
    with pytest.raises(CheckpointError, match=rf"sae_weights\.safetensors.*{sentence}") as error:
        llamascopium.read(tmp_path)
    assert "\n" not in str(error.value)


def test_norms_that_nobody_asks_for_may_be_anything(tmp_path: Path) -> None:
    tensors = made(tmp_path, act_fn="relu")  # saved without a training, there are uninitialised numbers in their place
    save_file({**tensors, NORM + IN: torch.tensor(math.nan)}, tmp_path / "sae_weights.safetensors")
    assert llamascopium.read(tmp_path).tensors["W_dec"].isfinite().all()


def test_thresholds_that_are_no_number_are_refused(tmp_path: Path) -> None:
    tensors = made(tmp_path, act_fn="jumprelu")
    save_file({**tensors, THRESHOLD: torch.full([F], math.nan)}, tmp_path / "sae_weights.safetensors")
    with pytest.raises(CheckpointError, match="a threshold is no number"):
        llamascopium.read(tmp_path)


def test_weights_are_looked_for_where_llamascopium_does(tmp_path: Path) -> None:
    tensors = made(tmp_path, act_fn="TopK", sparsity_include_decoder_norm=False)
    (tmp_path / "sae_weights.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no sae_weights\.safetensors"):
        llamascopium.read(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    for place in ("checkpoints/final.pt", "checkpoints/pruned.safetensors", "sae_weights.pt"):
        b_E = torch.randn(F)
        if place.endswith(".pt"):
            torch.save({"sae": {**tensors, "b_E": b_E}, "version": "2.0.0b34"}, tmp_path / place)
        else:
            save_file({**tensors, "b_E": b_E}, tmp_path / place)
        assert torch.equal(llamascopium.read(tmp_path).tensors["b_enc"], b_E)
    (tmp_path / "sae_weights.pt").unlink()
    (tmp_path / "sae_weights.dcp").mkdir()
    with pytest.raises(CheckpointError, match=r"sae_weights\.dcp is a distributed checkpoint, which only llamascopium"):
        llamascopium.read(tmp_path)


def test_names_of_early_2025_are_read(tmp_path: Path) -> None:
    for act_fn in ("jumprelu", "topk"):
        tensors = made(tmp_path, act_fn=act_fn, norm_activation="dataset-wise")
        content = llamascopium.read(tmp_path)
        old = {
            "encoder.weight": tensors["W_E"].T, "encoder.bias": tensors["b_E"], "decoder.weight": tensors["W_D"].T,
            "decoder.bias": tensors["b_D"], NORM + IN: tensors[NORM + IN],
        }  # fmt: skip
        old |= {"log_jumprelu_threshold": tensors[THRESHOLD]} if act_fn == "jumprelu" else {}
        file = tmp_path / "sae_weights.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in old.items()}, file)
        again = llamascopium.read(tmp_path)
        assert again.tensors.keys() == content.tensors.keys()
        assert all(torch.equal(again.tensors[name], tensor) for name, tensor in content.tensors.items())
        del old["encoder.bias"]
        save_file({name: tensor.contiguous() for name, tensor in old.items()}, file)
        with pytest.raises(CheckpointError, match="it has no b_E"):
            llamascopium.read(tmp_path)


class Hostile:
    """What would make a folder when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return Path.mkdir, (self.place,)


def test_a_hostile_pickle_is_not_run(tmp_path: Path) -> None:
    tensors = made(tmp_path)
    (tmp_path / "sae_weights.safetensors").unlink()
    weights, ran = tmp_path / "sae_weights.pt", tmp_path / "ran"
    for content in ({"sae": {**tensors, "b_D": Hostile(ran)}}, {"sae": tensors, "version": Hostile(ran)}):
        torch.save(content, weights)
        with pytest.raises(CheckpointError, match=r"sae_weights\.pt is not read"):
            llamascopium.read(tmp_path)
        weights.write_bytes(pickle.dumps(content))
        with pytest.raises(CheckpointError, match=r"sae_weights\.pt"):
            llamascopium.read(tmp_path)
        assert not ran.exists()
    for content in (tensors, {"sae": {**tensors, "b_D": 3.0}}, {"sae": [1]}):
        torch.save(content, weights)
        with pytest.raises(CheckpointError, match=r"sae_weights\.pt"):
            llamascopium.read(tmp_path)


def test_damage_is_one_sentence(tmp_path: Path) -> None:
    made(tmp_path)
    for path in (tmp_path / "sae_weights.safetensors", tmp_path / "config.json"):
        whole = path.read_bytes()
        for size in (0, 1, 9, len(whole) // 3, len(whole) // 2, len(whole) - 2):
            path.write_bytes(whole[:size])
            with pytest.raises(CheckpointError, match=path.name) as error:
                llamascopium.read(tmp_path)
            assert "\n" not in str(error.value)
        path.write_bytes(whole)


def test_no_name_in_a_file_leads_anywhere(tmp_path: Path) -> None:
    folder, outside = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    outside.mkdir()
    made(folder, hooks=("../../x", "/etc/y"), act_fn="relu", metadata={"hookpoint": "../../h.1", "model": 3})
    content = llamascopium.read(folder)
    llamascopium.write(outside, content)
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(
        ["in", "out", *["config.json", "sae_weights.safetensors"] * 2]
    )


def test_other_folders_are_not_taken_for_it(tmp_path: Path) -> None:
    assert not llamascopium.detects(tmp_path)
    assert not llamascopium.detects(tmp_path / "nothing")
    for content in ("[]", "{", '{"trainer": {}}', '{"architecture": "jump_relu", "d_model": 3}', "\xff"):
        (tmp_path / "config.json").write_text(content)
        assert not llamascopium.detects(tmp_path)
    made(tmp_path, sae_type="clt")
    assert llamascopium.detects(tmp_path)


def test_it_is_loaded_and_saved_as_people_do(tmp_path: Path) -> None:
    sae = flashsae.SAE(flashsae.SAEConfig(D, F, K))
    sae.save(tmp_path / "out", format="llamascopium", metadata={"model": "gpt2", "hookpoint": "h.2"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = flashsae.load(tmp_path / "out")
    x = torch.randn(5, D)
    torch.testing.assert_close(again(x), sae(x))


def test_what_the_page_says_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llamascopium_sae").mkdir()
    made(tmp_path / "llamascopium_sae", act_fn="relu")
    (code,) = [code for code in code_blocks(ROOT / "docs" / "interop.md") if "for_llamascopium" in code]
    names: dict[str, Any] = {}
    exec(code, names)
    x = torch.randn(5, D)
    torch.testing.assert_close(flashsae.load("for_llamascopium")(x), names["sae"](x))
