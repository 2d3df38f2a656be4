"""Which parts of a step are captured, in which memory, and when the host looks between them: without a GPU."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from flashsae.train.graph import CapturedSteps


class FakeBatch:
    """Activations on a "GPU" that hold a number."""

    def __init__(self, number: int) -> None:
        self.number, self.device, self.shape, self.dtype = number, torch.device("cuda"), (4, 3), torch.float32

    def clone(self) -> FakeBatch:
        return FakeBatch(self.number)

    def copy_(self, other: FakeBatch) -> None:
        self.number = other.number


class Recorder:
    """Graphs that write down what happens to them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[Any] = []
        self.is_capturing = False
        self.streams: list[tuple[torch.device, int]] = []  # on which was captured: device and priority
        recorder = self

        class Graph:
            number = 0

            def __init__(self) -> None:
                Graph.number += 1
                self.name = Graph.number

            def pool(self) -> str:
                return f"pool {self.name}"

            def replay(self) -> None:
                recorder.events.append(f"replay {self.name}")

        @contextmanager
        def graph(
            graph: Graph, pool: str | None = None, stream: Any = None, capture_error_mode: str = ""
        ) -> Generator[None, None, None]:
            assert capture_error_mode == "thread_local"
            recorder.streams.append(stream)
            recorder.events.append(f"capture {graph.name} in {pool}")
            recorder.is_capturing = True
            yield
            recorder.is_capturing = False

        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", graph)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: (device, priority))

    def step(self, batch: Any) -> Generator[Any, None, None]:
        how = "captured" if self.is_capturing else "eager"
        self.events.append(f"encode {how}")
        yield batch["x"]
        assert self.is_capturing == (how == "captured")
        self.events.append(f"rest {how}")
        try:
            yield {"loss": batch["x"]}
        finally:
            self.events.append("closed" if self.is_capturing == (how == "captured") else "closed too late")

    def happened(self) -> list[Any]:
        events, self.events = self.events, []
        return events


def test_a_step_that_is_looked_into_is_two_graphs_in_one_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, steps, room = Recorder(monkeypatch), CapturedSteps(), 10

    def goes_on(x: FakeBatch) -> bool:
        assert not recorder.is_capturing
        recorder.events.append("look")
        return x.number <= room

    def run(number: int, kind: str = "a") -> Any:
        result = steps.in_parts(recorder.step, {"x": FakeBatch(number)}, kind, goes_on)  # type: ignore[dict-item]
        return result if result is None else result["loss"].number  # type: ignore[attr-defined]

    assert run(1) == 1
    assert recorder.happened() == ["encode eager", "look", "rest eager", "closed"]
    assert run(2) == 2
    assert recorder.happened() == [
        "capture 1 in None", "encode captured", "replay 1", "look",
        "capture 2 in pool 1", "rest captured", "closed", "replay 2",
    ]  # fmt: skip
    assert run(3) == 3
    assert recorder.happened() == ["replay 1", "look", "replay 2"]
    assert run(11) is None  # no room: the encoder alone has run, and the graphs stay
    assert recorder.happened() == ["replay 1", "look"]
    assert run(4) == 4
    assert recorder.happened() == ["replay 1", "look", "replay 2"]
    assert run(5, "b") == 5
    assert recorder.happened() == ["encode eager", "look", "rest eager", "closed"]
    assert run(12, "b") is None  # found out between the two captures
    assert recorder.happened() == ["capture 3 in None", "encode captured", "replay 3", "look"]
    assert run(6, "b") == 6  # from the start
    assert set(recorder.streams) == {(torch.device("cuda"), -1)}  # a step goes before what is read beside it
    assert recorder.happened() == ["encode eager", "look", "rest eager", "closed"]


def test_a_kind_whose_first_step_had_no_room_compiles_first_when_it_comes_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorder, steps = Recorder(monkeypatch), CapturedSteps()
    for fits in (False, True):
        result = steps.in_parts(recorder.step, {"x": FakeBatch(1)}, "a", lambda x, fits=fits: fits)  # type: ignore[dict-item, misc]
        assert (result is not None) == fits
        assert recorder.happened()[0] == "encode eager"


def test_any_other_step_is_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, steps = Recorder(monkeypatch), CapturedSteps()

    def step(batch: Any) -> Any:
        recorder.events.append("captured" if recorder.is_capturing else "eager")
        return {"loss": batch["x"]}

    for number in range(4):
        found = steps(step, {"x": FakeBatch(number)}, "a")  # type: ignore[dict-item]
        assert found["loss"].number == number  # type: ignore[attr-defined]
    assert recorder.happened() == ["eager", "capture 1 in None", "captured", "replay 1", "replay 1", "replay 1"]


def test_a_step_on_the_cpu_is_captured_by_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, steps = Recorder(monkeypatch), CapturedSteps()
    for _ in range(3):
        assert steps.in_parts(recorder.step, {"x": torch.ones(4, 3)}, "a", lambda _: True) is not None
    assert recorder.happened() == ["encode eager", "rest eager", "closed"] * 3
