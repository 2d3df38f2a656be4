from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flashsae
from flashsae import SAE, AbsTopKSettings, SAEConfig, TopKSettings, TrainConfig, ops
from flashsae.architecture import Progress, settings_of
from flashsae.architectures.topk import WIDTHS, k_at, width_at
from flashsae.errors import ConfigError
from flashsae.sae import fvu_weights
from flashsae.sae.dead import DeadLatents
from flashsae.sae.step import Step
from flashsae.testing import DenseTrainer, dense_auxk, integer_inputs, oracle
from helpers.real import activations

K, D, N = 3, 6, 40


def tokens(n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(24, 12, generator=torch.Generator().manual_seed(9)), dim=1)
    is_there = torch.rand(n, 24, generator=generator) < 0.15
    return (is_there * torch.rand(n, 24, generator=generator)) @ directions


def made(settings: TopKSettings, step: int = 1, steps: int = 1, *, integers: bool = True) -> SAE:
    """Return an SAE in training at a step; of small integers, which tie all the time."""
    generator = torch.Generator().manual_seed(3)
    sae = SAE(SAEConfig(D, N, arch=settings), dtype=torch.float32)
    with torch.no_grad():
        for weights in sae.parameters():
            weights.copy_(integer_inputs(*weights.shape, generator=generator, largest=2))
            weights.add_(0.0 if integers else torch.randn(weights.shape, generator=generator))
    sae.set_progress(Progress(step, steps))
    return sae.train()


ANNEALED = [
    TopKSettings(K, k_start=13, k_anneal_fraction=0.8),
    TopKSettings(K, k_start=13, k_anneal="exponential", k_anneal_fraction=1.0),
    TopKSettings(11, k_start=2),
]


@pytest.mark.parametrize("settings", ANNEALED)
def test_k_goes_from_its_start_to_its_end_and_stays(settings: TopKSettings) -> None:
    ks = [k_at(settings, Progress(step, 100)) for step in range(101)]
    assert ks[0] == settings.k_start
    assert ks[-1] == settings.k == k_at(settings, Progress.end())
    assert ks in (sorted(ks), sorted(ks, reverse=True))
    end = round(100 * settings.k_anneal_fraction)
    assert set(ks[end:]) == {settings.k}
    middle = ks[end // 2]
    start = settings.k_start
    assert (
        abs(middle - ((start + settings.k) / 2 if settings.k_anneal == "linear" else (start * settings.k) ** 0.5))
        <= 0.5
    )


@pytest.mark.parametrize(("k", "k_start"), [(1, 1024), (32, 512), (64, 64), (100, 7), (1, 2), (2, 1), (5, None)])
@pytest.mark.parametrize("how", ["linear", "exponential"])
def test_there_is_room_for_k_in_few_widths(k: int, k_start: int | None, how: Any) -> None:
    settings = TopKSettings(k, k_start=k_start, k_anneal=how)
    widths = []
    for step in range(1001):
        progress = Progress(step, 1000)
        now, width = k_at(settings, progress), width_at(settings, progress)
        assert now <= width <= max(now + 1, 2.1 * now)
        widths.append(width)
    assert len(set(widths)) <= WIDTHS + 1 <= 12
    assert widths[-1] == width_at(settings, Progress.end()) >= k
    assert widths in (sorted(widths), sorted(widths, reverse=True))


@pytest.mark.parametrize(
    ("settings", "step"), [(ANNEALED[0], 0), (ANNEALED[0], 5), (ANNEALED[2], 3), (ANNEALED[1], 10)]
)
def test_t0_a_step_selects_what_its_k_does(settings: TopKSettings, step: int, device: str, generator: Any) -> None:
    sae = made(settings, step, 10).to(device)
    x = integer_inputs(9, D, generator=generator, largest=2).to(device)
    k = k_at(settings, Progress(step, 10))
    plain = made(TopKSettings(k)).to(device)
    code, expected = sae.encode(x), plain.encode(x)
    assert code.pattern.k == width_at(settings, Progress(step, 10))
    assert torch.equal(code.to_dense(), expected.to_dense())
    upstream = integer_inputs(9, N, generator=generator).to(device)
    grads = [
        torch.autograd.grad(made_code.to_dense(), list(of.parameters())[:2], upstream)
        for of, made_code in ((sae, code), (plain, expected))
    ]
    assert all(map(torch.equal, *grads))


def test_inference_has_k_whatever_the_step(generator: torch.Generator) -> None:
    x = integer_inputs(9, D, generator=generator)
    sae = made(replace(ANNEALED[0], multi_topk=0.125), 0, 10).eval()
    code = sae.encode(x)
    assert code.pattern.k == K
    assert torch.equal(code.to_dense(), made(TopKSettings(K)).encode(x).to_dense())
    assert sae.architecture.levels is not None
    assert sae.architecture.levels(sae, code) == {}


def step_of(sae: SAE, x: Tensor, dead: list[int] | None = None) -> Step:
    counter = DeadLatents(N, 1, x.device)
    if dead:
        counter.tokens_since_fired[dead] = 1
    return Step(sae, x, x, sae.encode(x), fvu_weights(x, 2.0), counter.rows(8) if dead else None, 3)


MULTI = [
    (TopKSettings(K, multi_topk=0.125), 1, 1),
    (TopKSettings(13, multi_topk=0.5), 1, 1),  # 4 · k > d_sae
    (TopKSettings(N, multi_topk=0.5), 1, 1),
    (TopKSettings(K, multi_topk=0.125, k_start=8), 1, 5),
    (TopKSettings(K, multi_topk=0.125, k_start=N), 1, 5),  # 4 · k > d_sae for a while
    (TopKSettings(9, multi_topk=0.125, k_start=2), 2, 10),
]


@pytest.mark.parametrize(("settings", "step", "steps"), MULTI)
def test_multi_topk_is_that_of_the_oracle(
    settings: TopKSettings, step: int, steps: int, device: str, monkeypatch: pytest.MonkeyPatch, generator: Any
) -> None:
    monkeypatch.setenv("FLASHSAE_DENSE_ABOVE", "1")
    sae = made(settings, step, steps, integers=False).to(device)
    x = torch.randn(9, D, generator=generator).to(device)
    k = k_at(settings, Progress(step, steps))
    total, terms = step_of(sae, x).total(TrainConfig(auxk_alpha=0.0))
    ours = torch.autograd.grad(total, list(sae.parameters()))
    params = {n: p.detach().double().requires_grad_() for n, p in sae.named_parameters()}
    theirs = oracle("topk").losses(x.double(), params, 2.0, k=k, multi_topk=settings.multi_topk)
    assert terms.keys() == {*theirs, "loss"} - {"loss"}
    for name, expected in theirs.items():
        torch.testing.assert_close(terms[name].double(), expected.detach(), rtol=1e-5, atol=1e-6)
    expected = theirs["fvu"] + settings.multi_topk * theirs["multi_topk_loss"]
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-6)
    for (name, parameter), grad in zip(params.items(), ours):
        (wanted,) = torch.autograd.grad(expected, parameter, retain_graph=True)
        torch.testing.assert_close(grad.double(), wanted, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(("settings", "step", "steps"), MULTI)
def test_what_counts_is_the_code_of_k(settings: TopKSettings, step: int, steps: int, generator: Any) -> None:
    sae, x = made(settings, step, steps), integer_inputs(9, D, generator=generator)
    plain = made(TopKSettings(k_at(settings, Progress(step, steps))))
    assert torch.equal(sae.main_part(sae.encode(x)).to_dense(), plain.encode(x).to_dense())
    torch.testing.assert_close(sae(x), plain(x))


def test_auxk_reconstructs_what_k_latents_leave_over(generator: torch.Generator) -> None:
    sae, x = made(TopKSettings(K, multi_topk=0.125), integers=False), torch.randn(9, D, generator=generator)
    dead = [1, 5, 17]
    found = step_of(sae, x, dead).auxk_loss()
    residual = x - made(TopKSettings(K), integers=False)(x)
    is_dead = torch.zeros(N, dtype=torch.bool).index_fill_(0, torch.tensor(dead), True)
    expected = dense_auxk(x, dict(sae.named_parameters()), residual, is_dead, 3) / residual.square().sum()
    torch.testing.assert_close(found, expected)


SETTINGS = [
    TopKSettings(4, multi_topk=1 / 8),
    TopKSettings(4, k_start=20, k_anneal="exponential"),
    TopKSettings(4, multi_topk=1 / 8, k_start=10, k_anneal_fraction=0.9),
]


def fit(settings: TopKSettings, run: Path | None = None, *, steps: int = 60, resume: bool = False) -> SAE:
    config = TrainConfig(
        batch_tokens=128, lr=3e-3, warmup_steps=5, dead_after_tokens=640, checkpoint_every_steps=10, log_every_steps=1
    )
    return flashsae.fit(
        tokens(4000), d_sae=48, arch=settings, tokens=128 * steps, config=config, run=run, resume=resume, progress=False
    )


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_resumed_training_ends_with_the_same_bytes(
    settings: TopKSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fit(settings, tmp_path / "whole", steps=35)
    from flashsae.train import loop

    steps, step = [], loop.train_step

    def stops(*args: object) -> object:
        if len(steps) == 14:  # in the middle of an annealing
            raise KeyboardInterrupt
        steps.append(1)
        return step(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "train_step", stops)
    with pytest.raises(KeyboardInterrupt):
        fit(settings, tmp_path / "cut", steps=35)
    monkeypatch.setattr(loop, "train_step", step)
    resumed = fit(settings, tmp_path / "cut", steps=35, resume=True)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_training_logs_the_k_of_each_step_and_ends_with_its_last(settings: TopKSettings, tmp_path: Path) -> None:
    import json

    sae = fit(settings, tmp_path / "run")
    log = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for record in (each for each in log if "l0" in each):
        k = k_at(settings, Progress(int(record["step"]) - 1, 60))
        assert record["l0"] <= k
        assert record["l0"] > 0.8 * k or k > 8
        assert ("multi_topk_loss" in record) == bool(settings.multi_topk)
        assert record.get("multi_topk_loss", 0) <= record["fvu"] or record["step"] < 20
    result = flashsae.evaluate(sae, tokens(2000, seed=1))
    assert result.l0 <= 4
    assert result.fvu < 0.5


def test_a_multi_topk_training_serves_other_k_better() -> None:
    multi, plain = (fit(TopKSettings(4, multi_topk=weight), steps=150) for weight in (1 / 8, 0.0))
    x, wide = tokens(2000, seed=1), {}
    for sae in (multi, plain):
        code = ops.encode_topk(x, sae.W_enc_T, sae.b_enc, 16, b_dec=sae.b_dec)
        wide[sae] = (x - ops.decode(code.replace(code.acts.relu()), sae.W_dec, sae.b_dec)).square().sum()
    assert wide[multi] < wide[plain]


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_training_is_that_of_the_dense_trainer(settings: TopKSettings) -> None:
    sae = SAE(SAEConfig(12, 40, arch=settings), dtype=torch.float64).train()
    dense = DenseTrainer(dict(sae.named_parameters()), 1e-2, 2.0, "topk", k=4, multi_topk=settings.multi_topk)
    optimizer = torch.optim.Adam(sae.parameters(), 1e-2, eps=6.25e-10)
    for number in range(20):
        progress, x = Progress(number, 20), tokens(64, number).double()
        sae.set_progress(progress)
        total, _ = Step(sae, x, x, sae.encode(x), fvu_weights(x, 2.0)).total(TrainConfig(auxk_alpha=0.0))
        torch.testing.assert_close(total.detach(), dense.step(x, k=k_at(settings, progress)), rtol=1e-6, atol=0)
        optimizer.zero_grad()
        total.backward()
        sae.project_decoder_grad()
        optimizer.step()
        sae.normalize_decoder()


def test_settings_are_few_words_and_older_ones_go_on() -> None:
    assert repr(SAE(SAEConfig(6, 20, 3))) == "SAE(TopK, d_in=6, d_sae=20, k=3, float32, cpu)"
    assert "k_start=9" in repr(SAE(SAEConfig(6, 20, arch=TopKSettings(3, k_start=9))))
    assert flashsae.sae.SAEConfig(6, 20, 3).arch == TopKSettings(3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"k_start": 0}, "k_start: expected a positive number, got 0"),
        ({"k_start": 21}, "k_start: expected k_start <= d_sae = 20, got 21"),
        ({"multi_topk": -1.0}, "multi_topk: expected a number that is not negative"),
        ({"k_anneal": "cosine"}, "k_anneal: expected"),
        ({"k_anneal_fraction": 1.5}, "k_anneal_fraction: expected a fraction"),
    ],
)
def test_settings_that_cannot_be_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SAEConfig(6, 20, arch=TopKSettings(3, **given))


def test_the_plan_knows_the_most_that_is_selected() -> None:
    architecture = SAEConfig(6, 20, 3).architecture
    assert architecture.most is not None
    for settings, most in ((TopKSettings(3), 3), (TopKSettings(3, k_start=9), 9), (TopKSettings(3, 0.1, 9), 36)):
        assert (architecture.most(settings), architecture.l0(settings)) == (most, 3)


@pytest.mark.parametrize("multi_topk", [0.0, 1 / 8])
def test_a_short_training_on_activations_of_a_language_model(multi_topk: float) -> None:
    x, held_out = activations()
    settings = TopKSettings(16, multi_topk, k_start=None if multi_topk else 48, k_anneal="exponential")
    sae = flashsae.fit(x, arch=settings, d_sae=512, tokens=128 * 80, batch_tokens=128, lr=2e-3, progress=False)
    result = flashsae.evaluate(sae, held_out)
    assert result.fvu < 0.5
    assert 15.5 < result.l0 <= 16


@pytest.mark.gpu
@pytest.mark.parametrize("arch", [*SETTINGS, AbsTopKSettings(4)], ids=str)
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_gpu_training_is_of_few_graphs_and_resumes_bit_for_bit(
    arch: Any, precision: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[object] = []
    graph = torch.cuda.CUDAGraph

    def counted(*args: Any, **given: Any) -> Any:
        graphs.append(graph(*args, **given))
        return graphs[-1]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", counted)
    x = tokens(8192)

    def fit(run: str, *, resume: bool = False) -> SAE:
        return flashsae.fit(
            x, d_sae=256, arch=arch, tokens=256 * 120, batch_tokens=256, device="cuda", precision=precision,
            checkpoint_every_steps=25, dead_after_tokens=10**6, run=tmp_path / run, resume=resume, progress=False,
        )  # fmt: skip

    whole = fit("whole")
    assert len(graphs) <= 2 * (WIDTHS + 1)
    from flashsae.train import loop

    steps, step = [], loop.train_step

    def stops(*args: Any) -> object:
        steps.append(1)
        if len(steps) == 40:  # in the middle of an annealing
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(loop, "train_step", stops)
    with pytest.raises(KeyboardInterrupt):
        fit("cut")
    monkeypatch.setattr(loop, "train_step", step)
    resumed = fit("cut", resume=True)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert flashsae.evaluate(whole, tokens(2000, seed=1)).fvu < 0.6


@pytest.mark.parametrize("multi_topk", [0.0, 0.125])
def test_a_crosscoder_keeps_what_the_norms_of_its_sites_select(multi_topk: float, generator: torch.Generator) -> None:
    saes, x = [], torch.randn(9, 2 * D, generator=generator)
    for given in ({"k_start": 8, "multi_topk": multi_topk}, {}):
        arch = settings_of("crosscoder:topk", k=4 if given else 6, sites=("a", "b"), widths=(D, D), **given)
        sae = SAE(SAEConfig(2 * D, N, arch=arch, d_out=2 * D)).train()
        with torch.no_grad():
            sae.W_dec.mul_(torch.linspace(0.2, 3.0, N)[:, None])
        sae.set_progress(Progress(1, 4))  # linear from 8 to 4 in two steps: 6
        saes.append(sae)
    ours, plain = saes
    assert torch.equal(ours.main_part(ours.encode(x)).to_dense(), plain.encode(x).to_dense())
    no_norms = ops.encode_topk(x, plain.W_enc_T, plain.b_enc, 6)
    assert not torch.equal(plain.encode(x).pattern.latents, no_norms.pattern.latents)
