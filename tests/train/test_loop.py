from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dense import dense_step_losses
from flashsae import SAE, SparseCode, TrainConfig
from flashsae.data.shuffle import RowShuffle
from flashsae.data.sources import ArraySource
from flashsae.data.synthetic import SuperpositionModel
from flashsae.errors import CheckpointError, DataError
from flashsae.io.checkpoint import list_checkpoints
from flashsae.optim import lr_factor
from flashsae.train import TrainState, init_state, train, train_step
from flashsae.train.config import ResolvedConfig
from flashsae.train.loop import to_checkpoint

MODEL = SuperpositionModel(16, 40, active=3.0)
X = MODEL.sample(4000, seed=1)
SETTINGS = TrainConfig(
    d_sae=64, k=4, tokens=64 * 60, batch_tokens=64, lr=3e-3, dead_after_tokens=200, checkpoint_every_steps=20
)


def _config(**changes: object) -> ResolvedConfig:
    return TrainConfig(**{**vars(SETTINGS), **changes}).resolve(16)  # type: ignore[arg-type]


def _state(config: ResolvedConfig, checkpoints: Path | None = None, x: Tensor = X) -> TrainState:
    batches = RowShuffle(ArraySource(x), config.batch_tokens, seed=config.seed)
    return init_state(config, batches, torch.device("cpu"), checkpoints)


def _bits(state: TrainState) -> dict[str, Tensor]:
    checkpoint = to_checkpoint(state, _config())
    assert checkpoint.step == state.step
    return {name: tensor.clone() for name, tensor in checkpoint.tensors.items() if not name.startswith("rng")}


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_two_runs_of_one_seed_are_equal_and_of_two_are_not() -> None:
    states = [_state(_config(seed=seed)) for seed in (1, 1, 2)]
    for state, seed in zip(states, (1, 1, 2)):
        train(state, _config(seed=seed))
    assert _equal(_bits(states[0]), _bits(states[1]))
    assert not _equal(_bits(states[0]), _bits(states[2]))


@pytest.mark.parametrize("stop_at", [1, 20, 33])
def test_resuming_is_bit_exact(stop_at: int, tmp_path: Path) -> None:
    """A stop between two checkpoints loses steps, never bits."""
    config = _config()
    whole = _state(config)
    train(whole, config)

    class Stop(Exception):  # noqa: N818
        pass

    def interrupt(state: TrainState) -> None:
        original = state.batches.next_batch

        def next_batch() -> Tensor:
            if state.step == stop_at:
                raise Stop
            return original()

        state.batches.next_batch = next_batch  # type: ignore[method-assign]

    stopped = _state(config, tmp_path)
    interrupt(stopped)
    with pytest.raises(Stop):
        train(stopped, config, checkpoints=tmp_path)
    resumed = _state(config, tmp_path)
    assert resumed.step == stop_at // 20 * 20
    train(resumed, config, checkpoints=tmp_path)
    assert _equal(_bits(resumed), _bits(whole))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000060"]


def test_the_step_is_that_of_a_dense_sae_with_plain_adam() -> None:
    """T4 in small: 60 steps beside naive autograd, float32, same data and start."""
    config = _config(auxk_alpha=0.0)
    state = _state(config)
    params = {name: p.detach().clone().requires_grad_() for name, p in state.sae.named_parameters()}
    adam = torch.optim.Adam(params.values(), lr=config.lr, eps=6.25e-10, foreach=False)
    twin = _state(config).batches
    for step in range(60):
        x = state.batches.next_batch()
        ours = train_step(state, x, config)["loss"].item()
        _, loss = dense_step_losses(twin.next_batch(), params, config.k)
        assert ours == pytest.approx(loss.item(), rel=1e-3), step
        adam.zero_grad()
        loss.backward()
        W_dec = params["W_dec"]
        with torch.no_grad():
            assert W_dec.grad is not None
            W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
            adam.param_groups[0]["lr"] = state.optimizer.param_groups[0]["lr"]
            adam.step()
            W_dec /= W_dec.norm(dim=1, keepdim=True)
    for name, parameter in state.sae.named_parameters():
        torch.testing.assert_close(parameter.detach(), params[name].detach(), rtol=1e-2, atol=1e-3)


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
    state.dead.tokens_since_fired[[3, 9, 40]] = 10**6
    asked = []
    original = SAE.encode_aux

    def encode_aux(sae: SAE, x: Tensor, mask: Tensor, k_aux: int) -> tuple[SparseCode, SparseCode]:
        asked.append((mask.nonzero()[:, 0].tolist(), k_aux))
        return original(sae, x, mask, k_aux)

    monkeypatch.setattr(SAE, "encode_aux", encode_aux)
    train_step(state, state.batches.next_batch(), config)
    assert asked == [([3, 9, 40], 3)]  # no more than there are


def test_the_learning_rate_follows_the_schedule() -> None:
    config = _config(warmup_steps=10, decay_fraction=0.5)
    state = _state(config)
    rates = []
    for _ in range(60):
        train_step(state, state.batches.next_batch(), config)
        rates.append(state.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([config.lr * lr_factor(step, 60, 10, 30) for step in range(60)])
    assert rates[0] < rates[9] == max(rates) > rates[59] > 0


def test_clipping_bounds_the_norm_of_the_gradient() -> None:
    config = _config(clip_norm=1e-3)
    state = _state(config)
    norm = train_step(state, state.batches.next_batch(), config)["grad_norm"]
    gradient = torch.cat([p.grad.flatten() for p in state.sae.parameters() if p.grad is not None])
    assert norm.item() > 1e-3
    assert gradient.norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_nan_stops_with_step_and_source_and_the_checkpoint_is_intact(tmp_path: Path) -> None:
    config = _config()
    x = X.clone()
    order = _state(config, x=torch.arange(4000.0)[:, None].expand(4000, 16))
    rows = [order.batches.next_batch()[:, 0].long() for _ in range(31)]
    bad = int(rows[30][7])
    clean = _state(config, tmp_path / "clean", x)
    x[bad] = torch.nan
    state = _state(config, tmp_path / "c", torch.where(torch.isnan(x), 0.0, x))  # start as if nothing were wrong
    state.batches = RowShuffle(ArraySource(x), 64, seed=0)
    with pytest.raises(DataError, match=rf"step 30: x: row {bad} holds NaN or Inf .* checkpoints are intact"):
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
