"""The programs that compare with float64 find what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from benchmarks import certified, certified_cases, training
from benchmarks.certified_cases import Selected
from benchmarks.certified_exact import Exact, broken_ties

from flashsae.data.sources import ArraySource
from flashsae.ops.encode.keys import Keys
from flashsae.ops.select import reference
from flashsae.testing import stable_topk

CPU = torch.device("cpu")
NONE = torch.tensor(0)
SMALL: dict[str, Any] = {"small": True, "device": "cpu"}


def _operands(precision: str, *tensors: Tensor) -> list[Tensor]:
    return [tensor.bfloat16().float() if precision.startswith("bf16") else tensor for tensor in tensors]


def _topk(
    x: Tensor, W: Tensor, keys: Keys, k: int, precision: str, memory: list[int], counts: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    assert noise.dtype == torch.int64
    x, W = _operands(precision, x, W)
    pre_acts = x @ W.T + keys.b_enc
    counts[:] = k
    picked = stable_topk(keys.of(pre_acts), k)[1]
    return pre_acts.gather(1, picked), picked


def _batch_topk(
    x: Tensor, W: Tensor, keys: Keys, k: int, precision: str, memory: list[int], used: Tensor, noise: Tensor
) -> tuple[Tensor, ...]:
    used[:] = len(x) * k
    return reference.batch_topk(*_operands(precision, x, W), keys, k, 1 << 20)


def _above(
    x: Tensor, W: Tensor, b: Tensor, threshold: Tensor, capacity: None, precision: str, memory: list[int],
    noise: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    return reference.above(*_operands(precision, x, W), b, threshold, None, 1 << 20)


@pytest.fixture
def dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """Selections in plain PyTorch in place of the kernels, which take minutes without a GPU."""
    monkeypatch.setattr(certified, "launch_encode_topk", _topk)
    monkeypatch.setattr(certified, "batch_topk", _batch_topk)
    monkeypatch.setattr(certified, "above", _above)


@pytest.mark.usefixtures("dense")
@pytest.mark.parametrize("precision", ["float32", "float32-int8", "bf16-int8"])
def test_every_case_is_judged_and_what_is_right_is_right(
    precision: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    certified.main(precision=precision, out=tmp_path / "certified.jsonl", **SMALL)
    records = [json.loads(line) for line in (tmp_path / "certified.jsonl").read_text().splitlines()]
    judged = {(record["case"], record["selects"]) for record in records}
    names = [name for name, _ in certified_cases.adversarial_cases(certified_cases.draw(9, 24, 320, 5, 0, CPU))]
    assert {name for name, _ in judged} == {*names, "random d=24 n=300 k=4"}
    assert len(names) == len(set(names)) == 15
    assert {(name, how) for name in names for how in ("topk", "batch_topk")} < judged
    assert {record["precision"] for record in records} == {precision}
    assert sum(record["wrong"] for record in records) == 0
    assert "picks, 0 wrong" in capsys.readouterr().out


@pytest.mark.usefixtures("dense")
def test_a_wrong_pick_ends_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing_one(*arguments: Any) -> tuple[Tensor, Tensor]:
        x, W, keys, k, *rest = arguments
        acts, picked = _topk(x, W, keys, k + 1, *rest)
        keys_of = keys.of(acts)
        kept = torch.ones_like(picked, dtype=torch.bool)
        kept[:-1].scatter_(1, keys_of[:-1].argmin(1, keepdim=True), False)
        kept[-1].scatter_(0, keys_of[-1].argmax(0, keepdim=True), False)  # the largest of one token is missed
        return acts[kept].view(-1, k), picked[kept].view(-1, k)

    monkeypatch.setattr(certified, "launch_encode_topk", missing_one)
    with pytest.raises(SystemExit, match=r"float32: 2 of \d+ picks are wrong"):  # in each of two batches
        certified.main(only="^random", out=tmp_path / "certified.jsonl", **SMALL)
    first, *_ = [json.loads(line) for line in (tmp_path / "certified.jsonl").read_text().splitlines()]
    assert first["wrong"] == 2


def _case() -> Selected:
    return certified_cases.draw(6, 8, 40, 4, 3, CPU).random()


def test_values_order_and_operands_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(precision: str, by: Any) -> float:
        monkeypatch.setattr(certified, "launch_encode_topk", by)
        return certified.judge(_case(), precision, NONE)["wrong"]

    assert wrong("float32", _topk) == wrong("bf16-int8", _topk) == 0
    assert wrong("float32", lambda *a: (_topk(*a)[0] * 1.0001, _topk(*a)[1])) > 20
    assert wrong("float32", lambda *a: tuple(part.flip(1) for part in _topk(*a))) == 6 * 3
    assert wrong("bf16-int8", lambda *a: _topk(*a[:4], "float32", *a[5:])) > 10


def test_what_a_batch_or_a_threshold_should_not_select_is_found() -> None:
    block = Exact(_case(), "float32").of(slice(0, 6))
    best = block.keys.flatten().sort(descending=True)
    places = best.indices[:24].sort().values
    assert block.misses_of_batch(places // 40, places % 40) == (0, 0)
    off = torch.cat([places[places != best.indices[3]], best.indices[100:101]])
    assert block.misses_of_batch(off // 40, off % 40) == (0, 1)
    threshold = best.values[24]
    assert block.misses_of_threshold(places // 40, places % 40, threshold) == (0, 0)
    assert block.misses_of_threshold(off // 40, off % 40, threshold) == (0, 2)
    tied = best.indices[:25].sort().values  # what equals a threshold does not exceed it, but rounding excuses it
    assert block.misses_of_threshold(tied // 40, tied % 40, threshold) == (1, 0)


def test_of_equal_latents_the_lowest_must_win() -> None:
    assert broken_ties(torch.tensor([[0, 1, 10, 20], [3, 5, 13, 19]]), 30, 3) == 1
    assert broken_ties(torch.tensor([[0, 1, 10, 20], [3, 13, 14, 23]]), 30, 3) == 1
    assert broken_ties(torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4]]), 300, 300) == 1
    assert broken_ties(torch.tensor([[7, 2, 9]]), 30, 1) == 0


def test_an_sae_is_trained_to_judge_its_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1024, 8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(certified_cases, "ActivationCache", lambda _: ArraySource(x))
    case = certified_cases.trained_case(Path(), 64, CPU, steps=2, tokens=2048)
    assert (case.x.shape, case.W.shape, case.k) == ((2048, 8), (64, 8), 32)
    assert not torch.equal(case.x[:1024], x)  # in another order, and centred


def test_trainings_are_compared_in_every_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    x = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(training, "ActivationCache", lambda _: ArraySource(x))
    training.main(Path(), d_sae=40, k=4, steps=9, batch_tokens=64, out=tmp_path / "training.jsonl")
    records = [json.loads(line) for line in (tmp_path / "training.jsonl").read_text().splitlines()]
    assert [record["arm"] for record in records] == list(training.CURVES)
    exact = next(record["fvu"] for record in records if record["arm"] == "dense float64")
    for record in records:
        bf16 = "bf16" in record["arm"]
        assert record["fvu"] == pytest.approx(exact, rel=3e-2 if bf16 else 1e-4)
    assert set(training.OUR_PRECISIONS) < set(training.CURVES)
    assert "flashsae bf16-int8" in capsys.readouterr().out
