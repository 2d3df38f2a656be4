from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from flashsae.data.shuffle import Batches, BufferShuffle, RowShuffle, buffer_size, shuffled
from flashsae.data.sources import ArraySource, IterableSource
from flashsae.errors import CheckpointError, ConfigError, DataError
from flashsae.text.open import open_text

N = 1000


def _x(n: int = N) -> Tensor:
    return torch.arange(n, dtype=torch.float32)[:, None].expand(n, 2).contiguous()


def _rows(batch_tokens: int = 30, **options: int) -> RowShuffle:
    return RowShuffle(ArraySource(_x(), held_out=0.1), batch_tokens, seed=3, **options)


def _buffer(batch_tokens: int = 30, buffer_tokens: int = 300, tokens: int | None = None) -> BufferShuffle:
    source = IterableSource(list(_x().split(77)))
    return BufferShuffle(source, batch_tokens, seed=3, buffer_tokens=buffer_tokens, tokens=tokens)


def _draw(batches: Batches, n: int) -> Tensor:
    return torch.cat([torch.zeros(0), *(batches.next_batch()["x"][:, 0] for _ in range(n))])


@pytest.mark.parametrize("options", [{}, {"window_rows": 100, "block_rows": 8}, {"window_rows": 128, "block_rows": 1}])
def test_rows_come_once_an_epoch_in_a_new_order(options: dict[str, int]) -> None:
    batches = _rows(1, **options)
    train = ArraySource(_x(), held_out=0.1).split_rows("train")
    first, second = _draw(batches, len(train)), _draw(batches, len(train))
    assert torch.equal(first.sort().values.long(), train)
    assert torch.equal(second.sort().values.long(), train)
    assert not torch.equal(first, second)
    assert (first.diff() == 1).double().mean() < 0.3


def test_windows_are_of_other_rows_in_each_epoch() -> None:
    batches = _rows(1, window_rows=100, block_rows=8)
    n = len(ArraySource(_x(), held_out=0.1).split_rows("train"))
    first, second = (set(_draw(batches, n)[:100].tolist()) for _ in range(2))
    assert len(first & second) < 50


def test_small_data_is_mixed_completely() -> None:
    places = torch.stack([_draw(RowShuffle(ArraySource(_x(50)), 50, seed=seed), 1) for seed in range(200)])
    spread = places.mean(0)
    assert (spread - 24.5).abs().max() < 5 * (50**2 / 12 / 200) ** 0.5  # every place sees every row equally often


def test_the_buffer_gives_out_every_row_and_mixes_far() -> None:
    batches = _buffer()
    drawn = _draw(batches, 66)  # two epochs, less what is in the buffer
    counts = torch.bincount(drawn.long(), minlength=N)
    assert counts.max() <= 3
    assert (counts == 0).sum() <= 300
    steps = drawn.diff().abs()
    assert steps.median() > 50


def test_the_buffer_reads_for_each_batch_what_the_last_one_took() -> None:
    read: list[int] = []

    def chunks() -> Iterator[Tensor]:
        for chunk in _x().split(10):
            read.append(len(chunk))
            yield chunk

    batches = BufferShuffle(IterableSource(chunks()), 30, seed=0, buffer_tokens=300)
    totals = []
    for _ in range(20):
        batches.next_batch()
        totals.append(sum(read))
    assert totals == [300 + 30 * i for i in range(20)]


@pytest.mark.parametrize(
    ("tokens", "held"), [(None, 300), (10**9, 300), (301, 300), (299, 300), (200, 210), (31, 60), (1, 60)]
)
def test_the_buffer_holds_no_more_than_is_trained_on(tokens: int | None, held: int) -> None:
    assert buffer_size(300, 30, tokens) == held
    told: list[tuple[int, int]] = []
    batches = _buffer(tokens=tokens)
    batches.sample(10, lambda done, total: told.append((done, total)))
    assert told[0] == (min(77, held), held)
    assert told[-1] == (held, held)
    batches.sample(10, lambda *_: pytest.fail("it is filled"))


@pytest.mark.parametrize("tokens", [301, 10**9])
def test_a_long_training_is_shuffled_as_one_whose_length_is_not_known(tokens: int) -> None:
    assert torch.equal(_draw(_buffer(tokens=tokens), 40), _draw(_buffer(), 40))


def test_a_buffer_that_holds_all_is_filled_once() -> None:
    read: list[int] = []

    def chunks() -> Iterator[Tensor]:
        for chunk in _x().split(10):
            read.append(len(chunk))
            yield chunk

    batches = BufferShuffle(IterableSource(chunks()), 30, seed=0, buffer_tokens=300, tokens=205)
    drawn = _draw(batches, 7)
    assert sum(read) == 210
    assert torch.equal(drawn.sort().values, torch.arange(210.0))
    assert (drawn.diff() == 1).double().mean() < 0.1
    assert (_draw(batches, 7) >= 210).all()  # whoever goes on gets what comes next


def test_a_buffer_of_an_older_version_is_gone_on_with_in_its_size() -> None:
    older = _buffer()  # as large as it may be, though 60 tokens are trained on
    older.next_batch()
    place, tensors = older.state()
    assert place.pop("holds_all") is False
    resumed = _buffer(tokens=60)
    resumed.restore((place, tensors))
    again = _buffer(tokens=60)
    again.restore(resumed.state())
    expected = _draw(older, 20)
    assert torch.equal(_draw(resumed, 20), expected)
    assert torch.equal(_draw(again, 20), expected)


@pytest.mark.parametrize(
    "make",
    [
        _rows,
        lambda: _rows(window_rows=100, block_rows=8),
        _buffer,
        lambda: _buffer(tokens=200),
        lambda: _buffer(tokens=2000),
    ],
)
@pytest.mark.parametrize("done", [0, 1, 7, 40])
def test_a_restored_state_goes_on_bit_for_bit(make: Callable[[], Batches], done: int) -> None:
    uninterrupted = make()
    uninterrupted.sample(10)
    _draw(uninterrupted, done)
    place, tensors = uninterrupted.state()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    expected = _draw(uninterrupted, 60)
    resumed = make()
    resumed.restore((place, tensors))
    assert torch.equal(_draw(resumed, 60), expected)
    assert resumed.state()[0] == uninterrupted.state()[0]


def test_sampling_changes_no_batch() -> None:
    for make in (_rows, _buffer):
        plain, sampled = make(), make()
        assert sampled.sample(64)["x"].shape == (64, 2)
        assert torch.equal(_draw(plain, 20), _draw(sampled, 20))


def test_the_seed_decides_the_order() -> None:
    source = ArraySource(_x())
    a, b, c = (_draw(RowShuffle(source, 30, seed=seed), 5) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_a_generator_that_ends_says_so() -> None:
    batches = BufferShuffle(IterableSource(iter(_x().split(77))), 30, seed=0, buffer_tokens=300)
    assert len(_draw(batches, N // 30).unique()) == N // 30 * 30
    with pytest.raises(DataError, match="the iterable x ended: 10 rows are left, fewer than a batch of 30"):
        batches.next_batch()


def test_nan_is_traced_to_its_row() -> None:
    x = _x()
    x[123, 1] = torch.nan
    with pytest.raises(DataError, match=r"x: row 123 holds NaN or Inf"):
        _draw(RowShuffle(ArraySource(x), 100, seed=0), 10)
    with pytest.raises(DataError, match=r"the iterable x, groups 77 to 153: 1 of 77 rows hold NaN or Inf"):
        _draw(BufferShuffle(IterableSource(list(x.split(77))), 30, seed=0, buffer_tokens=300), 10)


def test_too_little_data_and_too_small_buffers_are_refused() -> None:
    with pytest.raises(DataError, match="x: no row is left for training"):
        RowShuffle(ArraySource(_x(2), held_out=0.999), 4, seed=0)
    with pytest.raises(DataError, match=r"x has 20 rows for training, fewer than a batch of 30"):
        RowShuffle(ArraySource(_x(20)), 30, seed=0)
    with pytest.raises(ConfigError, match=r"shuffle_tokens: expected at least two batches \(60 tokens\), got 59"):
        _buffer(30, 59)


def test_other_data_cannot_be_gone_on_with() -> None:
    batches = RowShuffle(ArraySource(_x(900)), 30, seed=3)
    with pytest.raises(CheckpointError, match=r"x has 900 training rows now, 1000 when the checkpoint was written"):
        batches.restore(RowShuffle(ArraySource(_x()), 30, seed=3).state())


@pytest.mark.parametrize("done", [0, 2, 6])
def test_a_generator_that_fits_into_the_buffer_is_not_read_again_behind_a_restored_state(done: int) -> None:
    def make() -> BufferShuffle:
        return BufferShuffle(IterableSource(iter(_x(200).split(77))), 30, seed=3, buffer_tokens=300)

    uninterrupted = make()
    _draw(uninterrupted, done)
    place, tensors = uninterrupted.state()
    state = json.loads(json.dumps(place)), {name: tensor.clone() for name, tensor in tensors.items()}
    expected = _draw(uninterrupted, 6 - done)
    resumed = make()
    resumed.restore(state)
    assert torch.equal(_draw(resumed, 6 - done), expected)
    for each in (uninterrupted, resumed):
        with pytest.raises(DataError, match="ended: 20 rows are left"):
            each.next_batch()


def test_other_data_of_the_same_shape_cannot_be_gone_on_with(tiny: ModuleType) -> None:
    changes: list[tuple[Batches, Batches, str]] = [
        (RowShuffle(ArraySource(_x()), 30, seed=3), RowShuffle(ArraySource(_x() + 1), 30, seed=3), "rows was"),
        (_buffer(), BufferShuffle(IterableSource(list((_x() + 1).split(77))), 30, seed=3, buffer_tokens=300), "first"),
    ]
    reading = tiny.source()
    model = reading._model.model
    others = {
        "text was": tiny.source(text=open_text([*tiny.DOCUMENTS[:-1], "the mat"]), model=model),
        "model was": tiny.source(model=tiny.gpt2(layers=4)),
        "context_length was 16 and is 12 now": tiny.source(
            dataclasses.replace(tiny.SMALL, context_length=12), model=model
        ),
        "held_out was 0.2 and is 0.3 now": tiny.source(model=model, held_out=0.3),
    }
    for message, other in others.items():
        changes.append((*(BufferShuffle(s, 30, seed=3, buffer_tokens=300) for s in (reading, other)), message))
    for before, after, message in changes:
        before.next_batch()
        with pytest.raises(CheckpointError, match=f"reading something else than .*{message}"):
            after.restore(before.state())


def test_the_kind_of_source_decides_the_kind_of_shuffle() -> None:
    assert isinstance(shuffled(ArraySource(_x()), 10, seed=0, buffer_tokens=100), RowShuffle)
    assert isinstance(shuffled(IterableSource([_x()]), 10, seed=0, buffer_tokens=100), BufferShuffle)


@pytest.mark.parametrize(
    ("make", "wrong"),
    [
        (_rows, {"offset": N + 1}),
        (_rows, {"window": 99}),
        (_rows, {"epoch": -1}),
        (_rows, {"source": 7}),
        (_buffer, {"arrived": 10**6}),
        (_buffer, {"device": "nonsense"}),
        (_buffer, {"device": None}),
        (_buffer, {"cursor": {"batch": "x"}}),
    ],
)
def test_a_place_that_there_is_not_is_refused(make: Callable[[], Batches], wrong: dict[str, object]) -> None:
    batches = make()
    _draw(batches, 3)
    place, tensors = batches.state()
    with pytest.raises(CheckpointError, match=r"^the place in the data is damaged: .*\. Resume with the same data"):
        make().restore(({**place, **wrong}, tensors))
    if "generator" in tensors:
        for damaged in ({}, {"generator": torch.zeros(3)}, {**tensors, "buffer.x": torch.zeros(10**5, 1)}):
            with pytest.raises(CheckpointError, match="its buffer is not as it was written"):
                make().restore((place, damaged))


def _two(rows: Tensor) -> dict[str, Tensor]:
    """Two sites of the same tokens."""
    return {"a": rows, "b": torch.cat([-rows, rows.square()], 1).double()}


def _rows_of_two() -> RowShuffle:
    return RowShuffle(ArraySource(_two(_x()), held_out=0.1), 30, seed=3)


def _buffer_of_two() -> BufferShuffle:
    source = IterableSource([_two(part) for part in _x().split(77)], sites=("a", "b"))
    return BufferShuffle(source, 30, seed=3, buffer_tokens=300)


@pytest.mark.parametrize(("make", "alone"), [(_rows_of_two, _rows), (_buffer_of_two, _buffer)])
def test_the_sites_of_a_token_stay_together_in_the_order_of_one(
    make: Callable[[], Batches], alone: Callable[[], Batches]
) -> None:
    batches, expected = make(), alone()
    for _ in range(70):  # more than two epochs
        batch, x = batches.next_batch(), expected.next_batch()["x"]
        assert list(batch) == ["a", "b"]
        assert all(torch.equal(acts, other) for acts, other in zip(batch.values(), _two(x).values()))
    assert torch.equal(batches.sample(50)["b"], _two(expected.sample(50)["x"])["b"])


@pytest.mark.parametrize("make", [_rows_of_two, _buffer_of_two])
@pytest.mark.parametrize("done", [0, 7, 40])
def test_a_restored_state_of_several_sites_goes_on_bit_for_bit(make: Callable[[], Batches], done: int) -> None:
    whole = make()
    whole.sample(10)
    for _ in range(done):
        whole.next_batch()
    place, tensors = whole.state()
    assert {"buffer.a", "buffer.b"} <= set(tensors) or make is _rows_of_two
    state = json.loads(json.dumps(place)), {name: tensor.clone() for name, tensor in tensors.items()}
    resumed = make()
    resumed.restore(state)
    for _ in range(60):
        for a, b in zip(whole.next_batch().values(), resumed.next_batch().values(), strict=True):
            assert torch.equal(a, b)
            assert a.dtype == b.dtype
    damaged = {name: tensor for name, tensor in tensors.items() if name != "buffer.b"}
    if len(damaged) < len(tensors):
        with pytest.raises(CheckpointError, match="its buffer is not as it was written"):
            make().restore((place, damaged))


def test_nan_is_traced_to_its_site() -> None:
    sites = _two(_x())
    sites["b"][123, 1] = torch.nan
    with pytest.raises(DataError, match=r"x: row 123 of b holds NaN or Inf"):
        RowShuffle(ArraySource(sites), 1000, seed=0).next_batch()
    parts = [dict(zip(sites, rows)) for rows in zip(*(acts.split(77) for acts in sites.values()))]
    batches = BufferShuffle(IterableSource(parts, sites=("a", "b")), 30, seed=0, buffer_tokens=300)
    with pytest.raises(DataError, match=r"the iterable x at b, groups 77 to 153: 1 of 77 rows hold NaN or Inf"):
        batches.next_batch()
