from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from flashsae.bench import measure
from flashsae.bench.dense import AutogradStep, dense_pytorch
from flashsae.bench.measure import Record, StepCase, Subject, WholeStep, check_step, expected_change, measure_ours
from flashsae.bench.ours import OurStep, Variant, build_ours
from flashsae.bench.problem import Problem, dense_squared_error, make_problem
from flashsae.bench.setups import Shape
from flashsae.errors import MissingExtraError

CPU, SHAPE = torch.device("cpu"), Shape("x", 64, 12, 100, 5)


def _measure(build: Callable[[Problem], AutogradStep]) -> Record:
    return measure.measure(lambda: StepCase("bf16", build).subject(SHAPE, CPU), CPU, 0.01)


@pytest.fixture
def never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("timed")

    monkeypatch.setattr(measure, "time_runs", refuse)


def _half(problem: Problem) -> AutogradStep:
    step = dense_pytorch(problem)
    return replace(step, squared_error=lambda value, x: value / 2)


def _frozen(problem: Problem) -> AutogradStep:
    return replace(dense_pytorch(problem), update=lambda: None)


def _diverging(problem: Problem) -> AutogradStep:
    step = dense_pytorch(problem)

    def update() -> None:
        step.update()
        with torch.no_grad():
            step.state[0].fill_(torch.nan)

    return replace(step, update=update)


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (_half, "squared error: expected about"),
        (_frozen, "loss: expected less than"),
        (_diverging, "got nan"),
    ],
)
@pytest.mark.usefixtures("never_timed")
def test_a_wrong_result_is_refused_and_not_timed(build: Callable[[Problem], AutogradStep], why: str) -> None:
    record = _measure(build)
    assert record["status"] == "wrong result"
    assert why in record["why"]
    assert "median_ms" not in record


@pytest.mark.usefixtures("never_timed")
def test_a_wrong_update_of_ours_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OurStep, "wrong_after_first", lambda self: "W_dec: wrong. ")
    assert measure_ours(Variant("float32"), SHAPE, CPU, 0.01) == {"status": "wrong result", "why": "W_dec: wrong."}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("x"), "out of memory"),
        (MissingExtraError("pip install it"), "not installed"),
        (RuntimeError("oh"), "failed"),
    ],
)
def test_what_cannot_run_is_recorded(error: Exception, status: str) -> None:
    def build(problem: Problem) -> AutogradStep:
        raise error

    record = _measure(build)
    assert record["status"] == status
    assert record.get("why", "") == {"failed": "RuntimeError: oh", "not installed": "pip install it"}.get(status, "")


def test_what_is_right_is_timed() -> None:
    record = _measure(dense_pytorch)
    assert record["status"] == "ok"
    assert 0 < record["p10_ms"] <= record["median_ms"] <= record["p90_ms"]
    assert record["tokens_per_s"] == pytest.approx(64e3 / record["median_ms"])
    assert record["peak_bytes"] is record["reserved_bytes"] is None


def test_the_check_does_three_updates_of_one_batch() -> None:
    problem, seen = make_problem(SHAPE, torch.float32, CPU), list[Tensor]()
    step = dense_pytorch(problem)

    def loss(x: Tensor) -> Tensor:
        seen.append(x)
        return step.loss(x)

    assert check_step(replace(step, loss=loss), problem.xs[0], dense_squared_error(problem), "bf16") == ""
    assert len(seen) == 4
    assert all(x is problem.xs[0] for x in seen)


@pytest.mark.parametrize("build", [dense_pytorch, partial(build_ours, variant=Variant("float32", arch="jump_relu"))])
def test_updates_that_jump_must_change_the_error_as_dense_ones_do(build: Callable[[Problem], WholeStep]) -> None:
    problem = make_problem(Shape("x", 256, 24, 200, 8), torch.float32, CPU, arch="jump_relu")
    expected, x = dense_squared_error(problem), problem.xs[0]
    step = build(problem)
    assert step.lr is not None
    change = expected_change(problem, step.lr)
    assert check_step(step, x, expected, "bf16", change) == ""
    assert "updates to change it" in check_step(build(problem), x, expected, "bf16", -change)
    assert "updates to change it" in check_step(build(problem), x, expected, "bf16", 3 * change)
    frozen = replace(dense_pytorch(problem), update=lambda: None)
    assert "updates to change it" in check_step(frozen, x, expected, "bf16", change)


def test_a_loss_that_may_rise_must_change_and_stay_near() -> None:
    x = torch.zeros(2, 3)

    def told(last: float) -> str:
        losses = iter([1.0, 1.0, 1.0, last])
        step = SimpleNamespace(run=lambda x: next(losses), squared_error=lambda loss, x: loss)
        return check_step(step, x, 1.0, "bf16", rise=0.1)  # type: ignore[arg-type]

    assert told(1.05) == told(0.5) == ""
    for wrong in (1.0, 1.15, float("nan")):
        assert "expected less than 1.1 after 3 updates" in told(wrong)


@pytest.mark.parametrize(
    ("precision", "off"),
    [("bf16", 0.04), ("tf32", 0.005), ("float32", 0.0002), ("bf16-int8", 0.04), ("float32-int8", 0.0002)],
)
def test_each_precision_has_its_tolerance(precision: str, off: float) -> None:
    problem = make_problem(SHAPE, torch.float32, CPU)
    expected = dense_squared_error(problem) * (1 + off)
    assert "squared error" in check_step(dense_pytorch(problem, "float32"), problem.xs[0], expected, precision)
    expected = dense_squared_error(problem) * (1 + off / 4)
    assert check_step(build_ours(problem, Variant("float32")), problem.xs[0], expected, precision) == ""


def test_figures_stand_in_the_record_and_references_take_turns() -> None:
    calls: list[str] = []

    def build() -> Subject:
        reference = "other", lambda i: calls.append("other")
        return Subject(
            lambda i: calls.append("it"), figures=lambda r: {"twice": 2 * r["median_ms"]}, reference=reference
        )

    record = measure.measure(build, CPU, 1e-9)
    assert record["status"] == "ok, unchecked"
    assert record["twice"] == 2 * record["median_ms"]
    assert record["ratio_to_other"] == record["median_ms"] / record["other_ms"]
    assert calls == ["it", "other"] * (len(calls) // 2)


@pytest.mark.parametrize(
    "build", [dense_pytorch, partial(build_ours, variant=Variant()), partial(build_ours, variant=Variant("float32"))]
)
def test_what_a_step_was_built_from_does_not_count_as_its_memory(build: Callable[[Problem], WholeStep]) -> None:
    alive: list[weakref.ref[Problem]] = []

    def known(problem: Problem) -> WholeStep:
        alive.append(weakref.ref(problem))
        return build(problem)

    subject = measure.StepCase("float32", known).subject(SHAPE, CPU)
    subject.run(0)
    gc.collect()
    assert subject.check is not None
    assert [problem() for problem in alive] == [None]


def test_another_way_takes_turns_where_there_is_room_for_both(monkeypatch: pytest.MonkeyPatch) -> None:
    variant = Variant("bf16-int8")
    record = measure_ours(variant, SHAPE, CPU, 0.01, beside=variant.unscreened)
    assert record["status"] == "ok"
    assert record["ratio_to_bf16"] == pytest.approx(record["median_ms"] / record["bf16_ms"], rel=20)  # timed once more

    def no_room(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(measure, "_turns", no_room)
    record = measure_ours(variant, SHAPE, CPU, 0.01, beside=variant.unscreened)
    assert record["status"] == "ok"
    assert not [name for name in record if name.endswith("bf16_ms") or name == "ratio_to_bf16"]
