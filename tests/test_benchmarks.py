"""The benchmarks use one harness, and their results stay readable."""

from __future__ import annotations

import ast
import gc
import json
import weakref
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")

from benchmarks import (
    choosing,
    inference,
    many,
    pareto,
    plots,
    plots_architectures,
    plots_inference,
    plots_runs,
    plots_steps,
    run,
)
from benchmarks.ablation import RUNGS
from benchmarks.cases import Size
from benchmarks.checks import check_batch
from benchmarks.drawing import Results
from benchmarks.pipeline import TRACED_STEPS, read_trace
from benchmarks.registry import GROUPS
from benchmarks.session import RESULTS
from benchmarks.shapes import SIZES

import flashsae
from flashsae import ops
from flashsae.bench.measure import OURS, Record, measure
from flashsae.bench.problem import make_problem
from flashsae.bench.setups import Shape, tiny

ROOT = Path(__file__).parents[1]
HARNESS = sorted([*(ROOT / "src" / "flashsae" / "bench").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")])
OF_MODULES = {"main", "app", "CASES", "PAPER_CASES"}  # what a module of its kind has


def _defined(path: Path) -> set[str]:
    """Return the public names that a file defines at its top level."""
    names: set[str] = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return {name for name in names if not name.startswith("_")}


def test_no_name_means_two_things() -> None:
    where: dict[str, list[str]] = defaultdict(list)
    for path in HARNESS:
        for name in _defined(path) - OF_MODULES:
            where[name].append(path.name)
    assert len(where) > 100
    assert {name: files for name, files in where.items() if len(files) > 1} == {}


def _changed_modules(source: str) -> set[str]:
    """Return the modules that a file gets from `require` and writes an attribute of."""
    nodes = list(ast.walk(ast.parse(source)))
    assigned = [(target, node.value) for node in nodes if isinstance(node, ast.Assign) for target in node.targets]
    modules = {
        name.id
        for target, value in assigned
        if any(isinstance(call, ast.Call) and ast.unparse(call.func) == "require" for call in ast.walk(value))
        for name in ast.walk(target)
        if isinstance(name, ast.Name)
    }
    written = {ast.unparse(target.value) for target, _ in assigned if isinstance(target, ast.Attribute)}
    calls = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr"]
    return modules & (written | {ast.unparse(call.args[0]) for call in calls})


def test_the_wheel_changes_no_peer() -> None:
    assert _changed_modules("a, b = (require(n) for n in names)\na.f = 1\nc.g = 2") == {"a"}
    assert _changed_modules("a = require(n)\nsetattr(a, 'f', 1)") == {"a"}
    for path in (ROOT / "src" / "flashsae").rglob("*.py"):
        assert not _changed_modules(path.read_text("utf-8")), path


OPERATIONS = {f"{case.name} {case.precision}": case for case in GROUPS["ops"].cases if case.peer is None}


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_is_right(name: str) -> None:
    shape, device = next(shape for shape in GROUPS["ops"].sizes if shape.name == "S"), torch.device("cpu")
    case = OPERATIONS[name]
    record = measure(lambda: case.build(Size(tiny(shape), device, 1e-9, {})), device, 1e-9)
    assert record["status"].startswith("ok"), record


def test_both_passes_with_a_screen_take_turns_with_those_without() -> None:
    cases = {(case.name, case.precision): case for case in GROUPS["paper"].cases}
    for precision, is_beside in (("float32-int8", True), ("float32", False)):
        case = cases["forward_backward", precision]
        size = Size(Shape("x", 32, 12, 96, 4), torch.device("cpu"), 1e-9, {})
        record = measure(lambda case=case, size=size: case.build(size), torch.device("cpu"), 1e-9)  # type: ignore[misc]
        assert record["status"] == "ok", record
        assert ("ratio_to_float32" in record) == is_beside


STEPS = {case.name: case for case in GROUPS["architectures"].cases if case.peer is None}


@pytest.mark.parametrize("name", [name for name in STEPS if "compiled" not in name])
def test_every_step_is_right(name: str) -> None:
    shape = Shape(STEPS[name].at[0], 16, 12, 64, 4)
    subject = STEPS[name].build(Size(shape, torch.device("cpu"), 1e-9, {}))
    assert subject.check() == ""
    if name.startswith(OURS):
        assert name.endswith(", topk") or float(subject.beside[1]()(0)) > 0
        assert subject.figures({"median_ms": 1.0})["l0"] == pytest.approx(shape.k, rel=0.5)


@pytest.mark.parametrize("name", GROUPS)
def test_a_group_names_each_case_once_and_only_sizes_that_it_has(name: str) -> None:
    group = GROUPS[name]
    entries = [(case.name, case.precision) for case in group.cases]
    assert len(set(entries)) == len(entries)
    assert {size for case in group.cases for size in case.at or ()} <= {shape.name for shape in group.sizes}
    for number, case in enumerate(group.cases):
        assert not case.ours or case.ours in {earlier.name for earlier in group.cases[:number]}


def test_cases_are_chosen_by_their_precision(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"precision: expected some of float32,.*,float32-int8, got fp8\."):
        run.main("step", precision="bf16,fp8", small=True)
    run.main("step", sizes="S,L", precision="bf16-int8,float32-int8", small=True, seconds=1e-9, out=tmp_path / "a")
    records = [json.loads(line) for line in (tmp_path / "a").read_text().splitlines()]
    of_steps = [record for record in records if record["group"] == "step"]
    assert [(record["name"], record["precision"], record["shape"]["name"]) for record in of_steps] == [
        (f"{OURS}, bf16, int8 screen", "bf16-int8", "S"),
        (f"{OURS}, bf16, int8 screen", "bf16-int8", "L"),
        (f"{OURS}, float32, int8 screen", "float32-int8", "L"),
    ]
    assert all(record["status"] == "ok" for record in of_steps)
    assert [record.keys() & {"ratio_to_bf16", "ratio_to_float32"} for record in of_steps] == [
        {"ratio_to_bf16"}, {"ratio_to_bf16"}, {"ratio_to_float32"},
    ]  # fmt: skip


def test_a_screen_has_rows_of_its_own_in_the_tables() -> None:
    about = {"gpu": "G", "torch": "2", "triton": "3", "flashsae": "0", "commit": "c", "date": "2026-01-01"}
    shape = {"shape": asdict(tiny(SIZES[1])), "status": "ok", "peak_bytes": 1e9, "p10_ms": 1.0, "p90_ms": 9.0}
    step = {"group": "step", **shape, **about}
    found = [step | {"name": OURS, "precision": "bf16", "median_ms": 4.0}]
    name = f"{OURS}, bf16, int8 screen"
    assert name not in plots_steps.whole_table(Results(found))
    found.append(step | {"name": name, "precision": "bf16-int8", "median_ms": 3.0})
    assert f"| {name} | 3.00 (0.8×) | 1.00 |" in plots_steps.whole_table(Results(found))
    rungs = [("dense PyTorch", "bf16", 16.0), ("+ CUDA graph", "bf16", 4.0), ("+ int8 screen", "bf16-int8", 3.2)]
    records = [{**step, "group": "ablation", "name": n, "precision": p, "median_ms": ms} for n, p, ms in rungs]
    table = plots_steps.ablation_table(Results(records))
    assert "| + CUDA graph | 4.00 (4.00×) | 1.00 |\n| + int8 screen | 3.20 (5.00×) | 1.00 |" in table
    assert "split weights" not in table
    assert plots_steps.ablation_figure(Results(records)) is not None
    operation = {"group": "ops", "name": "encode_topk", "median_ms": 2.0, "tflops": 900.0, "ratio_to_gemm": 0.7}
    text = plots.stage_tables(Results([{**shape, **about, **operation, "precision": "bf16-int8"}]))
    assert "| `encode_topk`, int8 screen | 2.00 | 1.00 – 9.00 | 900 TFLOP/s |  | 0.700× |" in text


def _read(name: str) -> list[Record]:
    return plots.read(RESULTS / f"{name}.jsonl")


def test_the_tables_of_the_docs_are_those_of_the_results() -> None:
    ops, step = Results(_read("ops")), Results(_read("step"))
    parts = [plots_steps.step_text(step), plots_architectures.steps_table(Results(_read("architectures")))]
    parts += [plots_runs.pipeline_text(_read("pipeline")), plots_runs.reading_text(_read("reading"))]
    parts += [plots_inference.inference_text(_read("inference")), plots.all_tables(ops)]
    parts.append(plots.counters_table(_read("counters")))
    performance = (ROOT / "docs" / "performance.md").read_text("utf-8")
    assert "\n\n".join(filter(None, parts)) in performance
    architectures = (ROOT / "docs" / "architectures.md").read_text("utf-8")
    assert plots_architectures.pareto_text(_read("pareto")) in architectures
    assert plots_runs.trainer_text(_read("trainer")) in (ROOT / "docs" / "numerics.md").read_text("utf-8")
    assert choosing.choosing_text(_read("choosing")) in (ROOT / "docs" / "choosing.md").read_text("utf-8")


def test_a_training_that_was_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(400, 12, generator=torch.Generator().manual_seed(0)) @ torch.randn(12, 12)
    monkeypatch.setattr(pareto, "read_activations", lambda folder, sites: pareto.Acts({"x": x[40:]}, {"x": x[:40]}, ""))
    config = {"d_sae": 32, "tokens": 256, "batch_tokens": 64, "seed": 0}
    records = []
    for l0 in (2, 4):
        record = pareto.train_one(pareto.Training("topk", lambda l0: {"k": l0}, ("x",)), l0, tmp_path, config, records)
        assert record is not None
        assert record["l0"] == l0
        assert 0 < record["fvu"] < 1
        records.append(record | {"gpu": "none", "torch": "2", "commit": "c"})
    again = pareto.Training("topk", lambda l0: {"k": l0}, ("x",))
    assert pareto.train_one(again, 4, tmp_path, config, records) is None
    records = [record | {"sparsity": 8 * record["sparsity"]} for record in records]
    assert f"{records[1]['fvu']:.4f} at 4.00" in plots_architectures.pareto_text(records)
    assert plots_architectures.pareto_figure(records) is not None


def test_a_penalty_is_found_by_a_line_through_trials() -> None:
    trials = [(0.1, 64.0)]
    while not 15 < trials[-1][1] < 17:
        penalty = pareto.next_penalty(trials, 16)
        trials.append((penalty, 64 * (penalty / 0.1) ** -0.7))
    assert len(trials) == 3


def test_the_table_of_learning_rates_has_a_row_a_rate_and_a_column_a_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    line, config = pareto.Training("topk", lambda l0: {"k": 4}, ("x",)), {"d_sae": 32, "tokens": 256, "seed": 0}
    records: list[Record] = []
    for rate, batch in ((2e-4, 32), (2e-4, 64), (8e-4, 64)):
        record = choosing.train_at(line, rate, batch, (x[40:], x[:40]), config, records)
        assert record is not None
        assert (record["l0"], record["rate"], record["batch_tokens"]) == (4, rate, batch)
        records.append(record | {"gpu": "none", "torch": "2", "commit": "c"})
    assert choosing.train_at(line, 8e-4, 64, (x[40:], x[:40]), config, records) is None
    low, wide, ours = (f"{record['fvu']:.4f} ({record['never_active']})" for record in records)
    text = choosing.choosing_text(records)
    assert "| lr · √(d_sae / 2¹⁴) | 32 a step | 64 a step |" in text
    assert f"| 2.0e-04 | {low} | {wide} |" in text
    assert f"| 8.0e-04 |  | {ours} |" in text
    assert choosing.choosing_text([]) == ""


def test_the_table_of_architectures_has_what_was_measured() -> None:
    step = {"group": "architectures", "precision": "bf16", "shape": asdict(tiny(SIZES[1])), "status": "ok"}
    step |= {"gpu": "G", "torch": "2", "triton": "3", "flashsae": "0", "commit": "c", "date": "2026-01-01"}
    ours = {"name": f"{OURS}, batch_topk", "median_ms": 2.0, "ratio_to_topk": 1.04, "l0": 6.0, "peak_bytes": 2e9}
    dense = {"name": "dense PyTorch, batch_topk", "median_ms": 9.0, "peak_bytes": 3e9}
    ours["stages"] = [{"name": "index", "ms": 0.25}, {"name": "everything else", "ms": 1.75}]
    text = plots_architectures.steps_table(Results([step | ours, step | dense]))
    assert "| index | 0.250 |\n| everything else | 1.75 |" in text
    assert "| batch_topk | 2.00 | 1.04× | 1.10× | 6.00 | 4.5× |  |  |  |  | 2.00 | 3.00 |" in text


@pytest.mark.parametrize("name", list(RUNGS)[1:])
def test_a_rung_lets_go_what_it_was_built_from(name: str) -> None:
    problem = make_problem(Shape("x", 32, 12, 100, 5), torch.float32, torch.device("cpu"))
    alive = weakref.ref(problem)
    step = RUNGS[name](problem)
    step.run(problem.xs[0])
    del problem
    gc.collect()
    assert alive() is None


def test_checks_of_a_batch_find_what_is_wrong() -> None:
    problem = make_problem(Shape("x", 8, 12, 100, 5), torch.float32, torch.device("cpu"))
    W_enc_T, b_enc, _, b_dec = problem.weights
    right = ops.encode_batch_topk(problem.xs[0], W_enc_T, b_enc, 5, b_dec=b_dec)
    fewer = ops.encode_batch_topk(problem.xs[0], W_enc_T, b_enc, 4, b_dec=b_dec)
    per_token = ops.encode_topk(problem.xs[0], W_enc_T, b_enc, 5, b_dec=b_dec)
    starts = torch.arange(0, 41, 5)
    other = ops.SparseCode(ops.Pattern.rows(per_token.pattern.latents.flatten(), starts, 100), per_token.acts.flatten())
    assert check_batch(problem, right, "float32") == ""
    assert "starts: another number" in check_batch(problem, fewer, "float32")
    assert "is left out" in check_batch(problem, other, "float32")
    assert "acts of token" in check_batch(problem, right.replace(right.acts * 1.01), "float32")


def test_the_stream_that_replays_graphs_is_the_one_that_trains(tmp_path: Path) -> None:
    def event(category: str, name: str, start: float, length: float, correlation: int, stream: int) -> Record:
        args = {"correlation": correlation, "stream": stream}
        return {"ph": "X", "cat": category, "name": name, "ts": 1e3 * start, "dur": 1e3 * length, "args": args}

    trace = [
        event("cuda_runtime", "cudaGraphLaunch", 0, 0.1, 1, 0),
        event("cuda_runtime", "cudaMemcpyAsync", 0, 0.1, 2, 0),
        event("kernel", "first", 1, 4, 1, 7),
        event("kernel", "second", 6, 5, 1, 7),
        event("gpu_memcpy", "copy", 4, 3, 2, 8),
    ]
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": trace}))
    found = read_trace(tmp_path / "trace.json")
    assert found["busy_share"] == pytest.approx(0.9)
    assert found["fetch_ms"] == pytest.approx(3 / TRACED_STEPS)
    assert found["fetch_hidden_share"] == pytest.approx(2 / 3)


def test_several_saes_are_timed_beside_one(tmp_path: Path) -> None:
    many.main(tiny=True, device="cpu", out=tmp_path / "many.jsonl")
    (record,) = map(json.loads, (tmp_path / "many.jsonl").read_text().splitlines())
    assert {count: len(times) for count, times in record["seconds_a_step"].items()} == {"1": 2, "4": 2}
    assert record["ratio"] > 0
    assert record["commit"]


def test_encoding_is_checked_timed_and_told_beside_a_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(inference.SAELENS), "is_installed", True)
    monkeypatch.setattr(inference, "lens_sae", lambda problem, sae: _DensePeer(sae))
    out = tmp_path / "inference.jsonl"
    inference.main(batches=(4096,), small=True, device="cpu", seconds=0.0, out=out)
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["name"] for record in records] == ["topk", "batch_topk", "jump_relu"]
    for record in records:
        assert len(record["runs"]) == 13
        assert {run["status"] for run in record["runs"].values()} == {"ok"}
        assert record["runs"]["FlashSAE, float32"]["same_latents"] == 1.0
        assert record["times_as_long"].keys() == {"float32", "tf32", "bf16"}
        assert record["commit"]
    text = plots_inference.inference_text([*records, *records])
    assert text.count("| SAELens, float32 |") == 3
    assert plots_inference.inference_text([]) == ""


class _DensePeer:
    """Encodes as a library of dense codes does."""

    def __init__(self, sae: flashsae.SAE) -> None:
        self.encode = lambda x: sae.encode(x).to_dense()


@pytest.mark.parametrize("boundary", [None, 1.0])
def test_a_code_that_is_wrong_is_told(boundary: float | None) -> None:
    ours = torch.tensor([[0.0, 2.0, 0.0, 1.5], [3.0, 0.0, 0.0, 1.001]])
    assert inference.compare_codes(ours, ours, boundary, 0.01) == ("", 1.0)
    tied = torch.tensor([[0.0, 2.0, 0.0, 1.5], [3.0, 0.0, 1.001, 0.0]])
    assert inference.compare_codes(ours, tied, boundary, 0.01) == ("", 0.5)
    missed = torch.tensor([[0.0, 0.0, 0.0, 1.5], [3.0, 0.0, 0.0, 1.001]])
    assert "latents: one" in inference.compare_codes(missed, ours, boundary, 0.01)[0]
    off = torch.tensor([[0.0, 2.0, 0.0, 1.7], [3.0, 0.0, 0.0, 1.001]])
    assert "values: off by 0.2" in inference.compare_codes(off, ours, boundary, 0.01)[0]


def test_what_does_not_fit_is_told_and_what_is_wrong_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "peak_bytes", _no_room)
    options: dict[str, Any] = {"batches": (4096,), "small": True, "device": "cpu", "seconds": 0.0, "peers": False}
    with pytest.raises(SystemExit, match="expected a CUDA device"):
        inference.main("topk", **options | {"small": False}, out=tmp_path / "x.jsonl")
    inference.main("topk", **options, out=tmp_path / "x.jsonl")
    (record,) = map(json.loads, (tmp_path / "x.jsonl").read_text().splitlines())
    assert record["runs"]["FlashSAE to dense, bf16"]["status"] == "out of memory"
    assert record["times_as_long"] == {}
    assert "| out of memory |" in plots_inference.inference_text([record])
    monkeypatch.setattr(inference, "compare_codes", lambda *_: ("latents: none. ", 0.0))
    with pytest.raises(SystemExit, match=r"topk, FlashSAE, float32: wrong result, not timed\. latents: none"):
        inference.main("topk", **options, out=tmp_path / "x.jsonl")


def _no_room(run: object, *_: object) -> None:
    if "to dense, bf16" in run.__self__.name:  # type: ignore[attr-defined]
        raise torch.OutOfMemoryError
