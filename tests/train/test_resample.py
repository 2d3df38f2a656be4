"""Dead latents that start again from tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import flashsae
from flashsae import TopKSettings, TrainConfig
from flashsae.architecture import Parameter
from flashsae.architecture import description as architectures
from flashsae.architectures.topk import ARCHITECTURE as TOPK
from flashsae.data.shuffle import RowShuffle
from flashsae.data.sources import ArraySource
from flashsae.data.synthetic import SuperpositionModel
from flashsae.settings.kinds import NonNegativeInt
from flashsae.train import TrainState, init_state, train, train_step
from flashsae.train import resample as resampling
from flashsae.train.checkpoint import save_checkpoint
from flashsae.train.state import to_checkpoint

X = SuperpositionModel(16, 40, active=3.0).sample(1000, seed=1)
EVERY, B, DEAD = 10, 32, [0, 5, 6, 40, 63]


@dataclass(frozen=True)
class RestartingSettings(TopKSettings):
    """Settings of a TopK that resamples."""

    resample_every_steps: NonNegativeInt = 0


@dataclass(frozen=True)
class RestartingTranscoderSettings(RestartingSettings):
    """Settings of a transcoder that resamples."""


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    gain = Parameter("gain", ("d_sae",), "what values are multiplied by", 1.5)

    def encode(sae: Any, x: Tensor) -> Any:
        code = TOPK.encode(sae, x)
        return code.replace(code.acts * flashsae.ops.per_latent(sae.gain, code.pattern))

    flashsae.register(
        replace(
            TOPK, name="restarting", title="Restarting", settings=RestartingSettings, encode=encode,
            parameters=(*TOPK.parameters, gain),
        )
    )  # fmt: skip
    rows = {row.name: row for row in TOPK.parameters}
    rows["W_enc_T"] = replace(rows["W_enc_T"], initial="unit_rows")
    flashsae.register(
        replace(
            TOPK, name="restarting_transcoder", title="Transcoder", settings=RestartingTranscoderSettings,
            parameters=tuple(rows.values()), reads=("before",), writes=("after",), subtracts_b_dec=False,
        )
    )  # fmt: skip
    yield
    for name in ("restarting", "restarting_transcoder"):
        architectures._REGISTERED.pop(name)


def _config(**changes: Any) -> TrainConfig:
    settings = {
        "d_sae": 64, "k": 4, "arch": "restarting", "tokens": B * 35, "batch_tokens": B, "lr": 3e-3, "auxk_alpha": 0.0,
        "resample_every_steps": EVERY, "checkpoint_every_steps": 1000,
    }  # fmt: skip
    asked = {name: value for name, value in {**settings, **changes}.items() if value is not None}
    return TrainConfig(**asked).resolve({"before": 16, "after": 6} if "transc" in str(changes) else 16)


def _state(config: TrainConfig, checkpoints: Path | None = None, dead: list[int] = DEAD, x: Any = X) -> TrainState:
    batches = RowShuffle(ArraySource(x), config.batch_tokens, seed=config.seed)
    state = init_state(config, batches, torch.device("cpu"), checkpoints)
    if state.step == 0:
        with torch.no_grad():
            state.sae.b_enc[dead] = -50.0
    return state


def _steps(state: TrainState, config: TrainConfig, until: int) -> None:
    while state.step < until:
        train_step(state, state.batches.next_batch(), config)


def _bits(state: TrainState) -> dict[str, Tensor]:
    tensors = to_checkpoint(state, _config()).tensors.items()
    return {name: tensor.clone() for name, tensor in tensors if not name.startswith(("rng", "recent"))}


PRECISIONS = [("float32", "float32"), ("bf16", "float32"), ("float32", "bf16"), ("bf16", "bf16")]


@pytest.mark.parametrize(("precision", "moments"), PRECISIONS)
def test_dead_latents_start_again_from_tokens_and_nothing_else_changes(precision: str, moments: str) -> None:
    with_it, without = (
        _config(precision=precision, moments=moments, resample_every_steps=every) for every in (EVERY, 0)
    )
    state, twin = _state(with_it), _state(without)
    for each, config in ((state, with_it), (twin, without)):
        _steps(each, config, EVERY)
    x, _ = state.scaling(X, X)
    dead = twin.dead.tokens_since_fired >= EVERY * B // 2
    assert bool(dead[DEAD].all())
    assert int(dead.sum()) < 20
    sae = state.sae
    W_enc_T, W_dec = (state.optimizer.float32_weights(W) for W in (sae.W_enc_T, sae.W_dec))
    norm = twin.optimizer.float32_weights(twin.sae.W_enc_T)[~dead].norm(dim=1).mean()
    u = F.normalize(x - sae.b_dec, dim=1)
    digits = {"rtol": 1e-5, "atol": 1e-6} if precision == "float32" else {"rtol": 5e-3, "atol": 5e-3}
    torch.testing.assert_close(W_enc_T[dead].norm(dim=1), (0.2 * norm).expand(int(dead.sum())), **digits)
    torch.testing.assert_close(F.normalize(W_enc_T[dead], dim=1), W_dec[dead])
    nearest = (W_dec[dead].detach() @ u.T).max(dim=1)
    torch.testing.assert_close(nearest.values, torch.ones(int(dead.sum())))
    assert len(set(nearest.indices.tolist())) == int(dead.sum())
    assert not sae.b_enc[dead].any()
    assert bool((sae.gain[dead] == 1.5).all())
    ours, theirs = _bits(state), _bits(twin)
    assert not ours["dead.tokens_since_fired"][dead].any()
    for name, tensor in ours.items():
        of_latents = tensor.shape[:1] == (64,)
        if name.startswith("adam.") and of_latents and not name.endswith(".low"):
            assert not tensor[dead].any(), name
        if not name.startswith("data."):
            living = ~dead if of_latents else ...
            assert torch.equal(tensor[living], theirs[name][living]), name


def test_a_training_revives_them_and_without_resampling_it_does_not() -> None:
    alive = {}
    for every in (EVERY, 0):
        config = _config(resample_every_steps=every, tokens=B * 60)
        state = _state(config)
        train(state, config)
        alive[every] = int((state.dead.tokens_since_fired[DEAD] < 20 * B).sum())
    assert alive == {EVERY: 5, 0: 0}


def test_dead_latents_of_relu_come_back_to_life() -> None:
    alive = {}
    for every in (EVERY, 0):
        config = _config(arch="relu", k=None, l1=0.02, resample_every_steps=every)
        state = _state(config)
        _steps(state, config, EVERY + 1)
        alive[every] = int((state.dead.tokens_since_fired[DEAD] == 0).sum())
    assert alive == {EVERY: 5, 0: 0}


@pytest.mark.parametrize(
    ("precision", "moments", "stop"),
    [("float32", "float32", EVERY - 1), ("bf16", "bf16", EVERY), ("bf16", "float32", EVERY + 3)],
)
def test_a_training_that_is_killed_in_between_ends_with_the_same_bytes(
    precision: str, moments: str, stop: int, tmp_path: Path
) -> None:
    config = _config(precision=precision, moments=moments)
    whole = _state(config)
    train(whole, config)
    state = _state(config)
    _steps(state, config, stop)
    assert len(state.recent) == (0 if stop == EVERY else stop % EVERY)
    save_checkpoint(tmp_path, to_checkpoint(state, config))
    resumed = _state(config, tmp_path)
    assert resumed.step == stop
    train(resumed, config)
    ours, theirs = _bits(resumed), _bits(whole)
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.items())


def test_tokens_are_drawn_in_proportion_to_their_squared_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config(d_sae=8)
    state = _state(config, dead=list(range(8)))  # nothing is reconstructed, so the loss is the squared norm
    sizes = torch.tensor([1.0, 1.2, 1.5, 0.0])
    with torch.no_grad():
        state.sae.b_dec.zero_()
    x = torch.zeros(4, 16)
    x[range(4), range(4)] = sizes / state.scale
    dead = torch.zeros(8, dtype=torch.bool)
    dead[3] = True
    counts: Counter[int] = Counter()
    for seed in range(600):
        resampling._restart(state, dead, x, x, seed, 4)
        counts[int(state.sae.W_dec[3].argmax())] += 1
        with torch.no_grad():
            state.sae.b_enc[3] = -50.0
    share = sizes**4 / (sizes**4).sum()
    for token in range(4):
        sigma = (600 * share[token] * (1 - share[token])).sqrt().item()
        assert abs(counts[token] - 600 * share[token].item()) <= 4 * sigma, counts


@pytest.mark.parametrize("dead", [[], [7], list(range(64))], ids=["none", "one", "all"])
def test_any_number_may_be_dead(dead: list[int]) -> None:
    config = _config(tokens=B * 2 * EVERY)
    state = _state(config, dead=dead)
    since = state.dead.tokens_since_fired
    _steps(state, config, EVERY - 1)
    since.zero_()
    since[dead] = EVERY * B
    with torch.no_grad():
        state.sae.b_enc.fill_(-50.0 if len(dead) == 64 else 0.0)
        state.sae.b_enc[dead] = -50.0
    _steps(state, config, EVERY)
    assert all(bool(parameter.isfinite().all()) for parameter in state.sae.parameters())
    assert not state.sae.b_enc[dead].any()
    torch.testing.assert_close(state.sae.W_dec.norm(dim=1), torch.ones(64))


def test_where_more_are_dead_than_there_are_tokens_the_others_wait() -> None:
    config = _config()
    state = _state(config, dead=list(range(64)))
    x = torch.cat([X[:3], X[:1] * 0 + state.sae.b_dec.detach() / state.scale])  # one token has no direction
    resampling._restart(state, torch.ones(64, dtype=torch.bool), x, x, 0, 4)
    assert (state.sae.b_enc == 0).nonzero()[:, 0].tolist() == [0, 1, 2]
    assert len({tuple(row.tolist()) for row in state.sae.W_dec[:3]}) == 3
    assert bool(state.sae.W_dec.isfinite().all())


def test_the_last_steps_are_left_to_learn_and_no_token_is_kept_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    when, kept = [], []
    monkeypatch.setattr(resampling, "_restart", lambda state, *given: when.append(state.step))
    monkeypatch.setattr(resampling, "SAMPLE_TOKENS", 3 * B - 1)
    config = _config()
    state = _state(config)
    for step in range(35):
        _steps(state, config, step + 1)
        kept.append(sum(len(x) for x, _ in state.recent))
    assert when == [10, 20]  # at 30 no 10 steps would be left
    assert kept == [0] * 7 + [B, 2 * B, 0] + [0] * 7 + [B, 2 * B, 0] + [0] * 15
    monkeypatch.setattr(resampling, "SAMPLE_TOKENS", 5)
    _steps(state := _state(config), config, 9)
    assert state.recent == []


def test_latents_of_a_transcoder_start_again_in_both_widths(tmp_path: Path) -> None:
    Y = X @ torch.randn(16, 6, generator=torch.Generator().manual_seed(3)) + 1
    config = _config(arch="restarting_transcoder")
    data = {"before": X, "after": Y}
    state = _state(config, x=data)
    _steps(state, config, EVERY - 1)
    save_checkpoint(tmp_path, to_checkpoint(state, config))
    resumed = _state(config, tmp_path, x=data)
    for each in (state, resumed):
        _steps(each, config, EVERY)
    assert torch.equal(state.sae.W_dec, resumed.sae.W_dec)
    x, y = state.scaling(X, Y)
    u, t = F.normalize(x, dim=1), F.normalize(y - state.sae.b_dec, dim=1)
    chosen = (F.normalize(state.sae.W_enc_T[DEAD], dim=1) @ u.T).max(dim=1)
    torch.testing.assert_close(chosen.values, torch.ones(5))
    torch.testing.assert_close(state.sae.W_dec[DEAD].detach(), t[chosen.indices].detach())
