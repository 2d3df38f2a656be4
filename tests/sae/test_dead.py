from __future__ import annotations

from copy import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from flashsae import SAE, AbsTopKSettings, SAEConfig, SparseCode, TopKSettings, ops
from flashsae.errors import ConfigError
from flashsae.ops.validate import Precision
from flashsae.sae import fvu_weights
from flashsae.sae.dead import LEAST_RESIDUAL, DeadLatents, DeadRows, _rounded_up, auxk_loss
from flashsae.testing import dense_auxk

D, N, K, B = 6, 30, 4, 13
DEAD = [0, 3, 7, 8, 21]


def test_dead_counts_tokens_and_selected_zeros_do_not_count() -> None:
    dead = DeadLatents(3, after_tokens=4)
    dead.update(SparseCode.topk(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[0, 1], [1, 0]]), 3))
    assert dead.tokens_since_fired.tolist() == [0, 2, 2]
    assert dead.mask().tolist() == [False, False, False]
    dead.update(SparseCode.topk(torch.tensor([[0.5], [0.5]]), torch.tensor([[1], [1]]), 3))
    assert dead.tokens_since_fired.tolist() == [2, 0, 4]
    assert dead.mask().tolist() == [False, False, True]
    dead.update(SparseCode.topk(torch.tensor([[0.5]]), torch.tensor([[2]]), 3))
    assert dead.mask().tolist() == [False, False, False]


def _table(dead: list[int], capacity: int) -> DeadRows:
    counter = DeadLatents(N, after_tokens=10)
    counter.tokens_since_fired[dead] = 10
    return counter.rows(capacity)


def test_the_table_lists_the_dead_in_order_and_marks_what_is_left_over() -> None:
    latents, is_dead, slots = _table([21, 3, 8], 5)
    assert latents.tolist() == [3, 8, 21, 0, 0]
    assert is_dead.tolist() == [True, True, True, False, False]
    assert slots.dtype == torch.int32
    assert {latent: slot for latent, slot in enumerate(slots.tolist()) if slot >= 0} == {3: 0, 8: 1, 21: 2}


@pytest.mark.parametrize("dead", [[], [0], list(range(N))])
def test_tables_of_none_of_one_and_of_all(dead: list[int]) -> None:
    latents, is_dead, slots = _table(dead, N)
    assert latents[is_dead].tolist() == dead
    assert slots.tolist() == [dead.index(latent) if latent in dead else -1 for latent in range(N)]


def test_there_is_no_table_of_nothing() -> None:
    with pytest.raises(ConfigError, match=r"capacity: expected at least 1, got 0\. No latent can be dead then"):
        _table([], 0)


def test_on_the_cpu_the_capacity_is_the_number_of_the_dead() -> None:
    counter = DeadLatents(N, after_tokens=10)
    assert counter.capacity(0, batch_tokens=64) == 0
    counter.tokens_since_fired[[1, 5]] = 10
    counter.tokens_since_fired[9] = 9
    assert counter.capacity(1, batch_tokens=64) == 2


def _fire(counter: DeadLatents, generator: torch.Generator, tokens: int) -> None:
    """Let every latent fire with a chance between 0.01 and 0.4 in a step of so many tokens."""
    chance = torch.linspace(0.01, 0.4, len(counter.tokens_since_fired))
    fired = torch.rand(len(chance), generator=generator) < chance
    everything = torch.arange(len(chance)).expand(tokens, -1)
    counter.update(SparseCode.topk(fired.float().expand(tokens, -1), everything, len(chance)))


@pytest.mark.parametrize("after_steps", [0.5, 1, 3, 20, 70, 600])
def test_on_a_gpu_the_capacity_bounds_the_dead_and_a_resumed_run_has_the_same(
    after_steps: float, generator: torch.Generator
) -> None:
    counter = DeadLatents(2000, after_tokens=int(8 * after_steps))
    capacities, saved = [], {}
    for step in range(200):
        capacities.append(counter._bounded_capacity(step, 8))
        assert capacities[-1] >= int(counter.mask().sum())
        _fire(counter, generator, 8)
        if step == 100:  # a checkpoint
            counter.finish_reading()
            saved = {"tokens": counter.tokens_since_fired.clone(), "bounds": copy(counter.bounds)}
            rng = generator.get_state()
    resumed = DeadLatents(2000, after_tokens=int(8 * after_steps))
    resumed.tokens_since_fired, resumed.bounds = saved["tokens"], saved["bounds"]
    generator.set_state(rng)
    for step in range(101, 200):
        assert resumed._bounded_capacity(step, 8) == capacities[step]
        _fire(resumed, generator, 8)


@pytest.mark.parametrize("after_steps", [20, 600])
def test_on_a_gpu_the_capacity_is_near_the_number_of_the_dead(after_steps: int) -> None:
    counter = DeadLatents(2000, after_tokens=8 * after_steps)
    counter.tokens_since_fired[:100] = 8 * after_steps
    everything = torch.arange(100, 2000).expand(8, -1)
    for step in range(200):
        assert counter._bounded_capacity(step, 8) == 112
        counter.update(SparseCode.topk(torch.ones(8, 1900), everything, 2000))


def test_a_capacity_is_rounded_up_by_an_eighth_at_most() -> None:
    for count in range(1, 5000):
        rounded = _rounded_up(count, 1 << 20)
        assert count <= rounded <= max(count * 9 / 8, count + 15)
        assert rounded % 16 == 0
        assert _rounded_up(count, count + 1) in (count, count + 1)
    assert len({_rounded_up(count, 1 << 20) for count in range(1, 5000)}) < 100


def _sae(dtype: torch.dtype = torch.float64, *, signed: bool = False) -> SAE:
    arch = AbsTopKSettings(K) if signed else TopKSettings(K)
    sae = SAE(SAEConfig(D, N, arch=arch), seed=2, dtype=dtype)
    with torch.no_grad():
        sae.b_enc.normal_(std=0.3, generator=torch.Generator().manual_seed(3))
        sae.b_dec.normal_(std=0.3, generator=torch.Generator().manual_seed(4))
    return sae


def _dense_auxk(sae: SAE, x: Tensor, residual: Tensor, dead: list[int], k_aux: int) -> Tensor:
    """Write AuxK as the paper does, over all latents."""
    is_dead = torch.zeros(N, dtype=torch.bool).index_fill_(0, torch.tensor(dead), True)
    signed = sae.architecture.signed
    found = dense_auxk(x, dict(sae.named_parameters()), residual, is_dead, k_aux, signed=signed)
    return found / residual.square().sum()


def _auxk(sae: SAE, x: Tensor, residual: Tensor, dead: DeadRows, k_aux: int, variance: float = 1.0) -> Tensor:
    """Return the loss for a residual as it may come out of the decode."""
    weights = fvu_weights(x, variance)
    decoded = ops.DecodeLoss((weights * residual.square().sum(1)).sum(), x - residual, residual)
    return auxk_loss(sae, x, decoded, weights, dead, k_aux)


def _loss_and_gradients(sae: SAE, loss: Tensor) -> dict[str, Tensor]:
    sae.zero_grad()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in sae.named_parameters() if parameter.grad is not None}
    return {"loss": loss.detach(), **gradients}


@pytest.mark.parametrize("capacity", [len(DEAD), 16, N])
@pytest.mark.parametrize("k_aux", [1, 3, len(DEAD), 12])
@pytest.mark.parametrize("signed", [False, True])
def test_auxk_is_that_of_the_paper_whatever_rows_are_left_over(
    k_aux: int, capacity: int, signed: bool, generator: torch.Generator
) -> None:
    sae = _sae(signed=signed)
    x, residual = (torch.randn(B, D, generator=generator, dtype=torch.float64) for _ in range(2))
    ours = _loss_and_gradients(sae, _auxk(sae, x, residual, _table(DEAD, capacity), k_aux))
    theirs = _loss_and_gradients(sae, _dense_auxk(sae, x, residual, DEAD, k_aux))
    assert ours.keys() == theirs.keys() == {"loss", "W_enc_T", "W_dec", "b_enc", "b_dec"}
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-12, atol=1e-14, msg=name)
    for name in ("W_enc_T", "W_dec", "b_enc"):
        touched = ours[name].reshape(N, -1).abs().sum(1).nonzero()[:, 0].tolist()
        assert touched == DEAD, name


def test_without_dead_latents_the_loss_and_its_gradients_are_zero(generator: torch.Generator) -> None:
    sae = _sae()
    x, residual = (torch.randn(B, D, generator=generator, dtype=torch.float64) for _ in range(2))
    ours = _loss_and_gradients(sae, _auxk(sae, x, residual, _table([], 16), 3))
    assert ours["loss"].item() == 0.0
    assert all(not bool(tensor.any()) for tensor in ours.values())


def test_auxk_is_one_where_nothing_is_explained_and_its_target_is_fixed(generator: torch.Generator) -> None:
    sae = _sae()
    with torch.no_grad():
        sae.W_dec.zero_()
    x = torch.randn(400, D, generator=generator, dtype=torch.float64)
    residual = torch.randn(400, D, generator=generator, dtype=torch.float64, requires_grad=True)
    loss = _auxk(sae, x, residual, _table(DEAD, 8), 3)
    assert loss.item() == pytest.approx(1.0, rel=1e-12)
    loss.backward()
    assert residual.grad is None
    assert sae.W_dec.grad is not None


def test_auxk_does_not_depend_on_the_unit_of_the_residual(generator: torch.Generator) -> None:
    sae = _sae()
    with torch.no_grad():
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    x, residual = (torch.randn(B, D, generator=generator, dtype=torch.float64) for _ in range(2))
    one, eight = (_auxk(sae, s * x, s * residual, _table(DEAD, 8), 3, variance=float(s * s)).item() for s in (1, 8))
    assert one == pytest.approx(eight, rel=1e-12)


def test_a_batch_that_is_met_exactly_does_not_blow_up_the_loss(generator: torch.Generator) -> None:
    sae, x = _sae(), torch.randn(B, D, generator=generator, dtype=torch.float64)
    nearly, exactly = (
        _loss_and_gradients(sae, _auxk(sae, x, residual * x, _table(DEAD, 8), 3, variance=float(D)))
        for residual in (1e-30, 0.0)
    )
    code_squares = nearly["loss"].item() * LEAST_RESIDUAL
    assert 0 < code_squares < 10  # of the order of the variance: over a thousandth of it, and over nothing less
    for name, expected in nearly.items():
        torch.testing.assert_close(exactly[name], expected, msg=name)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_in_kernels_rows_that_stand_for_no_latent_are_never_active(
    precision: Precision, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("FLASHSAE_BACKEND", "triton")
    monkeypatch.setenv("FLASHSAE_DENSE_ABOVE", "1")
    codes = []
    original = ops.encode_topk

    def encode_topk(*args: Any, **kwargs: Any) -> Any:
        codes.append(original(*args, **kwargs))
        return codes[-1]

    monkeypatch.setattr(ops, "encode_topk", encode_topk)
    sae = _sae(torch.float32)
    sae.precision = precision
    with torch.no_grad():
        sae.W_enc_T[0] = 100.0  # the latent whose row stands in the rows left over, which lives
    x = torch.randn(B, D, generator=generator) * 10.0 ** torch.linspace(-3, 6, B)[:, None]
    residual = torch.randn(B, D, generator=generator)
    dead = DEAD[1:]
    results = [_loss_and_gradients(sae, _auxk(sae, x, residual, _table(dead, capacity), 8)) for capacity in (4, 16)]
    acts, indices = codes[1].acts.relu(), codes[1].pattern.latents
    assert acts.shape == (B, 8)
    assert bool((indices >= len(dead)).any())
    assert not bool(acts[indices >= len(dead)].any())
    assert bool(acts[indices < len(dead)].any())
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, msg=name)
