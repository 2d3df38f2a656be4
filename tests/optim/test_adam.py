from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flashsae import SAE, SAEConfig
from flashsae.data.synthetic import SuperpositionModel
from flashsae.errors import CheckpointError, ConfigError, DtypeError, ShapeError
from flashsae.ops import FactoredGradient, collect_factors, decode_loss, materialize, take_rows
from flashsae.ops.factors import RowFactor
from flashsae.optim import ADAM_EPS, FactoredAdam, default_lr, lr_factor
from flashsae.sae import fvu_weights, token_variance
from flashsae.testing import assert_as_accurate

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
D, N, K, B, LR = 6, 20, 3, 30, 1e-2


def test_the_schedule_rises_stays_and_falls() -> None:
    factors = [lr_factor(step, 100, 10, 20) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9:80] == [1.0] * 71
    assert factors[90] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(0.05)
    assert [lr_factor(step, 3, 0, 0) for step in range(3)] == [1.0] * 3


def test_default_lr_scales_with_the_root_of_the_number_of_latents() -> None:
    assert default_lr(4096) == pytest.approx(2 * default_lr(16384))


def _sae(dtype: torch.dtype = F32) -> SAE:
    sae = SAE(SAEConfig(D, N, K), seed=1, dtype=dtype)
    with torch.no_grad():
        sae.b_enc += 0.1
    return sae


def _loss(sae: SAE, x: Tensor) -> Tensor:
    return sae.decode_loss(sae.encode(x), x, weights=fvu_weights(x, token_variance(x))).loss


def _groups(sae: SAE) -> list[dict[str, Any]]:
    return [{"params": [sae.W_dec], "unit_norm": True}, {"params": [sae.W_enc_T, sae.b_enc, sae.b_dec]}]


def _factored(sae: SAE, **changes: Any) -> FactoredAdam:
    return FactoredAdam(_groups(sae), LR, **changes)


def _plain(sae: SAE) -> torch.optim.Adam:
    groups = [{"params": group["params"]} for group in _groups(sae)]
    return torch.optim.Adam(groups, LR, eps=ADAM_EPS, foreach=False)


@torch.no_grad()
def _give(sae: SAE, gradients: dict[str, Tensor]) -> None:
    for name, parameter in sae.named_parameters():
        parameter.grad = gradients[name].to(parameter.dtype, copy=True)


def _gradients(sae: SAE, x: Tensor) -> dict[str, Tensor]:
    """Return the gradients of an SAE as everybody has them."""
    twin = copy.deepcopy(sae)
    _loss(twin, x).backward()
    return {name: parameter.grad for name, parameter in twin.named_parameters() if parameter.grad is not None}


@torch.no_grad()
def _project_then_step(sae: SAE, adam: torch.optim.Adam) -> None:
    sae.project_decoder_grad()
    adam.step()
    sae.normalize_decoder()


def _batches(generator: torch.Generator, steps: int, dtype: torch.dtype = F32) -> list[Tensor]:
    return [torch.randn(B, D, generator=generator).to(dtype) for _ in range(steps)]


@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_training_is_that_with_torch_adam(dtype: torch.dtype, generator: torch.Generator) -> None:
    ours, theirs, exact = _sae(dtype), _sae(dtype), _sae(F64)
    factored, adam, exact_adam = _factored(ours), _plain(theirs), _plain(exact)
    for x in _batches(generator, 15, dtype):
        gradients = _gradients(ours, x)
        factored.zero_grad()
        _loss(ours, x).backward()
        assert isinstance(ours.W_dec.grad, FactoredGradient)
        assert isinstance(ours.W_enc_T.grad, FactoredGradient)
        factored.step()
        for sae, optimizer in ((theirs, adam), (exact, exact_adam)):
            _give(sae, gradients)
            _project_then_step(sae, optimizer)
        for name, truth in exact.named_parameters():
            mine, peer = ours.get_parameter(name).detach(), theirs.get_parameter(name).detach()
            if dtype == F64:
                torch.testing.assert_close(mine, truth.detach(), rtol=1e-12, atol=1e-14)
            else:
                assert_as_accurate(mine, peer, truth.detach(), name)


def test_ordinary_gradients_are_added_to_the_factors(generator: torch.Generator) -> None:
    ours, theirs = _sae(F64), _sae(F64)
    factored, adam = _factored(ours), _plain(theirs)
    for x in _batches(generator, 3, F64):
        for sae, optimizer in ((ours, factored), (theirs, adam)):
            optimizer.zero_grad()
            (_loss(sae, x) + sae.W_enc_T.square().sum() + (sae.W_dec[:, 0] ** 3).sum()).backward()
        factored.step()
        _project_then_step(theirs, adam)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, theirs.get_parameter(name), rtol=1e-12, atol=1e-14)


def test_gradients_accumulate_over_small_batches(generator: torch.Generator) -> None:
    ours, theirs, exact = _sae(), _sae(), _sae(F64)
    factored, adam, exact_adam = _factored(ours), _plain(theirs), _plain(exact)
    for step in range(4):
        parts = _batches(generator, 3)
        gradients = [_gradients(ours, x) for x in parts]
        for x in parts:
            _loss(ours, x).backward()
        factored.step()
        factored.zero_grad()
        for sae, optimizer in ((theirs, adam), (exact, exact_adam)):
            dtype = sae.W_dec.dtype
            _give(sae, {name: torch.stack([g[name].to(dtype) for g in gradients]).sum(0) for name in gradients[0]})
            _project_then_step(sae, optimizer)
        for name, truth in exact.named_parameters():
            mine, peer = ours.get_parameter(name).detach(), theirs.get_parameter(name).detach()
            assert_as_accurate(mine, peer, truth.detach(), f"{name} after step {step}")


def test_zero_grad_forgets_factors_and_gradients(generator: torch.Generator) -> None:
    sae = _sae()
    optimizer = _factored(sae)
    _loss(sae, _batches(generator, 1)[0]).backward()
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in sae.parameters())
    assert optimizer.clip_grad_norm(1.0).item() == 0.0


@pytest.mark.parametrize("max_norm", [1e-3, 1e3])
def test_clipping_is_that_of_torch(max_norm: float, generator: torch.Generator) -> None:
    ours, theirs = _sae(F64), _sae(F64)
    factored, adam = _factored(ours), _plain(theirs)
    for x in _batches(generator, 3, F64):
        _give(theirs, _gradients(ours, x))
        factored.zero_grad()
        _loss(ours, x).backward()
        theirs.project_decoder_grad()
        norms = [factored.clip_grad_norm(max_norm), nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)]
        assert norms[0].item() == pytest.approx(norms[1].item(), rel=1e-12)
        after = [factored.clip_grad_norm(1e9), nn.utils.clip_grad_norm_(theirs.parameters(), 1e9)]
        assert after[0].item() == pytest.approx(after[1].item(), rel=1e-12)
        factored.step()
        adam.step()
        theirs.normalize_decoder()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, theirs.get_parameter(name), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", ["a code that is decoded once", "a code that is decoded twice", "expanded rows"])
def test_clipping_scales_the_gradient_and_nothing_else(kind: str, generator: torch.Generator) -> None:
    """What backward passes leave may be shared: with the code, with each other, within itself."""
    sae, twin = _sae(F64), _sae(F64)
    x = _batches(generator, 1, F64)[0]
    optimizer = _factored(sae)
    acts = []
    for model in (sae, twin):
        code = model.encode(x)
        if kind == "expanded rows":
            slots = torch.arange(N, dtype=torch.int32)
            take_rows(model.W_dec, torch.arange(N), slots).sum().backward()
        else:
            loss = (x - model.decode(code)).square().sum()
            if "twice" in kind:
                loss = loss + (x - 2 * model.decode(code)).square().sum()
            loss.backward()
        acts.append(code.top_acts.detach().clone() if model is twin else code.top_acts)
    optimizer.clip_grad_norm(1e-3)
    assert torch.equal(*acts)
    twin.project_decoder_grad()
    nn.utils.clip_grad_norm_(twin.parameters(), 1e-3)
    materialize(sae.parameters())
    sae.project_decoder_grad()
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(parameter.grad, twin.get_parameter(name).grad, rtol=1e-9, atol=1e-15)


def test_schedulers_of_torch_change_the_learning_rate_in_place(generator: torch.Generator) -> None:
    ours, theirs = _sae(F64), _sae(F64)
    factored, adam = _factored(ours), _plain(theirs)
    rates = [group["lr"] for group in factored.param_groups]
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / 4))
        for optimizer in (factored, adam)
    ]
    for x in _batches(generator, 6, F64):
        _give(theirs, _gradients(ours, x))
        factored.zero_grad()
        _loss(ours, x).backward()
        before = ours.W_enc_T.detach().clone()
        factored.step()
        assert torch.equal(before, ours.W_enc_T) == (rates[0].item() == 0.0)
        _project_then_step(theirs, adam)
        for scheduler in schedulers:
            scheduler.step()
        assert [rate.item() for rate in rates] == [group["lr"] for group in adam.param_groups]
    assert all(rate is group["lr"] for rate, group in zip(rates, factored.param_groups))
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, theirs.get_parameter(name), rtol=1e-12, atol=1e-14)


def _steps(sae: SAE, optimizer: FactoredAdam, batches: list[Tensor]) -> None:
    for x in batches:
        optimizer.zero_grad()
        _loss(sae, x).backward()
        optimizer.step()


KINDS = [{}, {"split_weights": True}, {"state_dtype": BF16}, {"split_weights": True, "state_dtype": BF16}]
KIND_NAMES = ["float32", "split", "bfloat16 moments", "split, bfloat16 moments"]


@pytest.mark.parametrize("kind", KINDS, ids=KIND_NAMES)
def test_a_saved_state_continues_bit_for_bit(kind: dict[str, Any], generator: torch.Generator) -> None:
    batches = _batches(generator, 8)
    whole, first, second = _sae(), _sae(), _sae()
    _steps(whole, _factored(whole, **kind), batches)
    optimizer = _factored(first, **kind)
    _steps(first, optimizer, batches[:4])
    file = io.BytesIO()
    torch.save({"sae": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=False)
    resumed = FactoredAdam(_groups(second), 1.0, **kind)
    second.load_state_dict(saved["sae"])
    resumed.load_state_dict(saved["optimizer"])
    for parameter, other in zip(second.parameters(), first.parameters()):
        for name, tensor in optimizer.state[other].items():
            assert resumed.state[parameter][name].dtype == tensor.dtype, name
            assert torch.equal(resumed.state[parameter][name], tensor), name
    _steps(second, resumed, batches[4:])
    for name, parameter in second.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name)), name


def test_loading_a_state_keeps_the_tensors_that_a_captured_graph_reads() -> None:
    sae = _sae()
    optimizer = _factored(sae)
    steps = [optimizer.state[parameter]["step"] for parameter in sae.parameters()]
    rates = [group["lr"] for group in optimizer.param_groups]
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        group["lr"].fill_(0.5)
    for state in saved["state"].values():
        state["step"].fill_(7.0)
    optimizer.load_state_dict(saved)
    assert all(rate is group["lr"] for rate, group in zip(rates, optimizer.param_groups))
    assert all(step is optimizer.state[parameter]["step"] for step, parameter in zip(steps, sae.parameters()))
    assert [tensor.item() for tensor in (*rates, *steps)] == [0.5] * 2 + [7.0] * 4


def test_a_state_of_other_parameters_is_refused(generator: torch.Generator) -> None:
    sae = _sae()
    optimizer = _factored(sae)
    _steps(sae, optimizer, _batches(generator, 2))
    before = copy.deepcopy(optimizer.state_dict())
    wrong = [
        _factored(_sae(), split_weights=True),
        _factored(SAE(SAEConfig(D, N + 1, K))),
        FactoredAdam(_sae().parameters(), LR),
        FactoredAdam([_sae().W_dec], LR),
    ]
    for other in wrong:
        with pytest.raises(CheckpointError, match="the state does not fit this optimiser"):
            optimizer.load_state_dict(other.state_dict())
    for number, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(tensor, before["state"][number][name]) for name, tensor in state.items())


def test_a_group_that_is_added_later_is_trained(generator: torch.Generator) -> None:
    sae, twin = _sae(F64), _sae(F64)
    optimizer, adam = FactoredAdam([sae.W_dec], LR), torch.optim.Adam([twin.W_dec], LR, eps=ADAM_EPS, foreach=False)
    optimizer.add_param_group({"params": [sae.W_enc_T, sae.b_enc]})
    adam.add_param_group({"params": [twin.W_enc_T, twin.b_enc]})
    for x in _batches(generator, 3, F64):
        for model, either in ((sae, optimizer), (twin, adam)):
            either.zero_grad()
            _loss(model, x).backward()
            either.step()
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(parameter, twin.get_parameter(name), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("unit_norm", [False, True])
def test_split_weights_lose_no_bit_of_what_float32_weights_learn(
    unit_norm: bool, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    monkeypatch.setattr("flashsae.optim.adam._ROWS", 7)  # rows are split and merged in pieces
    start = nn.functional.normalize(torch.randn(N, D, generator=generator), dim=1)
    whole, split = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizers = [
        FactoredAdam([parameter], 1e-4, unit_norm=unit_norm, split_weights=parameter is split)
        for parameter in (whole, split)
    ]
    assert (whole.dtype, split.dtype) == (F32, BF16)
    slots = torch.arange(N, dtype=torch.int32)
    for _ in range(50):
        gradient = torch.randn(N, D, generator=generator)
        for parameter, optimizer in zip((whole, split), optimizers):
            optimizer.zero_grad()
            parameter.grad = FactoredGradient([RowFactor(gradient.clone(), slots)], parameter)
            optimizer.clip_grad_norm(5.0)
            optimizer.step()
        merged = optimizers[1].float32_weights(split)
        assert merged.dtype == F32
        assert torch.equal(merged, whole)
    assert not torch.equal(merged, split.float())
    assert torch.equal(optimizers[0].float32_weights(whole), whole)
    torch.testing.assert_close(split.float(), whole.detach(), rtol=2**-8, atol=0.0)


def test_products_of_a_split_sae_read_bfloat16_and_it_learns_as_well(generator: torch.Generator) -> None:
    model = SuperpositionModel(D, 2 * D, active=1.5)
    x = model.sample(4000, seed=1)
    losses = {}
    for name, kind in zip(KIND_NAMES, KINDS):
        sae = _sae()
        optimizer = _factored(sae, **kind)
        assert sae.W_dec.dtype == sae.W_enc_T.dtype == (BF16 if "split_weights" in kind else F32)
        assert sae.b_enc.dtype == sae.b_dec.dtype == F32
        _steps(sae, optimizer, list(x.split(50)))
        losses[name] = _loss(sae, x).item()
    assert losses["float32"] < 0.5
    assert losses == pytest.approx(dict.fromkeys(losses, losses["float32"]), rel=0.05)
    assert len(set(losses.values())) == 4


def test_bfloat16_moments_follow_those_of_float32(generator: torch.Generator) -> None:
    """Rounded to nearest, exp_avg_sq would stand still: a step changes it by less than half a unit of bfloat16."""
    wide, narrow = (nn.Parameter(torch.zeros(40, 25)) for _ in range(2))
    optimizers = [FactoredAdam([wide], LR), FactoredAdam([narrow], LR, state_dtype=BF16)]
    for _ in range(400):
        gradient = 1 + 0.1 * torch.randn(40, 25, generator=generator)
        for parameter, optimizer in zip((wide, narrow), optimizers):
            parameter.grad = gradient.clone()
            optimizer.step()
    for name in ("exp_avg", "exp_avg_sq"):
        theirs, ours = optimizers[0].state[wide][name], optimizers[1].state[narrow][name]
        assert (theirs.dtype, ours.dtype) == (F32, BF16)
        assert ours.double().mean().item() == pytest.approx(theirs.double().mean().item(), rel=2e-3)
        torch.testing.assert_close(ours.float(), theirs, rtol=0.1, atol=0.0)
    torch.testing.assert_close(narrow, wide, rtol=0.05, atol=0.0)
    assert narrow.mean().item() == pytest.approx(wide.mean().item(), rel=2e-3)


def test_moments_of_biases_and_float64_weights_are_never_rounded() -> None:
    bias, wide = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3, 2, dtype=F64))
    optimizer = FactoredAdam([bias, wide], LR, state_dtype=BF16)
    assert optimizer.state[bias]["exp_avg_sq"].dtype == F32
    assert optimizer.state[wide]["exp_avg_sq"].dtype == F64


def test_unit_norm_is_for_matrices() -> None:
    weights, bias = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.full((4,), 5.0))
    optimizer = FactoredAdam([weights, bias], LR, unit_norm=True)
    weights.grad, bias.grad = torch.ones(4, 3), torch.ones(4)
    optimizer.step()
    torch.testing.assert_close(weights.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(bias, torch.full((4,), 5.0 - LR))


def test_weight_decay_is_that_of_torch(generator: torch.Generator) -> None:
    start = torch.randn(4, 3, generator=generator, dtype=F64)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    settings = {"betas": (0.8, 0.9), "eps": 1e-4, "weight_decay": 0.3}
    optimizers = [FactoredAdam([ours], LR, **settings), torch.optim.Adam([theirs], LR, **settings, foreach=False)]  # type: ignore[arg-type]
    for _ in range(5):
        gradient = torch.randn(4, 3, generator=generator, dtype=F64)
        for parameter, optimizer in zip((ours, theirs), optimizers):
            parameter.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_factors_of_aux_and_main_loss_meet_in_one_step(generator: torch.Generator) -> None:
    """A sparse part and a part of some rows, as AuxK leaves them."""
    slots = torch.full((N,), -1, dtype=torch.int32)
    latents = torch.tensor([4, 11])
    slots[latents] = torch.arange(2, dtype=torch.int32)
    start, x = torch.randn(N, D, generator=generator, dtype=F64), _batches(generator, 1, F64)[0]
    codes = torch.rand(B, N, generator=generator).topk(K).indices
    acts = torch.rand(B, K, generator=generator, dtype=F64)
    results = []
    for make in (FactoredAdam, torch.optim.Adam):
        W = nn.Parameter(start.clone())
        optimizer = make([W], LR, eps=ADAM_EPS)
        for _ in range(3):
            optimizer.zero_grad()
            loss = decode_loss(acts, codes, W, None, x).loss
            (loss + (take_rows(W, latents, slots) ** 4).sum()).backward()
            optimizer.step()
        results.append(W.detach())
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-14)


WRONG = [
    ({"lr": -1.0}, r"lr, eps, weight_decay: expected numbers that are not negative, .* got -1\.0"),
    ({"lr": float("nan")}, "lr, eps, weight_decay: .* got nan"),
    ({"eps": -1e-8}, r"lr, eps, weight_decay: .* got 0\.01, -1e-08"),
    ({"weight_decay": -0.1}, "lr, eps, weight_decay"),
    ({"betas": (1.0, 0.999)}, r"betas in \[0, 1\), got .* \(1\.0, 0\.999\)"),
    ({"betas": (0.9, -0.1)}, r"betas in \[0, 1\)"),
    ({"state_dtype": torch.float16}, r"state_dtype: expected torch\.float32 or torch\.bfloat16, got torch\.float16"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_settings_out_of_range_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FactoredAdam([nn.Parameter(torch.zeros(3, 2))], **{"lr": LR, **changes})


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_settings_of_a_group_are_checked_too(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FactoredAdam([{"params": [nn.Parameter(torch.zeros(3, 2))], **changes}], LR)


def test_a_group_that_is_refused_leaves_the_optimiser_as_it_was(generator: torch.Generator) -> None:
    sae = _sae()
    optimizer = FactoredAdam([sae.W_dec], LR)
    with pytest.raises(ConfigError, match="lr, eps, weight_decay"):
        optimizer.add_param_group({"params": [sae.W_enc_T], "lr": -1.0})
    _steps(sae, optimizer, _batches(generator, 1))
    assert [group["params"] for group in optimizer.param_groups] == [[sae.W_dec]]


def test_weights_that_cannot_be_split_are_refused() -> None:
    for dtype in (F64, BF16):
        with pytest.raises(DtypeError, match=f"split_weights: expected float32 parameters, got {dtype}"):
            FactoredAdam([nn.Parameter(torch.zeros(3, 2, dtype=dtype))], LR, split_weights=True)


def test_parameters_that_are_not_contiguous_are_refused() -> None:
    for parameter in (torch.zeros(3, 2).T, torch.zeros(6)[::2]):
        with pytest.raises(ShapeError, match="params: expected contiguous parameters, got one of shape"):
            FactoredAdam([nn.Parameter(parameter)], LR)


def test_a_parameter_that_collects_already_may_be_optimised(generator: torch.Generator) -> None:
    sae = _sae()
    collect_factors(sae.W_dec)
    _loss(sae, _batches(generator, 1)[0]).backward()
    before = sae.W_dec.detach().clone()
    FactoredAdam([sae.W_dec], LR).step()
    assert not torch.equal(sae.W_dec, before)


def test_a_closure_is_called_with_gradients_on_and_its_loss_returned() -> None:
    parameter = nn.Parameter(torch.ones(2, 3))
    optimizer = FactoredAdam([parameter], LR)

    def closure() -> float:
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 6.0
    assert bool((parameter < 1).all())


def test_a_parameter_without_any_gradient_is_passed_over() -> None:
    parameter = nn.Parameter(torch.ones(2, 3))
    optimizer = FactoredAdam([parameter], LR, weight_decay=0.1)
    optimizer.step()
    assert torch.equal(parameter, torch.ones(2, 3))


def test_a_state_of_other_moments_is_refused() -> None:
    narrow = FactoredAdam([nn.Parameter(torch.ones(2, 3))], LR, state_dtype=torch.bfloat16)
    wide = FactoredAdam([nn.Parameter(torch.ones(2, 3))], LR)
    with pytest.raises(CheckpointError, match="the same split_weights and state_dtype"):
        narrow.load_state_dict(wide.state_dict())


def test_a_group_that_is_refused_leaves_nothing_behind() -> None:
    optimizer = FactoredAdam([nn.Parameter(torch.ones(2, 3))], LR)
    with pytest.raises(DtypeError, match="split_weights: expected float32"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 3).double())], "split_weights": True})
    assert len(optimizer.param_groups) == 1
    optimizer.step()
