"""Room for codes above a threshold: what the host goes by, and trainings that go by it on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import flashsae
from flashsae import SAE, TrainConfig, ops
from flashsae.architecture import RECONSTRUCTION, Progress, Term, architecture_named, architecture_names
from flashsae.architecture import description as architectures
from flashsae.architectures.topk import ARCHITECTURE as TOPK
from flashsae.data.shuffle import RowShuffle
from flashsae.data.sources import ArraySource
from flashsae.data.synthetic import SuperpositionModel
from flashsae.errors import ConfigError
from flashsae.sae.step import Step
from flashsae.settings.kinds import PositiveFloat, check_fields
from flashsae.train import TrainState, init_state, train_step
from flashsae.train import room as train_room
from flashsae.train import state as train_state
from flashsae.train.checkpoint import save_checkpoint
from flashsae.train.plan import make_plan
from flashsae.train.room import PERIOD, Room
from flashsae.train.state import to_checkpoint

X = SuperpositionModel(8, 16, active=2.0).sample(2000, seed=1)


@pytest.mark.parametrize("count", [0, 1, 100, 255, 256, 1000, 12345, 10**6, 10**8])
def test_there_is_room_for_what_did_not_fit_and_a_little_more(count: int) -> None:
    room = Room()
    assert room.fits(count, 2**40) == (count == 0)
    assert count <= room.entries <= 1.25 * count + 512
    assert room.entries % 256 == 0
    assert room.fits(count, 2**40)
    assert not room.is_full


def test_there_are_few_values() -> None:
    values = set()
    for count in range(1, 100_000, 37):
        room = Room()
        room.fits(count, 2**40)
        values.add(room.entries)
    assert len(values) < 80


def test_above_the_crossover_codes_are_full_and_below_sparse_again() -> None:
    room = Room()
    assert not room.fits(9000, 8000)
    assert room.capacity == "full"
    assert room.fits(10**9, 8000)
    for count in [7900] * 2 * PERIOD:  # not clearly below
        room.done(count, 8000)
    assert room.is_full
    for count in [2000] * (PERIOD - 1):
        room.done(count, 8000)
    assert room.is_full
    room.done(2000, 8000)
    assert room.capacity == 2304


def test_room_is_lowered_only_when_many_steps_needed_less() -> None:
    room = Room()
    room.fits(10_000, 10**9)
    before = room.entries
    for step in range(3 * PERIOD):
        room.done(10_000 if step % PERIOD == PERIOD - 1 else 10, 10**9)
    assert room.entries == before
    for _ in range(PERIOD):
        room.done(4000, 10**9)
    assert 4000 < room.entries < 4700


@dataclass(frozen=True)
class AboveSettings:
    """Settings of an SAE of all above a threshold that changes.

    Args:
        start: Threshold of the first step.
        end: Of the last.
    """

    start: PositiveFloat = 0.01
    end: PositiveFloat = 2.0
    __post_init__ = check_fields


def encode(sae: SAE, x: Tensor) -> ops.SparseCode:
    threshold = sae.now["threshold"]
    code = ops.encode_above(x, sae.W_enc_T, sae.b_enc, threshold, b_dec=sae.b_dec, capacity=sae.capacity)
    return code.replace(torch.where(code.acts > threshold, code.acts, 0.0))


def thresholds(config: flashsae.SAEConfig, progress: Progress) -> dict[str, float]:
    settings = config.arch
    return {"threshold": settings.start + (settings.end - settings.start) * progress.fraction}


def _mass(step: Step) -> Tensor:
    return ops.latent_sums(step.code.acts, step.code.pattern).sum()  # in an order that room does not change


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    mass = Term("mass", "Σ acts", "Sum of the activations.", _mass, weight=1e-4)
    flashsae.register(
        replace(
            TOPK, name="above", title="Above", settings=AboveSettings, encode=encode, terms=(RECONSTRUCTION, mass),
            l0=lambda settings: 4.0, most=None, schedule=thresholds, varies=True,
        )
    )  # fmt: skip
    yield
    architectures._REGISTERED.pop("above")


def config_of(steps: int = 12, **settings: float) -> TrainConfig:
    arch = AboveSettings(**settings)
    return TrainConfig(d_sae=32, arch=arch, tokens=64 * steps, batch_tokens=64, lr=3e-3).resolve(8)


def state_of(config: TrainConfig, checkpoints: Path | None = None) -> TrainState:
    batches = RowShuffle(ArraySource(X), config.batch_tokens, seed=config.seed)
    return init_state(config, batches, torch.device("cpu"), checkpoints)


def steps(state: TrainState, config: TrainConfig, number: int) -> list[dict[str, Tensor]]:
    return [
        {name: value.clone() for name, value in train_step(state, state.batches.next_batch(), config).items()}
        for _ in range(number)
    ]


def bits(state: TrainState) -> dict[str, Tensor]:
    tensors = to_checkpoint(state, config_of()).tensors
    return {name: tensor.clone() for name, tensor in tensors.items() if name.startswith(("sae.", "adam."))}


@pytest.mark.parametrize(("start", "end"), [(0.01, 0.4), (0.4, 0.01)], ids=["falling density", "growing density"])
def test_a_training_with_room_is_the_one_without(start: float, end: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every overflow is repaired before anything has changed: the numbers are those of codes of exactly their size."""
    monkeypatch.setenv("FLASHSAE_DENSE_ABOVE", "1")
    config = config_of(start=start, end=end)
    free, held = state_of(config), state_of(config)
    held.room = Room()
    expected, found = steps(free, config, 12), steps(held, config, 12)
    for ours, theirs in zip(found, expected):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(torch.equal(tensor, bits(free)[name]) for name, tensor in bits(held).items())


def test_a_forced_overflow_is_encoded_again_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHSAE_DENSE_ABOVE", "1")
    config, encoded = config_of(end=0.05), []
    free, held = state_of(config), state_of(config)
    original = ops.encode_above

    def watched(*args: object, capacity: object = None, **options: object) -> ops.SparseCode:
        encoded.append(capacity)
        return original(*args, capacity=capacity, **options)  # type: ignore[arg-type]

    held.room = Room()
    monkeypatch.setattr(ops, "encode_above", watched)
    steps(held, config, 2)
    held.room.entries = 3
    steps(held, config, 1)
    assert encoded[0] == 0  # the first code says how much it needs
    assert encoded[1] == encoded[2]
    assert encoded[3] == 3
    assert isinstance(encoded[4], int)
    assert encoded[4] > 3
    monkeypatch.setattr(ops, "encode_above", original)
    steps(free, config, 3)
    assert all(torch.equal(tensor, bits(free)[name]) for name, tensor in bits(held).items())


@pytest.mark.parametrize(("start", "end"), [(0.01, 0.4), (0.4, 0.01)], ids=["falling density", "growing density"])
def test_a_training_across_the_crossover_has_the_same_numbers(
    start: float, end: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_room, "PERIOD", 2)
    config, losses, kinds = config_of(start=start, end=end), [], []
    for limit in ("1", "0.25", "0"):
        monkeypatch.setenv("FLASHSAE_DENSE_ABOVE", limit)
        for room in (None, Room()):
            state, seen = state_of(config), []
            state.room = room
            for _ in range(12):
                losses.append(steps(state, config, 1)[0]["loss"])
                seen.append(room is not None and room.is_full)
            kinds.append(seen)
    assert (True in kinds[3], False in kinds[3]) == (True, True)
    assert (True in kinds[1], False in kinds[5]) == (False, False)
    table = torch.stack(losses).view(6, 12)
    torch.testing.assert_close(table, table[:1].expand(6, 12), rtol=1e-5, atol=0)


def test_a_resumed_run_goes_by_the_same_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHSAE_DENSE_ABOVE", "0.3")
    config = config_of(start=0.01, end=0.6)
    whole = state_of(config)
    whole.room = Room()
    steps(whole, config, 7)
    save_checkpoint(tmp_path, to_checkpoint(whole, config))
    monkeypatch.setattr(train_state, "room_of", lambda sae, device: Room())
    resumed = state_of(config, tmp_path)
    assert resumed.room == whole.room
    assert resumed.room is not whole.room
    for state in (whole, resumed):
        steps(state, config, 5)
    assert resumed.room == whole.room
    assert all(torch.equal(tensor, bits(whole)[name]) for name, tensor in bits(resumed).items())


def test_a_finished_sae_and_one_outside_of_a_training_take_all() -> None:
    config = config_of()
    state = state_of(config)
    assert state.sae.capacity == "any"
    state.room = Room()
    steps(state, config, 2)
    assert state.sae.capacity == state.room.capacity == "full"
    assert state.current_sae().capacity == state.finished_sae().capacity == "any"
    assert SAE(flashsae.SAEConfig(8, 16, 2)).capacity is None


def test_a_capture_without_room_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashsae.ops.encode.varying._is_capturing", lambda x: True)
    with pytest.raises(ConfigError, match=r"capacity: expected a number while a CUDA graph is captured.* got 'any'"):
        ops.encode_above(torch.ones(2, 3), torch.ones(4, 3), torch.zeros(4), 0.0, capacity="any")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_plan_has_memory_for_dense_codes(device: str) -> None:
    config = TrainConfig(d_sae=1 << 14, arch=AboveSettings(), tokens=1 << 20, batch_tokens=4096).resolve(64)
    topk = TrainConfig(d_sae=1 << 14, k=4, tokens=1 << 20, batch_tokens=4096).resolve(64)
    dense = 20 * 4096 << 14
    plans = [make_plan(each, torch.device(device)).parts["one step"] for each in (config, topk)]
    assert plans[0] >= dense > plans[1]


VARYING = [name for name in architecture_names(installed=False) if architecture_named(name).varies]


@pytest.mark.parametrize("limit", ["1", "0.3", "0"], ids=["sparse", "across the crossover", "full"])
@pytest.mark.parametrize("name", VARYING)
def test_every_architecture_of_the_package_that_varies_trains_with_room(
    name: str, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_room, "PERIOD", 2)
    losses = []
    for forced in (False, True):
        monkeypatch.setenv("FLASHSAE_DENSE_ABOVE", limit if forced else "1")
        config = TrainConfig(d_sae=32, arch=name, tokens=64 * 8, batch_tokens=64, lr=3e-3).resolve(8)
        state = state_of(config)
        state.room = Room() if forced else None
        losses.append(torch.stack([each["loss"] for each in steps(state, config, 8)]))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=0)
