"""What models go on with, by dense formulas: edits, reconstructions, transcoders, gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flashsae import SAE, SAEConfig, SparseCode, ablate, clamp, hook, scale, steer
from flashsae.errors import ConfigError, ShapeError
from helpers.hooked import at_hookpoint, sae_of


@pytest.mark.parametrize("arch", ["topk", "batch_topk", "jump_relu", "relu"])
@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
def test_edits_add_rows_of_the_decoder(arch: str, normalize: str, model: nn.Module, ids: Tensor) -> None:
    sae = sae_of(arch, normalize_activations=normalize)
    x = at_hookpoint(model, "transformer.h.1", ids)
    dense = sae.encode(x).to_dense().detach()
    edited = dense.clone()
    edited[..., 5] = 0
    edited[:, 2:, 6] += 3
    edited[:, -1, 7] = 1.5
    deviation = x.std(-1, keepdim=True) if normalize == "layer_norm" else 1.0
    wanted = x + (edited - dense) @ sae.W_dec.detach() * deviation
    edits = [ablate(5), steer(6, 3.0, at=slice(2, None)), clamp(7, 1.5, at=-1)]
    with hook(model, {"h.1": sae}, edits) as codes:
        torch.testing.assert_close(at_hookpoint(model, "transformer.h.1", ids), wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(codes["h.1"].to_dense(), dense)
    assert torch.equal(codes.edited["h.1"].to_dense(), edited)
    assert torch.equal(model.get_submodule("transformer.h.1")(x), model.get_submodule("transformer.h.1")(x))


def test_steering_is_exact(model: nn.Module, ids: Tensor) -> None:
    sae = sae_of()
    with torch.no_grad():
        sae.W_dec.copy_(torch.randint(-2, 3, (64, 16)))
    x = at_hookpoint(model, "transformer.h.1", ids)
    with hook(model, {"h.1": sae}, steer([3, 63], [2.0, -1.0], at=4)):
        found = at_hookpoint(model, "transformer.h.1", ids)
    x[:, 4] += 2 * sae.W_dec[3].detach() - sae.W_dec[63].detach()
    assert torch.equal(found, x)


def test_without_the_error_it_is_the_reconstruction(model: nn.Module, ids: Tensor, sae: SAE) -> None:
    x = at_hookpoint(model, "transformer.h.1", ids)
    wanted = sae(x).detach()
    with hook(model, {"h.1": sae}, error=False):
        assert torch.equal(at_hookpoint(model, "transformer.h.1", ids), wanted)
    with hook(model, {"h.1": sae}, error=[0, 3]):
        found = at_hookpoint(model, "transformer.h.1", ids)
    wanted[:, [0, 3]] = x[:, [0, 3]]
    assert torch.equal(found, wanted)
    with hook(model, {"h.1": sae}, scale(range(64), 0.0), error=False):
        found = at_hookpoint(model, "transformer.h.1", ids)
    assert torch.equal(found, sae.b_dec.detach().expand_as(x))


def test_a_function_with_another_pattern(model: nn.Module, ids: Tensor, sae: SAE) -> None:
    def only_the_largest(code: SparseCode) -> SparseCode:
        acts, places = code.top_acts.max(-1, keepdim=True)
        return SparseCode.topk(acts, code.top_indices.gather(-1, places), code.d_sae)

    x = at_hookpoint(model, "transformer.h.1", ids)
    code = sae.encode(x)
    wanted = x + sae.decode(only_the_largest(code)) - sae.decode(code)
    with hook(model, {"h.1": sae}, only_the_largest) as codes:
        torch.testing.assert_close(at_hookpoint(model, "transformer.h.1", ids), wanted.detach())
    assert codes.edited["h.1"].top_acts.shape == (2, 7, 1)
    with hook(model, {"h.1": sae}, lambda code: SparseCode.topk(code.top_acts, code.top_indices, 64)):
        assert torch.equal(at_hookpoint(model, "transformer.h.1", ids), x)  # the same code is no change


@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("sae_dtype", [torch.float32, torch.bfloat16])
def test_the_model_keeps_its_dtype(
    model_dtype: torch.dtype, sae_dtype: torch.dtype, model: nn.Module, ids: Tensor
) -> None:
    part, sae = copy.deepcopy(model).to(model_dtype), sae_of(dtype=sae_dtype)
    wanted = part(ids).logits
    for given in ({}, {"gradients": "latents"}, {"gradients": "model"}):
        with hook(part, {"h.1": sae}, **given):
            assert torch.equal(part(ids).logits, wanted)
    x = at_hookpoint(part, "transformer.h.1", ids)
    with hook(part, {"h.1": sae}, steer(3, 2.0)):
        found = at_hookpoint(part, "transformer.h.1", ids)
    assert found.dtype == model_dtype
    wide = torch.promote_types(model_dtype, sae_dtype)
    assert torch.equal(found, (x.to(wide) + (2 * sae.W_dec[3]).detach().to(wide)).to(model_dtype))
    with hook(part, {"h.1": sae}, error=False):
        assert part(ids).logits.dtype == model_dtype


def test_autocast_does_not_reach_the_sae(model: nn.Module, ids: Tensor, sae: SAE) -> None:
    with torch.autocast("cpu", torch.bfloat16), hook(model, {"h.1": sae}, error=False) as codes:
        x = at_hookpoint(model, "transformer.h.0", ids)
        model(ids)
    assert codes["h.1"].acts.dtype == torch.float32
    assert x.dtype == torch.float32
    with (
        torch.autocast("cpu", torch.bfloat16),
        hook(model, {"h.1": sae}, lambda c: c.replace(c.acts @ torch.eye(4))) as codes,
    ):
        model(ids)
    assert codes.edited["h.1"].acts.dtype == torch.float32


@pytest.mark.parametrize("arch", ["transcoder:topk", "skip_transcoder:topk"])
@pytest.mark.parametrize("key", ["h.1.mlp", ("h.1.mlp:in", "h.1.mlp"), "h.1.ln_2, h.1.mlp"])
def test_transcoders_replace_what_a_module_gives(arch: str, key: Any, model: nn.Module, ids: Tensor) -> None:
    sae = sae_of(arch)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.1
    x, y = (at_hookpoint(model, f"transformer.h.1.{name}", ids) for name in ("ln_2", "mlp"))
    with hook(model, {key: sae}) as codes:
        assert torch.equal(at_hookpoint(model, "transformer.h.1.mlp", ids), y)
    assert torch.equal(codes[key].to_dense(), sae.encode(x).to_dense())
    assert torch.equal(codes["h.1.mlp"].to_dense(), sae.encode(x).to_dense())
    with hook(model, {key: sae}, error=False):
        assert torch.equal(at_hookpoint(model, "transformer.h.1.mlp", ids), sae(x).detach())
    with hook(model, {key: sae}, steer(3, 2.0)):
        found = at_hookpoint(model, "transformer.h.1.mlp", ids)
    torch.testing.assert_close(found, y + 2 * sae.W_dec[3].detach())


def test_patterns_of_transcoders_are_paired(model: nn.Module, ids: Tensor) -> None:
    sae = sae_of("transcoder:topk")
    with hook(model, {"h.*.ln_2, h.*.mlp": sae}, error=False) as codes:
        model(ids)
    assert list(codes) == [f"h.{i}.ln_2, h.{i}.mlp" for i in range(3)]


def test_crosscoders_are_read(model: nn.Module, ids: Tensor) -> None:
    from flashsae.architecture import settings_of

    config = SAEConfig(32, 64, arch=settings_of("crosscoder:topk", k=4, widths=(16, 16), sites=("a", "b")))
    sae = SAE(config).eval()
    xs = [at_hookpoint(model, f"transformer.h.{i}", ids) for i in (2, 0)]
    wanted = model(ids).logits
    with hook(model, {("h.2", "h.0"): sae}) as codes:
        assert torch.equal(model(ids).logits, wanted)
        model(ids)
    assert torch.equal(codes["h.2, h.0"].to_dense(), sae.encode(torch.cat(xs, -1)).to_dense())
    for given in ({"edits": ablate(3)}, {"error": False}, {"gradients": "latents"}):
        with pytest.raises(ConfigError, match="a TopK crosscoder reconstructs several hookpoints when all have run"):
            hook(model, {("h.2", "h.0"): sae}, **given)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="expected 2 hookpoints, got 3"), hook(model, {"h.*": sae}):
        model(ids)


def dense_hook(sae: SAE, through: str, kept: dict[str, Tensor], name: str) -> Callable[..., Any]:
    """Return a hook that does it with dense tensors, in a few lines."""

    def replaced(module: nn.Module, args: object, output: Any) -> Any:
        x = output if isinstance(output, Tensor) else output[0]
        pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
        acts = torch.where(pre >= pre.topk(4).values[..., -1:], pre, 0.0).relu()
        if through == "model":
            acts = acts.detach().requires_grad_()
        acts.retain_grad()
        kept[name] = acts
        x_hat = acts @ sae.W_dec + sae.b_dec
        y = x + (x_hat - x_hat.detach()) if through == "model" else x_hat + (x - x_hat).detach()
        return y if isinstance(output, Tensor) else (y, *output[1:])

    return replaced


@pytest.mark.parametrize("through", ["latents", "model"])
def test_gradients_are_those_of_the_dense_formula(through: Any, model: nn.Module, ids: Tensor) -> None:
    part = copy.deepcopy(model).double()
    saes = {name: sae_of(dtype=torch.float64, seed=seed) for seed, name in enumerate(("h.0", "h.2"))}
    kept: dict[str, Tensor] = {}
    handles = [
        part.get_submodule(f"transformer.{name}").register_forward_hook(dense_hook(sae, through, kept, name))
        for name, sae in saes.items()
    ]
    logits = part(ids).logits[:, -1]
    (logits[:, 3] - logits[:, 4]).sum().backward()
    wanted_of_embeddings = part.transformer.wte.weight.grad.clone()
    part.zero_grad()
    for handle in handles:
        handle.remove()
    for sae in saes.values():
        sae.zero_grad()
    with hook(part, saes, gradients=through) as codes:
        logits = part(ids).logits[:, -1]
    (logits[:, 3] - logits[:, 4]).sum().backward()
    for name, sae in saes.items():
        code, wanted = codes[name], kept[name]
        assert code.acts.grad is not None
        assert wanted.grad is not None
        active = wanted != 0
        found = code.replace(code.acts.grad).to_dense()
        torch.testing.assert_close(found[active], wanted.grad[active], rtol=1e-9, atol=1e-12)
        assert all(parameter.grad is None for parameter in sae.parameters())
        assert all(parameter.requires_grad for parameter in sae.parameters())
    torch.testing.assert_close(part.transformer.wte.weight.grad, wanted_of_embeddings, rtol=1e-9, atol=1e-12)


def test_gradients_without_the_error(model: nn.Module, ids: Tensor, sae: SAE) -> None:
    frozen = copy.deepcopy(model).requires_grad_(False)
    x = at_hookpoint(frozen, "transformer.h.1", ids)
    for through in ("latents", "model", None):
        sae.zero_grad()
        with hook(frozen, {"h.1": sae}, error=False, gradients=through) as codes:  # type: ignore[arg-type]
            frozen(ids).logits.square().sum().backward()
        assert (sae.W_dec.grad is None) == (through is not None)
        if through:
            assert codes["h.1"].acts.grad is not None
    sae.zero_grad()
    normal = sae_of(normalize_activations="layer_norm")
    with hook(frozen, {"h.1": normal}, gradients="latents") as codes:
        assert torch.equal(at_hookpoint(frozen, "transformer.h.1", ids), x)
        frozen(ids).logits.square().sum().backward()
    assert codes["h.1"].acts.grad.abs().sum() > 0  # type: ignore[union-attr]


@pytest.mark.parametrize("arch", ["topk", "transcoder:topk", "skip_transcoder:topk"])
@pytest.mark.parametrize("error", [True, False])
@pytest.mark.parametrize("through", ["latents", "model"])
def test_what_lies_before_has_the_gradient_that_is_asked_for(through: Any, error: bool, arch: str) -> None:
    sae, module = sae_of(arch, dtype=torch.float64), nn.Sequential(nn.Linear(16, 16).double())
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.1
    x, weights = torch.randn(3, 5, 16, dtype=torch.float64), torch.randn(3, 5, 16, dtype=torch.float64)
    grads = []
    for given in (None, {"error": error, "gradients": through}):
        own = x.clone().requires_grad_()
        if given is None and through == "latents":
            found = sae(own) if "transcoder" in arch else sae(module(own))
        elif given is None:
            found = module(own)
        else:
            with hook(module, {"0": sae}, **given):
                found = module(own)
        (found * weights).sum().backward()
        grads.append(own.grad)
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


def test_reading_leaves_the_graph_of_the_model(model: nn.Module, ids: Tensor, sae: SAE) -> None:
    part = copy.deepcopy(model)
    part(ids).logits.square().sum().backward()
    wanted = part.transformer.wte.weight.grad.clone()
    part.zero_grad()
    with hook(part, {"h.*": sae}):
        part(ids).logits.square().sum().backward()
    assert torch.equal(part.transformer.wte.weight.grad, wanted)


def test_a_steering_amount_can_be_learnt(model: nn.Module, ids: Tensor, sae: SAE) -> None:
    amount = torch.zeros((), requires_grad=True)
    adam = torch.optim.Adam([amount], lr=0.1)
    losses = []
    for _ in range(4):
        with hook(model, {"h.1": sae}, steer(3, amount)):
            loss = model(ids).logits[:, -1].log_softmax(-1)[:, 5].mean().neg()
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    model.zero_grad()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("asked_before", [False, True])
def test_hidden_states_are_those_that_the_model_goes_on_with(
    asked_before: bool, tiny: ModuleType, ids: Tensor, sae: SAE
) -> None:
    part = tiny.gpt2().eval()
    x = (
        part(ids, output_hidden_states=True).hidden_states[1]
        if asked_before
        else at_hookpoint(part, "transformer.h.0", ids)
    )
    with hook(part, {"h.0": sae}, steer(3, 2.0)):
        found = part(ids, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(found, x + 2 * sae.W_dec[3].detach())


@pytest.mark.parametrize("arch", ["topk", "jump_relu"])
def test_kernels_do_the_same(arch: str, model: nn.Module, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    sae, found = sae_of(arch), []
    edits = [steer([3, 60], [2.0, -1.0], at=[0, 4]), clamp(7, 1.5), ablate(range(20, 40))]
    for backend in ("reference", "triton"):
        monkeypatch.setenv("FLASHSAE_BACKEND", backend)
        with hook(model, {"h.1": sae}, edits, gradients="latents") as codes:
            x = at_hookpoint(model, "transformer.h.1", ids[:1])
            model(ids[:1]).logits[0, -1, 3].backward()
        code = codes["h.1"]
        assert code.acts.grad is not None
        found.append((x, code.to_dense().detach(), code.replace(code.acts.grad).to_dense()))
    model.zero_grad()
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
