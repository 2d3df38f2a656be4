"""Codes above a threshold in trainings on a CUDA device, whose steps are two graphs: `pytest -m gpu`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import flashsae
from flashsae import SAE, ReLUSettings, TrainConfig
from flashsae.data.shuffle import RowShuffle
from flashsae.data.sources import ArraySource
from flashsae.data.synthetic import SuperpositionModel
from flashsae.ops import encode_above
from flashsae.ops.validate import Precision
from flashsae.train import TrainState, init_state, train_step
from flashsae.train import room as train_room
from flashsae.train.graph import CapturedSteps
from flashsae.train.room import Room
from flashsae.train.state import to_checkpoint
from helpers.steps import step_inputs

pytestmark = pytest.mark.gpu

STEPS = 40
X = SuperpositionModel(64, 128, active=4.0).sample(8192, seed=1)


class Eager(CapturedSteps):
    """Steps of which none is of the kind of the one before."""

    def in_parts(self, step: Any, batch: Any, kind: Any, goes_on: Any = None) -> Any:
        return super().in_parts(step, batch, (kind, object()), goes_on)


def config_of(precision: Precision, **settings: Any) -> TrainConfig:
    arch = ReLUSettings(l1=1.0, l1_warmup=0.2, **settings)
    return TrainConfig(
        d_sae=512, arch=arch, tokens=512 * STEPS, batch_tokens=512, precision=precision, lr=1e-2, auxk_alpha=1 / 32,
        dead_after_tokens=2048, device="cuda",
    ).resolve(64)  # fmt: skip


def state_of(config: TrainConfig) -> TrainState:
    batches = RowShuffle(ArraySource(X), config.batch_tokens, seed=0)
    return init_state(config, batches, torch.device("cuda"))


def run(config: TrainConfig, between: Callable[[TrainState, int], None], *, eager: bool = False) -> tuple[Any, ...]:
    """Return losses, the kinds of room that steps had, and all that was trained."""
    state = state_of(config)
    if eager:
        state.captured = Eager()
    losses, rooms = [], []
    for step in range(STEPS):
        between(state, step)
        batch = {site: acts.to("cuda") for site, acts in state.batches.next_batch().items()}
        losses.append(train_step(state, batch, config)["loss"].clone())
        assert state.room is not None
        rooms.append(state.sae.capacity)
    tensors = to_checkpoint(state, config).tensors
    return (
        torch.stack(losses),
        rooms,
        {name: t.clone() for name, t in tensors.items() if name.startswith(("sae", "adam"))},
    )


def leave(_state: TrainState, _step: int) -> None:
    pass


def disturb(state: TrainState, step: int) -> None:
    """Take room away, so that codes overflow; take it all away at once; and give far too much."""
    assert state.room is not None
    if step in (9, 10, 23):
        state.room = Room(entries=256)
    if step == 15:
        state.room = Room()
    if step == 30:
        state.room = Room(entries=400_000 if state.room.entries < 400_000 else 300_000)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("limit", ["1", "0.2", "0"], ids=["sparse", "across the crossover", "full"])
def test_captured_steps_are_bitwise_eager_ones_whatever_happens_to_the_room(
    limit: str, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASHSAE_DENSE_ABOVE", limit)
    monkeypatch.setattr(train_room, "PERIOD", 4)
    config = config_of(precision)
    for between in (leave, disturb):
        losses, rooms, bits = run(config, between)
        expected, same_rooms, same_bits = run(config, between, eager=True)
        assert torch.equal(losses, expected)
        assert rooms == same_rooms
        assert all(torch.equal(tensor, same_bits[name]) for name, tensor in bits.items())
        assert bool(losses.isfinite().all())
        assert ("full" in rooms) == (limit != "1")
        if between is leave:  # room that is taken and given from outside may do without being full
            assert any(room != "full" for room in rooms) == (limit != "0")


def test_an_overflow_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHSAE_DENSE_ABOVE", "1")
    config = config_of("float32")
    losses, _, bits = run(config, leave)
    disturbed, _, same = run(config, disturb)
    torch.testing.assert_close(disturbed, losses, rtol=1e-5, atol=0)  # the penalty sums as many places as there are
    assert all(torch.isfinite(tensor.float()).all() for tensor in same.values())
    assert bits.keys() == same.keys()


def test_a_training_across_the_crossover_has_the_numbers_of_a_sparse_one(monkeypatch: pytest.MonkeyPatch) -> None:
    config, found = config_of("float32"), []
    monkeypatch.setattr(train_room, "PERIOD", 4)
    for limit in ("1", "0.2", "0"):
        monkeypatch.setenv("FLASHSAE_DENSE_ABOVE", limit)
        found.append(run(config, leave)[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=0)
    torch.testing.assert_close(found[2], found[0], rtol=1e-3, atol=0)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_nothing_but_the_look_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHSAE_DENSE_ABOVE", "1")
    config = config_of("float32")
    state = state_of(config)
    batches = [{site: acts.to("cuda") for site, acts in state.batches.next_batch().items()} for _ in range(STEPS // 2)]
    for number, batch in enumerate(batches):
        if number == 12:  # room has settled, and the step is captured
            state.room = Room(entries=512 * 512)
        if number >= 14:
            torch.cuda.set_sync_debug_mode("error")
        try:
            train_step(state, batch, config)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_resumed_training_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHSAE_DENSE_ABOVE", "0.2")
    monkeypatch.setattr(train_room, "PERIOD", 4)
    from flashsae.train import loop

    config = TrainConfig(
        batch_tokens=512, tokens=512 * STEPS, device="cuda", checkpoint_every_steps=7, shuffle_tokens=2048, lr=1e-2
    )

    def fit(run: str, resume: bool = False) -> SAE:
        arch = ReLUSettings(l1=1.0, l1_warmup=0.2, p_end=0.5)
        return flashsae.fit(X, d_sae=256, arch=arch, config=config, run=tmp_path / run, resume=resume, progress=False)

    whole, again = fit("a"), fit("b")
    step, done = loop.train_step, []

    def stops(*args: Any) -> dict[str, Tensor]:
        if len(done) == 25:
            raise KeyboardInterrupt
        done.append(1)
        return step(*args)

    monkeypatch.setattr(loop, "train_step", stops)
    with pytest.raises(KeyboardInterrupt):
        fit("c")
    monkeypatch.setattr(loop, "train_step", step)
    resumed = fit("c", resume=True)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
        assert torch.equal(tensor, resumed.state_dict()[name]), name


@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
def test_full_and_sparse_codes_have_the_same_values(precision: Precision, generator: torch.Generator) -> None:
    p = {name: tensor.to("cuda") for name, tensor in step_inputs(300, 96, 3000, generator, integer=False).items()}
    operands, options = (p["x"], p["W_enc_T"], p["b_enc"], 30.0), {"b_dec": p["b_dec"], "precision": precision}
    sparse = encode_above(*operands, **options)  # type: ignore[arg-type]
    full = encode_above(*operands, capacity="full", **options)  # type: ignore[arg-type]
    kept = torch.where(full.acts > 30.0, full.acts, 0.0)
    torch.testing.assert_close(kept, sparse.to_dense(), rtol=1e-5, atol=1e-4)
    assert full.pattern.count is not None
    assert int(full.pattern.count) == len(sparse.acts)
    assert encode_above(*operands, capacity="any", **options).pattern.is_full == (  # type: ignore[arg-type]
        len(sparse.acts) > 300 * 3000 // 16
    )
