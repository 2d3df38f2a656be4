from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flashsae.bench.ceilings import Ceilings
from flashsae.bench.cost import predict_stages
from flashsae.bench.setups import Shape
from flashsae.bench.stages import ENCODE

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "step.jsonl"
L = Shape("L", batch_tokens=8192, d_in=4096, d_sae=131072, k=64)
BF16 = ("FlashSAE", "bf16")
KINDS = ((1, "bfloat16"), (2, "int8"))


def _measured() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()]


def _steps(group: str) -> list[dict[str, Any]]:
    found = [r for r in _measured() if (r["name"], r["precision"]) == BF16 and r["group"] == group and r.get("stages")]
    assert len(found) >= 5
    return found


def _ceilings(stages: dict[str, dict[str, float]]) -> Ceilings:
    gbs = {record["name"]: record["gbs"] for record in _measured() if record["group"] == "ceiling"}
    return Ceilings(gbs["copy"], gbs["gather"], stages[ENCODE]["tflops"] / stages[ENCODE]["share_of_ceiling"], "bf16")


@pytest.mark.parametrize("group", ["step", "scale"])
def test_every_stage_that_was_measured_is_predicted_within_15_percent(group: str) -> None:
    for record in _steps(group):
        stages = {stage["name"]: stage for stage in record["stages"]}
        predicted = predict_stages(Shape(**record["shape"]), _ceilings(stages))
        assert predicted.keys() == stages.keys()
        for name, ms in predicted.items():
            assert ms == pytest.approx(stages[name]["ms"], rel=0.15), (record["shape"]["name"], name)
        assert sum(predicted.values()) == pytest.approx(record["median_ms"], rel=0.1)


def test_a_device_twice_as_fast_takes_half_the_time_but_for_launches() -> None:
    slow, fast = (predict_stages(L, Ceilings(c * 4000, c * 9000, c * 700, "bf16")) for c in (1.0, 2.0))
    for name in set(slow) - {"index", "everything else"}:
        assert fast[name] == pytest.approx(slow[name] / 2)
    assert slow["everything else"] / 2 < fast["everything else"] < slow["everything else"]


def test_a_screen_is_another_product_and_rows_that_are_gathered() -> None:
    plain, screened = (predict_stages(L, Ceilings(4000, 9000, 700 * times, dtype)) for times, dtype in KINDS)
    assert plain.keys() == screened.keys()
    assert {name for name, ms in screened.items() if ms != plain[name]} == {ENCODE}
    product = 2.0 * L.batch_tokens * L.d_in * L.d_sae / 1400e9
    assert product < screened[ENCODE] < plain[ENCODE]


def test_without_a_rate_of_gathers_rows_cost_what_a_copy_costs() -> None:
    assert predict_stages(L, Ceilings(4000, None, 700, "bf16")) == predict_stages(L, Ceilings(4000, 4000, 700, "bf16"))
