from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from flashsae.bench import measure
from flashsae.bench.ceilings import Ceilings
from flashsae.bench.peers import LIBRARIES
from flashsae.bench.stages import DECODE, ENCODE, INDEX, REST
from flashsae.bench.step import add_ratios, stage_table, step_table
from flashsae.cli import main

TINY = ("--tiny", "--seconds", "0.01")


@pytest.fixture(autouse=True)
def _no_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    for peer in LIBRARIES:
        monkeypatch.setitem(sys.modules, peer.module, None)


def _bench(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str]:
    code: Any = 0
    try:
        main(["bench", "step", *map(str, arguments)])
    except SystemExit as end:
        code = end.code or 0
    captured = capsys.readouterr()
    return code, " ".join((captured.out + captured.err).replace("│", " ").split())


@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_what_is_printed_is_also_in_the_file(
    precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "step.json"
    code, output = _bench(capsys, *TINY, "--precision", precision, "--json", path)
    assert code == 0
    assert f"FlashSAE, {precision}" in output
    assert "No table of stages: stages are read on a GPU only." in output
    assert "the times say nothing about speed" in output
    result = json.loads(path.read_text())
    assert (result["format"], result["format_version"], result["tiny"]) == ("flashsae.bench.step", 1, True)
    assert result["precision"] == precision
    assert result["shape"].keys() == {"name", "batch_tokens", "d_in", "d_sae", "k"}
    assert result["facts"].keys() == {"gpu", "torch", "triton", "flashsae", "date"}
    assert result["ceilings"].keys() == {"copy_gbs", "gather_gbs", "gemm_tflops", "gemm_dtype"}
    assert result["stages"] == []
    ours, dense, *others = result["steps"]
    timed = {"name", "precision", "status", "median_ms", "p10_ms", "p90_ms", "iterations", "tokens_per_s"}
    for record in (ours, dense):
        of_ours = {"l0"} if record is ours else set()
        assert record.keys() == timed | of_ours | {"peak_bytes", "reserved_bytes", "ratio_to_ours"}
        assert record["status"] == "ok"
    assert ours["l0"] == result["shape"]["k"]
    assert [record["name"] for record in others] == [peer.name for peer in LIBRARIES]
    assert all(record["status"] == "not installed" for record in others)


@pytest.mark.parametrize(("precision", "operand"), [("bf16-int8", "bf16"), ("float32-int8", "float32")])
def test_a_screen_stands_beside_the_step_without_it(
    precision: str, operand: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "step.json"
    code, output = _bench(capsys, *TINY, "--no-peers", "--precision", precision, "--json", path)
    assert code == 0
    result = json.loads(path.read_text())
    assert [record["precision"] for record in result["steps"]] == [precision, operand, "bf16"]
    assert result["ceilings"]["gemm_dtype"] == "int8"
    ours, plain, _ = result["steps"]
    assert ours["status"] == plain["status"] == "ok"
    assert ours[f"ratio_to_{operand}"] > 0
    for each in (precision, operand):
        assert f"FlashSAE, {each} " in output


def test_a_missing_library_says_how_to_install_it(capsys: pytest.CaptureFixture[str]) -> None:
    _, output = _bench(capsys, *TINY)
    assert "SAELens: not installed: pip install 'flashsae[peers]'" in output
    _, output = _bench(capsys, *TINY, "--no-peers")
    assert "not installed" not in output
    assert "dense PyTorch" in output


def test_a_wrong_result_of_ours_is_said_and_others_have_no_ratio(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure.OurStep, "squared_error", lambda self, fvu, x: 0.0)
    code, output = _bench(capsys, *TINY, "--no-peers")
    assert code == 0
    assert "FlashSAE: wrong result: squared error: expected about" in output
    assert "No table of stages: our step was not timed." in output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_nothing_is_timed_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    code, output = _bench(capsys)
    assert code == 1
    assert "flashsae: bench: expected a CUDA device, found none." in output
    assert "`flashsae doctor`" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--d-in", "0"), "d_in: expected a positive number, got 0."),
        (("--k", "50", "--d-sae", "40"), "k: expected 1 <= k <= 40"),
        (("--seconds", "0"), "seconds: expected a positive number, got 0"),
        (("--precision", "fp8"), "fp8"),
    ],
)
def test_bad_settings_are_one_sentence(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, output = _bench(capsys, "--tiny", *arguments)
    assert code != 0
    assert message in output


def test_a_file_that_cannot_be_written_is_said_before_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("flashsae.bench.step.measure_ceilings", lambda *_: pytest.fail("measured"))
    (tmp_path / "file").write_text("")
    code, output = _bench(capsys, *TINY, "--json", tmp_path / "file" / "x.json")
    assert code == 1
    assert "could not write" in output


def test_tables_show_rates_ceilings_and_ratios() -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    stages = [
        {"name": ENCODE, "ms": 2.0, "share_of_step": 0.5, "tflops": 600.0, "ceiling": "gemm", "share_of_ceiling": 0.8},
        {"name": DECODE, "ms": 1.0, "share_of_step": 0.25, "gbs": 4500.0, "ceiling": "gather", "share_of_ceiling": 0.5},
        {"name": INDEX, "ms": 0.5, "share_of_step": 0.125},
        {"name": REST, "ms": 0.5, "share_of_step": 0.125},
    ]
    console.print(stage_table(stages, Ceilings(4200.0, 9000.0, 750.0, "bfloat16")))
    steps = [
        {"name": "FlashSAE", "precision": "bf16", "status": "ok", "median_ms": 2.0, "p10_ms": 1.9, "p90_ms": 2.1},
        {"name": "other", "precision": "bf16", "status": "ok", "median_ms": 5.0, "p10_ms": 4.9, "p90_ms": 5.1},
        {"name": "large", "precision": "bf16", "status": "out of memory"},
    ]
    for record in steps[:2]:
        record |= {"iterations": 9, "tokens_per_s": 2e6, "peak_bytes": 3_210_000_000, "reserved_bytes": 4}
    add_ratios(steps)
    console.print(step_table(steps))
    lines = [" ".join(line.split()) for line in console.export_text().splitlines()]
    assert "encode + select 2.000 50.0% 600 TFLOP/s 80% 750 TFLOP/s, gemm" in lines
    assert "decode + loss + gradient 1.000 25.0% 4,500 GB/s 50% 9,000 GB/s, gather" in lines
    assert "index 0.500 12.5%" in lines
    assert "whole step 4.000 100.0%" in lines
    assert "other, bf16 5.000 4.90 – 5.10 2.000 3.21 2.50" in lines
    assert "large, bf16 out of memory" in lines
