"""Matryoshka and Hierarchical TopK: nested reconstructions, by prefixes of latents and by budgets of entries."""

from __future__ import annotations

import pickle
from collections import Counter
from dataclasses import asdict
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flashsae
from flashsae import SAE, HierarchicalTopKSettings, SAEConfig, TrainConfig
from flashsae.architecture import Progress, architecture_named, settings_of
from flashsae.architectures.hierarchical_topk import at_budget
from flashsae.architectures.matryoshka import sampled_prefixes
from flashsae.errors import ConfigError
from flashsae.sae import Step, fvu_weights
from flashsae.settings.prefixes import prefixes_of
from flashsae.testing import DenseTrainer, assert_as_accurate, oracle
from flashsae.train.plan import make_plan
from helpers.resumed import same_after_a_kill

D, N, K, B = 12, 48, 4, 40
ARCHS: dict[str, tuple[str, dict[str, Any]]] = {
    "matryoshka": ("matryoshka", {}),
    "matryoshka, sum": ("matryoshka", {"prefixes": (1, 20, N), "level_loss": "sum"}),
    "matryoshka, sampled": ("matryoshka", {"prefix_sampling": "random"}),
    "matryoshka of topk": ("matryoshka:topk", {"prefixes": (0.1, 0.5, 1.0)}),
    "hierarchical": ("hierarchical_topk", {}),
    "hierarchical, a list": ("hierarchical_topk", {"budgets": (1, 3, 4)}),
}
each = pytest.mark.parametrize("case", ARCHS)


def settings(case: str) -> Any:
    name, given = ARCHS[case]
    return settings_of(name, k=K, **given)


def tokens(n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(24, D, generator=torch.Generator().manual_seed(9)), dim=1)
    how_many = torch.rand(n, 24, generator=generator) < torch.rand(n, 1, generator=generator) * 0.3  # few or many
    return (how_many * torch.rand(n, 24, generator=generator)) @ directions


def one_step(case: str, dtype: torch.dtype) -> tuple[SAE, Step]:
    sae, x = SAE(SAEConfig(D, N, arch=settings(case)), dtype=dtype).train(), tokens(B).to(dtype)
    sae.set_progress(Progress(7, 100, seed=3))
    with torch.no_grad():
        sae.b_enc.copy_(torch.linspace(-0.1, 0.1, N))
    return sae, Step(sae, x, x, sae.encode(x), fvu_weights(x, 2.0))


@each
def test_loss_and_gradients_are_those_of_the_dense_oracle(case: str) -> None:
    found = {}
    for dtype in (torch.float64, torch.float32):
        sae, step = one_step(case, dtype)
        params = {name: value.detach().clone().requires_grad_() for name, value in sae.named_parameters()}
        given = asdict(sae.config.arch) | {name: value.tolist() for name, value in sae.now.items()}
        dense = oracle(ARCHS[case][0]).losses(step.x, params, 2.0, **given)
        loss, metrics = step.total(TrainConfig(auxk_alpha=0.0))
        assert list(metrics) == ["fvu", "nested_fvu"]
        whole = step.x - sae.decode(step.code)
        torch.testing.assert_close(metrics["fvu"], whole.square().sum().detach() / (2.0 * B))
        for model in ("ours", "dense"):
            parts = list(sae.parameters()) if model == "ours" else list(params.values())
            result = loss if model == "ours" else dense["nested_fvu"]
            found[model, dtype] = [result.detach(), *torch.autograd.grad(result, parts)]
    for number, exact in enumerate(found["dense", torch.float64]):
        torch.testing.assert_close(found["ours", torch.float64][number], exact, rtol=1e-11, atol=1e-13)
        assert_as_accurate(found["ours", torch.float32][number], found["dense", torch.float32][number], exact)


@pytest.fixture(scope="module")
def trained() -> dict[str, SAE]:
    x, config = tokens(20_000), TrainConfig(batch_tokens=256, lr=3e-3)

    def fit(arch: object) -> SAE:
        return flashsae.fit(x, d_sae=N, arch=arch, tokens=256 * 150, config=config, progress=False)

    chosen = ("matryoshka", "matryoshka, sampled", "hierarchical")
    return {case: fit(settings(case)) for case in chosen} | {"topk": fit(settings_of("topk", k=K))}


def prefix_fvu(sae: SAE, x: Tensor, size: int) -> float:
    with torch.no_grad():
        latent_acts = sae.encode(x).to_dense()
        x_hat = latent_acts[:, :size] @ sae.W_dec[:size] + sae.b_dec
    return float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum())


def test_a_training_explains_held_out_tokens_at_every_level(trained: dict[str, SAE]) -> None:
    held_out = tokens(4000, seed=1)
    for case, sae in trained.items():
        result = flashsae.evaluate(sae, held_out)
        assert not sae.training
        assert result.fvu < 0.25, case
        assert abs(result.l0 - K) < 0.2 * K, case
    for case in ("matryoshka", "matryoshka, sampled"):
        first = prefix_fvu(trained[case], held_out, N // 4)
        assert first < 0.9 * prefix_fvu(trained["topk"], held_out, N // 4), case  # which never was asked to
    for k in (1, 2):
        few = [flashsae.evaluate(at_budget(trained["hierarchical"], k), held_out).fvu]
        other = trained["topk"]
        with torch.no_grad():
            code = other.encode(held_out).to_dense()
            values, latents = code.topk(k, dim=1)
            x_hat = torch.zeros_like(code).scatter(1, latents, values) @ other.W_dec + other.b_dec
        few.append(float((held_out - x_hat).square().sum() / (held_out - held_out.mean(0)).square().sum()))
        assert few[0] < few[1], k


def test_a_budget_is_the_first_entries_of_the_code(trained: dict[str, SAE]) -> None:
    sae, x = trained["hierarchical"], tokens(30, seed=2)
    code, few = sae.encode(x), at_budget(sae, 2).encode(x)
    assert torch.equal(code.top_indices[:, :2], few.top_indices)
    assert torch.equal(code.top_acts[:, :2], few.top_acts)
    assert bool((code.top_acts.diff(dim=1) <= 0).all())
    with pytest.raises(ConfigError, match="k: expected at most 4, which the SAE was trained for, got 5"):
        at_budget(sae, 5)
    with pytest.raises(ConfigError, match="sae: expected one of Hierarchical TopK, got TopK"):
        at_budget(trained["topk"], 2)
    normalizing = sae.normalizing("layer_norm")
    assert at_budget(normalizing, 2).config.normalize_activations == "layer_norm"
    assert torch.equal(at_budget(normalizing, 4)(x), normalizing(x))


@each
def test_a_resumed_training_ends_with_the_same_bytes(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, config = tokens(2000), TrainConfig(batch_tokens=128, checkpoint_every_steps=5, dead_after_tokens=640, k_aux=3)
    same_after_a_kill(tmp_path, monkeypatch, x=x, after=9, d_sae=N, arch=settings(case), tokens=128 * 15, config=config)


@each
def test_it_is_saved_loaded_copied_and_pickled(case: str, tmp_path: Path) -> None:
    sae = SAE(SAEConfig(D, N, arch=settings(case))).eval()
    sae.save(tmp_path / "sae")
    loaded, x = SAE.load(tmp_path / "sae"), tokens(9)
    assert loaded.config == pickle.loads(pickle.dumps(sae)).config == sae.config
    assert torch.equal(loaded(x), sae(x))


def test_a_short_training_is_that_of_the_dense_oracle() -> None:
    for case in ("matryoshka of topk", "hierarchical"):
        name, given = ARCHS[case]
        sae = SAE(SAEConfig(D, N, arch=settings(case)), dtype=torch.float64).train()
        dense = DenseTrainer(dict(sae.named_parameters()), 1e-3, 2.0, name, k=K, **given)
        optimizer = flashsae.optim.FactoredAdam(
            [{"params": [sae.W_dec], "unit_norm": True}, {"params": [sae.W_enc_T, sae.b_enc, sae.b_dec]}], lr=1e-3
        )
        for number in range(10):
            x = tokens(B, seed=number).double()
            loss, _ = Step(sae, x, x, sae.encode(x), fvu_weights(x, 2.0)).total(TrainConfig(auxk_alpha=0.0))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            torch.testing.assert_close(loss.detach(), dense.step(x))
        for parameter, value in sae.named_parameters():
            torch.testing.assert_close(value.detach(), dense.params[parameter].detach(), msg=parameter)


def test_auxk_is_of_the_residual_of_all_latents() -> None:
    _, step = one_step("matryoshka, sum", torch.float32)
    whole = (step.x - step.sae.decode(step.code)).detach()
    torch.testing.assert_close(step.decoded.residual, whole)
    torch.testing.assert_close(step.decoded.level_losses[-1], whole.square().sum() / (2.0 * B))
    torch.testing.assert_close(step.decoded.loss.detach(), step.decoded.level_losses.sum())


def test_prefixes_are_fractions_or_numbers_of_latents() -> None:
    assert prefixes_of((0.0625, 0.125, 0.25, 0.5, 1.0), 4096) == [256, 512, 1024, 2048, 4096]
    assert prefixes_of((0.0625, 0.125, 0.25, 0.5, 1.0), 6) == [1, 2, 3, 6]  # too few latents for five
    assert prefixes_of((2, 0.5, 40), 40) == [2, 20, 40]
    assert prefixes_of((1, 8, 40), 40) == [1, 8, 40]
    assert prefixes_of((1,), 40) == [40]
    assert prefixes_of((1,), 1) == prefixes_of((0.5, 1), 1) == [1]
    for wrong in ((0.5,), (3, 41), (3, 39), (2.5, 40)):
        with pytest.raises(
            ConfigError, match=r"prefixes: expected fractions up to 1 or whole numbers of latents, of w"
        ):
            sae_of(wrong)
    for wrong in ((), (0.5, 0.5, 1), (1.0, 0.5), (0.0, 1.0), (-1.0, 1.0), (0.5, inf)):
        with pytest.raises(ConfigError, match="prefixes: expected numbers above 0 that ascend, got"):
            settings_of("matryoshka", prefixes=wrong)


def sae_of(prefixes: tuple[float, ...]) -> SAE:
    return SAE(SAEConfig(4, 40, arch=settings_of("matryoshka", k=2, prefixes=prefixes)))


def test_sampled_prefixes_differ_from_step_to_step_and_favour_short_ones() -> None:
    drawn = [sampled_prefixes(5, 1000, seed=1, step=step) for step in range(400)]
    assert all(len(each) == 5 and each == sorted(set(each)) and each[-1] == 1000 and each[0] > 0 for each in drawn)
    assert drawn == [sampled_prefixes(5, 1000, seed=1, step=step) for step in range(400)]
    assert drawn[0] != drawn[1] != sampled_prefixes(5, 1000, seed=2, step=1)
    short = Counter(size < 100 for each in drawn for size in each[:-1])
    assert 0.6 < short[True] / short.total() < 0.95  # of one draw 0.93; different ones reach further
    assert sampled_prefixes(9, 4, seed=0, step=0) == [1, 2, 3, 4]
    sae = SAE(SAEConfig(D, N, arch=settings("matryoshka, sampled")))
    assert sae.now["sampled_prefixes"].tolist() == [3, 6, 12, 24, 48]
    sae.set_progress(Progress(3, 10, seed=1))
    assert sae.now["sampled_prefixes"].tolist() == sampled_prefixes(5, N, seed=1, step=3)


def test_budgets_end_with_k() -> None:
    assert HierarchicalTopKSettings(8, (1, 2, 8)).budgets == (1, 2, 8)
    with pytest.raises(ConfigError, match=r"budgets: expected 8 as k for the last one, got \[1, 4\]"):
        HierarchicalTopKSettings(8, (1, 4))
    for wrong in ((0, 8), (4, 4, 8), (5, 3, 8)):
        with pytest.raises(ConfigError, match="budgets: expected numbers from 1 on that ascend, got"):
            HierarchicalTopKSettings(8, wrong)


def test_in_a_crosscoder_budgets_go_by_what_latents_count_for() -> None:
    arch = settings_of("crosscoder:hierarchical_topk", k=K, sites=("a", "b"), widths=(D, D))
    sae = SAE(SAEConfig(2 * D, N, arch=arch)).train()
    with torch.no_grad():
        sae.b_enc.fill_(1.0)
    code = sae.encode(tokens(9).repeat(1, 2))
    norms = sum(sae.W_dec.detach()[:, part].norm(dim=1) for part in (slice(0, D), slice(D, 2 * D)))
    counts_for = code.top_acts.detach() * norms[code.top_indices.long()]
    assert bool((counts_for.diff(dim=1) <= 1e-6).all())
    assert bool((code.top_acts.diff(dim=1) > 0).any())
    grad = torch.autograd.grad(code.acts.sum(), sae.b_enc)[0]
    assert grad.sum() == 9 * K  # that of the values, not of what they count for


def test_nested_reconstructions_are_not_nested_again() -> None:
    for base in ("hierarchical_topk", "matryoshka", "matryoshka:topk"):
        with pytest.raises(ConfigError, match="has nested reconstructions itself"):
            architecture_named(f"matryoshka:{base}")


def test_of_annealed_codes_it_takes_the_latents_in_order() -> None:
    arch = settings_of("matryoshka:topk", k=3, k_start=9, prefixes=(0.1, 0.5, 1.0))
    sae, x = SAE(SAEConfig(D, N, arch=arch), dtype=torch.float64).train(), tokens(B).double()
    sae.set_progress(Progress(1, 10))
    step = Step(sae, x, x, sae.encode(x), fvu_weights(x, 2.0))
    code = step.code.to_dense()
    expected = [(x - code[:, :m] @ sae.W_dec[:m] - sae.b_dec).square().sum() / (2.0 * B) for m in (5, 24, N)]
    torch.testing.assert_close(step.decoded.loss, torch.stack(expected).mean())
    with pytest.raises(ConfigError, match=r"multi_topk: expected 0 beside prefixes, got 0\.125"):
        SAE(SAEConfig(D, N, arch=settings_of("matryoshka:topk", multi_topk=0.125)))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_plan_has_memory_for_rows_of_all_levels(device: str) -> None:
    plans, rows = {}, 32 * 2048 * 64 * 2  # in bfloat16
    for name, given in (
        ("topk", {}), ("topk", {"multi_topk": 0.125}), ("matryoshka:topk", {}), ("hierarchical_topk", {}),
    ):  # fmt: skip
        arch = settings_of(name, k=32, **given)
        config = TrainConfig(d_sae=1024, arch=arch, batch_tokens=2048, tokens=1 << 20, precision="bf16").resolve(64)
        plans[name, len(given)] = make_plan(config, torch.device(device)).parts["one step"]
    assert plans["hierarchical_topk", 0] > plans["topk", 0] + rows * (0.9 if device == "cpu" else 0.2)
    assert plans["topk", 0] <= plans["topk", 1]
    assert plans["topk", 0] <= plans["matryoshka:topk", 0] <= plans["hierarchical_topk", 0]


def test_its_own_settings_are_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    from flashsae.cli import main

    with pytest.raises(SystemExit):
        main(["train", "--arch", "matryoshka", "--help"])
    shown = capsys.readouterr().out
    assert all(option in shown for option in ("--k", "--prefixes", "--prefix-sampling", "--level-loss"))
    with pytest.raises(SystemExit):
        main(["train", "--arch", "hierarchical_topk", "--help"])
    assert "--budgets" in capsys.readouterr().out
