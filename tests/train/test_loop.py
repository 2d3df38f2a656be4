from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
import torch
from torch import Tensor

from flashsae import TrainConfig, evaluate, ops
from flashsae.data.acts import Batch
from flashsae.data.shuffle import RowShuffle
from flashsae.data.sources import ArraySource
from flashsae.data.synthetic import SuperpositionModel
from flashsae.errors import CheckpointError, DataError
from flashsae.ops import materialize
from flashsae.ops.adam_rows.reference import merge_halves
from flashsae.optim import FactoredAdam, lr_factor
from flashsae.precision import Precision, is_rounded, operand_of
from flashsae.sae.dead import Bounds
from flashsae.testing import DenseTrainer, UnitNormAdam
from flashsae.train import TrainState, init_state, train, train_step
from flashsae.train.checkpoint import list_checkpoints, save_checkpoint
from flashsae.train.state import to_checkpoint

MODEL = SuperpositionModel(16, 40, active=3.0)
X = MODEL.sample(4000, seed=1)
SETTINGS = TrainConfig(
    d_sae=64, k=4, tokens=64 * 60, batch_tokens=64, lr=3e-3, dead_after_tokens=200, checkpoint_every_steps=20
)


def _config(**changes: object) -> TrainConfig:
    return TrainConfig(**{**vars(SETTINGS), **changes}).resolve(16)  # type: ignore[arg-type]


def _state(config: TrainConfig, checkpoints: Path | None = None, x: Tensor = X) -> TrainState:
    batches = RowShuffle(ArraySource(x), config.batch_tokens, seed=config.seed)
    return init_state(config, batches, torch.device("cpu"), checkpoints)


def _bits(state: TrainState) -> dict[str, Tensor]:
    checkpoint = to_checkpoint(state, _config())
    assert checkpoint.step == state.step
    return {name: tensor.clone() for name, tensor in checkpoint.tensors.items() if not name.startswith("rng")}


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_checkpoint_keeps_what_a_gpu_goes_by(tmp_path: Path) -> None:
    state = _state(_config())
    state.dead.bounds = Bounds(3, 5, 16)
    save_checkpoint(tmp_path, to_checkpoint(state, _config()))
    assert _state(_config(), tmp_path).dead.bounds == Bounds(3, 5, 16)


def test_two_runs_of_one_seed_are_equal_and_of_two_are_not() -> None:
    states = [_state(_config(seed=seed)) for seed in (1, 1, 2)]
    for state, seed in zip(states, (1, 1, 2)):
        train(state, _config(seed=seed))
    assert _equal(_bits(states[0]), _bits(states[1]))
    assert not _equal(_bits(states[0]), _bits(states[2]))


def _stop_and_resume(config: TrainConfig, stop_at: int, checkpoints: Path) -> TrainState:
    """Train until a batch is missing, then again from the newest checkpoint."""

    class Stop(Exception):  # noqa: N818
        pass

    def interrupt(state: TrainState) -> None:
        original = state.batches.next_batch

        def next_batch() -> Batch:
            if state.step == stop_at:
                raise Stop
            return original()

        state.batches.next_batch = next_batch  # type: ignore[method-assign]

    stopped = _state(config, checkpoints)
    interrupt(stopped)
    with pytest.raises(Stop):
        train(stopped, config, checkpoints=checkpoints)
    resumed = _state(config, checkpoints)
    assert resumed.step == stop_at // 20 * 20
    train(resumed, config, checkpoints=checkpoints)
    return resumed


@pytest.mark.parametrize("stop_at", [1, 20, 33])
def test_resuming_is_bit_exact(stop_at: int, tmp_path: Path) -> None:
    """A stop between two checkpoints loses steps, never bits."""
    whole = _state(_config())
    train(whole, _config())
    resumed = _stop_and_resume(_config(), stop_at, tmp_path)
    assert _equal(_bits(resumed), _bits(whole))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000040", "step-00000060"]


@pytest.mark.parametrize(
    ("precision", "moments"),
    [("bf16", "float32"), ("float32", "bf16"), ("bf16", "bf16"), ("bf16-int8", "float32"), ("float32-int8", "bf16")],
)
def test_halves_and_narrow_moments_resume_bit_for_bit(
    precision: Precision, moments: Literal["float32", "bf16"], tmp_path: Path
) -> None:
    config = _config(precision=precision, moments=moments, clip_norm=0.5)
    whole = _state(config)
    train(whole, config)
    resumed = _stop_and_resume(config, 33, tmp_path)
    bits = _bits(whole)
    assert _equal(_bits(resumed), bits)
    assert bits["sae.W_dec"].dtype == (torch.bfloat16 if is_rounded(precision) else torch.float32)
    assert bits["adam.W_dec.exp_avg"].dtype == (torch.bfloat16 if moments == "bf16" else torch.float32)
    assert ("adam.W_dec.low" in bits) == is_rounded(precision)
    plain = replace(config, precision=operand_of(precision))  # the CPU screens nothing
    other = _state(plain)
    train(other, plain)
    assert _equal(_bits(other), bits)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_finished_sae_is_float32_and_whole(precision: Precision) -> None:
    config = _config(precision=precision)
    state = _state(config, x=16 * X)
    assert state.scale != 1.0
    finished = train(state, config)
    assert {parameter.dtype for parameter in finished.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in finished.parameters())
    for name in ("W_enc_T", "W_dec"):
        learnt = getattr(state.sae, name).detach()
        whole = getattr(finished, name).detach()
        if precision == "float32":
            assert torch.equal(whole, learnt)
        else:
            low = state.optimizer.state[getattr(state.sae, name)]["low"]
            assert torch.equal(whole, merge_halves(learnt, low))
            assert not torch.equal(whole, learnt.float())
    torch.testing.assert_close(finished.W_dec.norm(dim=1), torch.ones(64))
    torch.testing.assert_close(finished.b_dec, state.sae.b_dec / state.scale)


def test_the_precision_of_the_settings_is_that_of_the_sae() -> None:
    for precision in get_args(Precision):
        state = _state(_config(precision=precision))
        assert state.sae.precision == precision
        assert state.current_sae().precision == precision
        assert state.finished_sae().precision is None


def test_the_step_is_that_of_a_dense_sae_with_plain_adam() -> None:
    """T4 in small: 60 steps beside naive autograd, float32, same data and start."""
    config = _config(auxk_alpha=0.0)
    state = _state(config)
    dense = DenseTrainer(dict(state.sae.named_parameters()), config.lr, state.variance, k=config.arch.k)
    twin = _state(config).batches
    for step in range(60):
        ours = train_step(state, state.batches.next_batch(), config)["loss"].item()
        rate = float(state.optimizer.param_groups[0]["lr"])
        theirs = dense.step(twin.next_batch()["x"] * state.scale, rate).item()
        assert ours == pytest.approx(theirs, rel=1e-3), step
    for name, parameter in state.sae.named_parameters():
        torch.testing.assert_close(parameter.detach(), dense.params[name].detach(), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("betas", [(0.0, 0.999), (0.5, 0.9), (0.9, 0.0)])
def test_betas_and_eps_are_those_of_the_settings(betas: tuple[float, float]) -> None:
    config = _config(auxk_alpha=0.0, betas=betas, eps=1e-3)
    state = _state(config)
    dense = DenseTrainer(dict(state.sae.named_parameters()), config.lr, state.variance, k=config.arch.k)
    dense.optimizer = UnitNormAdam(dense.params.values(), dense.params["W_dec"], config.lr, betas=betas, eps=1e-3)
    twin = _state(config).batches
    for _ in range(12):
        train_step(state, state.batches.next_batch(), config)
        dense.step(twin.next_batch()["x"] * state.scale, float(state.optimizer.param_groups[0]["lr"]))
    for name, parameter in state.sae.named_parameters():
        torch.testing.assert_close(parameter.detach(), dense.params[name].detach(), rtol=1e-4, atol=1e-5)


def test_a_batch_of_equal_tokens_changes_little() -> None:
    config = _config()

    def final_fvu(equal: int | None) -> float:
        state = _state(config)
        for step in range(config.steps):
            x = state.batches.next_batch()
            if equal is not None and step == 5:
                x = {"x": x["x"][equal : equal + 1].repeat(64, 1)}
            metrics = train_step(state, x, config)
            assert metrics["loss"].item() < 4
        return evaluate(state.finished_sae(), X).fvu

    plain = final_fvu(None)
    assert plain < 0.3
    for token in (0, 1):
        assert final_fvu(token) == pytest.approx(plain, rel=0.02)


@pytest.mark.slow
def test_auxk_revives_dead_latents() -> None:
    def run(auxk_alpha: float) -> tuple[int, bool]:
        config = _config(auxk_alpha=auxk_alpha, tokens=64 * 300, k_aux=8, decay_fraction=0.0)
        state = _state(config)
        with torch.no_grad():
            state.sae.W_enc_T[:32] *= 0.05  # half of the latents are never among the k largest
        seen = False
        for _ in range(300):
            seen |= "auxk_loss" in train_step(state, state.batches.next_batch(), config)
        return int(state.dead.mask().sum()), seen

    without, seen_without = run(0.0)
    with_auxk, seen_with = run(1.0)
    assert not seen_without
    assert seen_with
    assert without >= 32
    assert with_auxk < without


def test_auxk_chooses_among_the_dead_latents_only(monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config(k_aux=8)
    state = _state(config)
    dead = [3, 9, 40]
    state.dead.tokens_since_fired[dead] = 10**6
    rows = state.sae.W_enc_T.detach()[dead].clone()
    asked = []
    original = ops.encode_topk

    def encode_topk(x: Tensor, W_enc_T: Tensor, b_enc: Tensor, k: int, **settings: Any) -> Any:
        asked.append((W_enc_T.detach().clone(), k))
        return original(x, W_enc_T, b_enc, k, **settings)

    monkeypatch.setattr(ops, "encode_topk", encode_topk)
    before = state.sae.W_dec.detach().clone()
    metrics = train_step(state, state.batches.next_batch(), config)
    (all_rows, k), (aux_rows, k_aux) = asked
    assert (len(all_rows), k) == (64, config.arch.k)
    assert torch.equal(aux_rows, rows)
    assert k_aux == 3  # no more than there are
    assert metrics["loss"].item() == pytest.approx((metrics["fvu"] + config.auxk_alpha * metrics["auxk_loss"]).item())
    assert bool((state.sae.W_dec[dead] != before[dead]).any(dim=1).all())


def test_the_learning_rate_follows_the_schedule() -> None:
    config = _config(warmup_steps=10, decay_fraction=0.5)
    state = _state(config)
    rates = []
    for _ in range(60):
        train_step(state, state.batches.next_batch(), config)
        rates.append(state.optimizer.param_groups[0]["lr"].item())
        assert all(group["lr"].item() == rates[-1] for group in state.optimizer.param_groups)
    assert rates == pytest.approx([config.lr * lr_factor(step, 60, 10, 30) for step in range(60)])
    assert rates[0] < rates[9] == max(rates) > rates[59] > 0


def test_clipping_bounds_the_norm_of_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = []
    original = FactoredAdam.step

    def step(optimizer: FactoredAdam) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        materialize(parameters)
        state.sae.project_decoder_grad()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in parameters]))
        original(optimizer)

    monkeypatch.setattr(FactoredAdam, "step", step)
    x = _state(_config()).batches.next_batch()
    for clip_norm in (1e9, 1e-3):
        config = _config(clip_norm=clip_norm)
        state = _state(config)
        norm = train_step(state, x, config)["grad_norm"].item()
        assert norm == pytest.approx(gradients[0].norm().item(), rel=1e-5)
    assert norm > 1e-3
    assert gradients[1].norm().item() == pytest.approx(1e-3, rel=1e-3)
    torch.testing.assert_close(gradients[1] / 1e-3, gradients[0] / norm, rtol=1e-2, atol=1e-5)


def test_a_step_leaves_no_gradients_and_no_factors_behind() -> None:
    config = _config()
    state = _state(config)
    train_step(state, state.batches.next_batch(), config)
    assert all(parameter.grad is None for parameter in state.sae.parameters())
    assert all(parameter.grad is None for parameter in state.sae.parameters())


def test_nan_stops_with_step_and_source_and_the_checkpoint_is_intact(tmp_path: Path) -> None:
    config = _config()
    x = X.clone()
    order = _state(config, x=torch.arange(4000.0)[:, None].expand(4000, 16))
    rows = [order.batches.next_batch()["x"][:, 0].long() for _ in range(31)]
    bad = int(rows[30][7])
    clean = _state(config, tmp_path / "clean", x)
    x[bad] = torch.nan
    state = _state(config, tmp_path / "c", torch.where(torch.isnan(x), 0.0, x))  # start as if nothing were wrong
    state.batches = RowShuffle(ArraySource(x), 64, seed=0)
    with pytest.raises(DataError, match=rf"step 30: x: row {bad} holds NaN or Inf .* drop those rows"):
        train(state, config, checkpoints=tmp_path / "c")
    assert [path.name for path in list_checkpoints(tmp_path / "c")] == ["step-00000020"]
    assert clean.step == 0


def test_divergence_is_told_from_bad_data(tmp_path: Path) -> None:
    config = _config(lr=1e30, warmup_steps=0)
    with pytest.raises(DataError, match=r"the loss is .* training diverged\. Lower lr"):
        train(_state(config), config, checkpoints=tmp_path)
    assert list_checkpoints(tmp_path) == []


def test_a_checkpoint_of_other_sizes_is_refused(tmp_path: Path) -> None:
    config = _config()
    train(_state(config, tmp_path), config, checkpoints=tmp_path)
    with pytest.raises(CheckpointError, match=r"does not fit these settings: d_sae was 64 and is 65 now"):
        _state(_config(d_sae=65), tmp_path)
