"""Crosscoders: against dense autograd, with sites of different sizes and units, and in short trainings."""

from __future__ import annotations

import functools
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import flashsae
from flashsae import SAE, SAEConfig, TrainConfig
from flashsae.architecture import architecture_named, settings_of
from flashsae.errors import ConfigError, DtypeError, ShapeError
from flashsae.sae import DeadLatents, Step, auxk_loss, fvu_weights
from flashsae.testing import assert_as_accurate, integer_inputs, oracle

B, WIDTHS, D_SAE, K = 16, (5, 8, 3), 40, 4
D_IN = sum(WIDTHS)
KINDS = ["crosscoder", "crosscoder:topk", "crosscoder:abs_topk"]


SETTINGS, PROGRESS = TrainConfig(auxk_alpha=0.0), {"ramp": 1.0}
PENALISED = {
    "crosscoder:relu": {"l1": 0.5},
    "crosscoder:jump_relu": {"penalty": "tanh", "target_l0": 4.0, "bandwidth": 0.5, "sparsity_weight": 0.1},
}


def _filled(kind: str, generator: torch.Generator, *, integer: bool) -> tuple[SAE, Tensor]:
    """Return an SAE with random numbers everywhere, and tokens; rows of integers have norms that are powers of two."""
    sae = SAE(SAEConfig(D_IN, D_SAE, arch=settings_of(kind, widths=WIDTHS, **PENALISED.get(kind, {"k": K}))))

    def numbers(*shape: int) -> Tensor:
        if integer:
            return integer_inputs(*shape, generator=generator, largest=2)
        return torch.randn(*shape, generator=generator)

    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(numbers(*parameter.shape))
        if hasattr(sae, "threshold"):
            sae.threshold.abs_()
        if integer:  # one number other than 0 at each site, so that norms are whole
            sae.W_dec.zero_()
            for columns in sae.config.columns.values():
                sae.W_dec[:, columns.start] = numbers(D_SAE)
    return sae, numbers(B, D_IN)


def _ours(sae: SAE, x: Tensor) -> dict[str, Tensor]:
    sae.zero_grad()
    x = x.clone().requires_grad_()
    step = Step(sae, x, x, sae.encode(x), fvu_weights(x, 2.0))
    loss, _ = step.total(SETTINGS)
    loss.backward()  # type: ignore[no-untyped-call]
    grads = {f"grad {name}": parameter.grad.clone() for name, parameter in sae.named_parameters()}
    return {"loss": loss.detach(), "acts": step.code.to_dense().detach(), "grad x": x.grad, **grads}  # type: ignore[dict-item]


def _dense(kind: str, sae: SAE, x: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    params = {name: value.detach().to(dtype, copy=True).requires_grad_() for name, value in sae.named_parameters()}
    x = x.detach().to(dtype, copy=True).requires_grad_()
    settings = asdict(sae.config.arch)
    losses = oracle(kind).losses(x, params, 2.0, target=x, **settings, **PROGRESS)
    terms = {term.name: term.weight_in(sae.config.arch, SETTINGS) for term in sae.architecture.terms}
    loss = torch.stack([terms[name] * value for name, value in losses.items() if value is not None]).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    acts = oracle(kind)(x, params, **settings).detach()
    grads = {f"grad {name}": value.grad for name, value in params.items()}
    return {"loss": loss.detach(), "acts": acts, "grad x": x.grad, **grads}  # type: ignore[dict-item]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("kind", KINDS)
def test_t0_loss_and_every_gradient(
    kind: str, backend: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
        if kind != "crosscoder:topk":
            pytest.skip("its kernels have tests of their own")
        monkeypatch.setenv("FLASHSAE_BACKEND", "triton")
        monkeypatch.setenv("FLASHSAE_DENSE_ABOVE", "1")
    integers = _filled(kind, generator, integer=True)
    ours, exact = _ours(*integers), _dense(kind, *integers, torch.float64)
    for name, value in ours.items():
        assert torch.equal(value.double(), exact[name]), name


@pytest.mark.parametrize("kind", [*KINDS, *PENALISED])
def test_t1_to_t3_loss_and_every_gradient(kind: str, generator: torch.Generator) -> None:
    normal = _filled(kind, generator, integer=False)
    ours, again = _ours(*normal), _ours(*normal)
    theirs, exact = (_dense(kind, *normal, dtype) for dtype in (torch.float32, torch.float64))
    for name, value in ours.items():
        assert torch.equal(value, again[name]), name
        assert_as_accurate(value, theirs[name], exact[name], name)


def test_latents_are_selected_by_the_norms_of_all_sites(generator: torch.Generator) -> None:
    sae, x = _filled("crosscoder:topk", generator, integer=False)
    before = sae.encode(x)
    norms = torch.stack([sae.W_dec_of(site).norm(dim=1) for site in range(3)]).sum(0)
    torch.testing.assert_close(sae.selection_scale, norms.detach())
    pre_acts = x @ sae.W_enc + sae.b_enc
    expected = torch.zeros_like(pre_acts).scatter(1, (pre_acts * norms).topk(K).indices, 1.0) * pre_acts.relu()
    torch.testing.assert_close(before.to_dense(), expected)
    with torch.no_grad():
        sae.W_dec[7] *= 1e4  # at once, without a step between
    assert bool((sae.encode(x).top_indices == 7).any(1)[pre_acts[:, 7] > 0].all())


def test_a_latent_and_its_decoder_can_be_scaled_against_each_other(generator: torch.Generator) -> None:
    sae, x = _filled("crosscoder", generator, integer=False)
    sae.threshold.fill_(3.0)
    for training in (True, False):
        sae.train(training)
        expected = sae(x)
        with torch.no_grad():
            sae.W_dec[::2] /= 8
            sae.W_enc_T[::2] *= 8
            sae.b_enc[::2] *= 8
        torch.testing.assert_close(sae(x), expected)
    assert 0 < len(sae.encode(x).acts) < B * D_SAE


def test_sites_in_other_units_are_folded_and_select_the_same(generator: torch.Generator) -> None:
    sae, x = _filled("crosscoder", generator, integer=True)
    sae.threshold.fill_(3.0)
    factors = torch.cat([torch.full((width,), factor) for width, factor in zip(WIDTHS, (4.0, 0.25, 2.0))])
    folded = sae.rescaled(factors, factors)
    for training in (True, False):
        theirs, ours = sae.train(training).encode(factors * x), folded.train(training).encode(x)
        assert torch.equal(ours.pattern.latents, theirs.pattern.latents)
        assert torch.equal(folded(x), sae(factors * x) / factors)


def test_sites_have_names_and_decoders_of_their_own() -> None:
    sae = SAE(SAEConfig(7, 9, arch=settings_of("crosscoder", k=2, widths=(4, 3), sites=("a", "b"))))
    assert torch.equal(torch.cat([sae.W_dec_of("a"), sae.W_dec_of("b")], 1), sae.W_dec)
    assert torch.equal(sae.W_dec_of(-1), sae.W_dec[:, 4:])
    for wrong in ("c", 2, -3):
        with pytest.raises(ConfigError, match=f"site: expected one of a, b, got {wrong!r}"):
            sae.W_dec_of(wrong)
    with pytest.raises(ConfigError, match="site: expected one of several, which are not here, got 'a'"):
        SAE(SAEConfig(7, 9, 2)).W_dec_of("a")


@pytest.mark.parametrize("kind", ["crosscoder", "crosscoder:abs_topk"])
def test_auxk_selects_dead_latents_by_the_norms_of_all_sites(kind: str, generator: torch.Generator) -> None:
    sae, x = _filled(kind, generator, integer=False)
    dead = DeadLatents(D_SAE, 10)
    dead.tokens_since_fired[::3] = 11
    weights = fvu_weights(x, 2.0)
    decoded = Step(sae, x, x, sae.encode(x), weights).decoded
    ours = auxk_loss(sae, x, decoded, weights, dead.rows(int(dead.mask().sum())), 3)
    pre_acts = (x @ sae.W_enc + sae.b_enc).where(dead.mask(), 0.0 if "abs" in kind else -torch.inf)
    assert sae.selection_scale is not None
    keys = pre_acts * sae.selection_scale
    chosen = torch.zeros_like(keys).scatter(1, (keys.abs() if "abs" in kind else keys).topk(3).indices, 1.0)
    acts = torch.where(chosen > 0, pre_acts if "abs" in kind else pre_acts.relu(), 0.0)
    missed = (decoded.residual - acts @ sae.W_dec).square().sum() / decoded.residual.square().sum()
    torch.testing.assert_close(ours, missed)


# --- trainings ---


def _tokens(n: int, seed: int) -> dict[str, Tensor]:
    """Return features at three sites, some at one of them alone, in units that differ by a factor of 100."""
    features = torch.Generator().manual_seed(5)
    generator = torch.Generator().manual_seed(seed)
    active = torch.rand(n, 30, generator=generator) * (torch.rand(n, 30, generator=generator) < 0.08)
    acts = {}
    for number, (name, width) in enumerate(zip("abc", (12, 9, 6))):
        read = F.normalize(torch.randn(30, width, generator=features), dim=1)
        read[number * 5 : (number + 1) * 5] = 0.0  # which only the other sites have
        acts[name] = 10.0**number * (active @ read + 0.4)
    return acts


def _fit(kind: str, steps: int = 200, **others: Any) -> SAE:
    config = TrainConfig(batch_tokens=128, checkpoint_every_steps=10, dead_after_tokens=4000, lr=5e-3)
    return flashsae.fit(
        _tokens(8000, 0), d_sae=60, arch=kind, k=K, tokens=128 * steps, config=config, progress=False, **others
    )


@functools.cache
def _trained(kind: str) -> SAE:
    return _fit(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_explains_held_out_tokens_of_every_site(kind: str) -> None:
    sae, held_out = _trained(kind), _tokens(3000, 1)
    result = flashsae.evaluate(sae, held_out)
    assert list(result.site_fvu) == ["a", "b", "c"]
    assert max(result.site_fvu.values()) < 0.35
    assert abs(result.l0 - K) < 0.2 * K
    assert sae.config.arch.widths == (12, 9, 6)
    x_hat = sae(torch.cat(list(held_out.values()), 1)).detach()
    of_b = x_hat[:, sae.config.columns["b"]] - held_out["b"]
    deviations = held_out["b"] - held_out["b"].mean(0)
    assert result.site_fvu["b"] == pytest.approx(float(of_b.square().sum() / deviations.square().sum()), rel=1e-3)


def test_sites_are_known_by_name_in_any_order() -> None:
    sae, held_out = _trained("crosscoder"), _tokens(500, 1)
    expected = flashsae.evaluate(sae, held_out)
    assert flashsae.evaluate(sae, {name: held_out[name] for name in "cab"}).site_fvu == expected.site_fvu
    others = flashsae.evaluate(sae, {f"other.{name}": acts for name, acts in held_out.items()})
    assert others.site_fvu == expected.site_fvu
    with pytest.raises(ShapeError, match="x: expected the sites a of 12, b of 9, c of 6, got x of 6, y of 12, z of 9"):
        flashsae.evaluate(sae, dict(zip("xyz", (held_out[name] for name in "cab"))))
    with pytest.raises(ShapeError, match=r"c of 6, got a of 12, b of 9\. Give"):
        flashsae.evaluate(sae, {name: held_out[name] for name in "ab"})


def test_batches_of_sites_are_trained_on_as_arrays_are() -> None:
    acts = _tokens(640, 0)
    parts = [dict(zip(acts, each)) for each in zip(*(torch.split(x, 100) for x in acts.values()))]
    config = TrainConfig(batch_tokens=64, tokens=640)
    sae = flashsae.fit(iter(parts), d_sae=20, arch="crosscoder", k=2, config=config, progress=False)
    assert (sae.config.arch.sites, sae.config.arch.widths) == (("a", "b", "c"), (12, 9, 6))
    with pytest.raises(DtypeError, match="expected a dict of activations by site, got Tensor"):
        flashsae.fit(iter([acts["a"]]), d_sae=20, arch="crosscoder", k=2, config=config, progress=False)


def test_a_resumed_training_ends_with_the_same_bytes_and_is_saved_and_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _fit("crosscoder", 35, run=tmp_path / "whole")
    from flashsae.train import loop

    steps, step = [], loop.train_step

    def stops(*args: object) -> object:
        if len(steps) == 24:
            raise KeyboardInterrupt
        steps.append(1)
        return step(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", stops)
        with pytest.raises(KeyboardInterrupt):
            _fit("crosscoder", 35, run=tmp_path / "cut")
    resumed = _fit("crosscoder", 35, run=tmp_path / "cut", resume=True)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    whole.save(tmp_path / "sae")
    loaded, x = SAE.load(tmp_path / "sae"), torch.cat(list(_tokens(50, 2).values()), 1)
    assert loaded.config == whole.config
    assert torch.equal(loaded(x), whole(x))


def test_what_does_not_fit_is_refused() -> None:
    x, few = _tokens(600, 0), TrainConfig(tokens=600)
    with pytest.raises(ConfigError, match="Crosscoder takes the activations of two sites or more, got those of 1"):
        flashsae.fit(x["a"], d_sae=64, arch="crosscoder", config=few, progress=False)
    with pytest.raises(ConfigError, match="Crosscoder takes the activations of two sites or more, got those of 1"):
        flashsae.fit({"a": x["a"]}, d_sae=64, arch="crosscoder", config=few, progress=False)
    with pytest.raises(ShapeError, match="expected the same tokens at every site"):
        flashsae.fit({**x, "a": x["a"][1:]}, d_sae=64, arch="crosscoder", config=few, progress=False)
    with pytest.raises(ConfigError, match=r"widths: expected 12, 9, 6, of the activations in their order, got 12, 9\."):
        flashsae.fit(x, d_sae=64, arch=settings_of("crosscoder", widths=(12, 9)), config=few, progress=False)
    with pytest.raises(
        ConfigError, match=r"widths: expected those of two sites or more, which sum to d_in = 8, got \[\]"
    ):
        SAEConfig(8, 64, arch=settings_of("crosscoder"))
    with pytest.raises(ConfigError, match=r"widths: expected those of two sites or more"):
        SAEConfig(8, 64, arch=settings_of("crosscoder", widths=(8,)))
    for base, title in (
        ("gated", "Gated"),
        ("transcoder", "TopK tr"),
    ):
        with pytest.raises(ConfigError, match=f"a crosscoder goes by .*, and {title}.* has no place for them"):
            architecture_named(f"crosscoder:{base}")


def test_layer_norm_is_of_each_site_by_itself_and_stays_in_what_is_saved(
    generator: torch.Generator, tmp_path: Path
) -> None:
    base = torch.randn(2000, 3, generator=generator)
    x = {name: base @ torch.randn(3, width, generator=generator) for name, width in (("a", 9), ("b", 5))}
    tokens = {"tokens": 128 * 20, "batch_tokens": 128, "progress": False}
    sae = flashsae.fit(x, arch="crosscoder", k=4, d_sae=32, normalize_activations="layer_norm", **tokens)
    sae.save(tmp_path / "sae")
    loaded, whole = flashsae.SAE.load(tmp_path / "sae"), torch.cat([x["a"], x["b"]], 1)
    assert torch.equal(loaded(whole), sae(whole))
    # no site sees the unit or the mean of a token of its own, nor that of another
    moved = torch.cat([x["a"] * 8 + 3, x["b"] / 2 - 1], 1)
    torch.testing.assert_close(sae.encode(moved).to_dense(), sae.encode(whole).to_dense(), rtol=1e-3, atol=1e-3)
    expected = torch.cat([sae(whole)[:, :9] * 8 + 3, sae(whole)[:, 9:] / 2 - 1], 1)
    torch.testing.assert_close(sae(moved), expected, rtol=1e-3, atol=1e-2)
    assert flashsae.evaluate(sae, x).fvu < 0.6
    narrow = {"a": x["a"], "b": x["b"][:, :1]}
    with pytest.raises(ConfigError, match="layer_norm of at least two coordinates a site"):
        flashsae.fit(narrow, arch="crosscoder", k=4, d_sae=32, normalize_activations="layer_norm", **tokens)
