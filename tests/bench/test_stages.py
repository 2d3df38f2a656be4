from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from flashsae.bench.ceilings import Ceilings
from flashsae.bench.ours import Variant, build_ours
from flashsae.bench.problem import make_problem
from flashsae.bench.setups import Shape
from flashsae.bench.stages import (
    CLIP,
    DECODE,
    DENSE_PRODUCTS,
    ENCODE,
    INDEX,
    PASSES,
    REST,
    Kernel,
    launched_stages,
    split_steps,
    stage_of,
    stage_records,
    stage_times,
    stages_by_name,
)

ENCODER, DECODER = PASSES["W_enc_T"], PASSES["W_dec"]
PARAMETERS = ["W_dec", "W_enc_T", "b_enc", "b_dec"]
NODE = "autograd::engine::evaluate_function: GeneratedBackward"


@pytest.mark.parametrize(
    ("parts", "stage"),
    [
        (["aten::mm", "flashsae::encode_topk"], ENCODE),
        (["flashsae::encode_batch_topk"], ENCODE),
        (["aten::sort", "index", "flashsae::encode_topk"], INDEX),
        (["flashsae::decode_loss"], DECODE),
        (["aten::mm", "dense products", "flashsae::decode_loss"], DENSE_PRODUCTS),
        (["flashsae::row_squares", "clip_grad_norm"], CLIP),
        (["adam_rows 0"], DECODER),
        (["aten::fill_", "adam_rows 1", "Optimizer.step#FactoredAdam.step"], ENCODER),
        (["adam_rows 3"], REST),
        (["flashsae::encode_topk", "loss: auxk_loss"], "loss: auxk_loss"),
        (["flashsae::fold_tiles"], "fold_tiles"),
        (["aten::add"], REST),
        ([], REST),
    ],
)
def test_who_launched_a_kernel_tells_its_stage(parts: list[str], stage: str) -> None:
    assert stage_of(parts, [], PARAMETERS) == stage


def test_the_backward_pass_of_a_term_belongs_to_the_term() -> None:
    assert stage_of(["flashsae::latent_sums", NODE], ["flashsae::encode_topk"], PARAMETERS) == REST
    assert stage_of(["flashsae::latent_sums", NODE], ["flashsae::encode_topk", "loss: auxk_loss"], PARAMETERS) == (
        "loss: auxk_loss"
    )
    assert stage_of(["aten::mul", NODE], ["flashsae::decode_loss"], PARAMETERS) == REST


def _event(category: str, name: str, start: float, length: float, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": length, "tid": 1, "args": args}


def test_a_trace_is_read_by_launches_and_by_the_numbers_of_backward_nodes() -> None:
    trace = [
        {"ph": "M", "name": "process_name"},
        _event("cpu_op", "aten::rand", 0, 1, **{"Sequence number": 7}),
        _event("user_annotation", "loss: auxk_loss", 2, 20),
        _event("cpu_op", "flashsae::encode_topk", 3, 10, **{"Sequence number": 7}),
        _event("cuda_driver", "cuLaunchKernelEx", 4, 1, correlation=1),
        _event("cpu_op", "flashsae::decode_loss", 30, 10, **{"Sequence number": 8}),
        _event("cuda_runtime", "cudaLaunchKernel", 31, 1, correlation=2),
        _event("cpu_op", f"{NODE}0", 50, 9, **{"Sequence number": 8}),
        _event("cuda_runtime", "cudaLaunchKernel", 51, 1, correlation=3),
        _event("cpu_op", f"{NODE}1", 60, 9, **{"Sequence number": 7}),
        _event("cpu_op", "aten::sum", 61, 5, **{"Sequence number": 7}),
        _event("cuda_runtime", "cudaLaunchKernel", 62, 1, correlation=4),
        _event("user_annotation", "adam_rows 1", 80, 9),
        _event("cuda_driver", "cuLaunchKernelEx", 81, 1, correlation=5),
        _event("kernel", "adam", 205, 1, correlation=5),
        _event("kernel", "select", 101, 1, correlation=1),
        _event("kernel", "decode", 102, 1, correlation=2),
        _event("gpu_memset", "zero", 103, 1, correlation=3),
        _event("kernel", "sum", 104, 1, correlation=4),
        _event("gpu_memcpy", "copy", 206, 1, correlation=99),
    ]
    assert launched_stages(trace, PARAMETERS) == [
        ("select", "loss: auxk_loss"),
        ("decode", DECODE),
        ("zero", REST),
        ("sum", "loss: auxk_loss"),
        ("adam", ENCODER),
        ("copy", REST),
    ]


KNOWN = [("gemm_a", ENCODE), ("select", ENCODE), ("sort", INDEX), ("fill", REST), ("decode", DECODE), ("adam", DECODER)]


def _kernels(*names: str) -> list[Kernel]:
    return [Kernel(name, 10.0 * i, 10.0 * i + 5) for i, name in enumerate(names)]


def test_replayed_kernels_are_known_by_their_place_beside_others() -> None:
    replayed = _kernels("copy", "gemm_b", "select", "sort", "fill", "decode", "adam", "copy")
    expected = [ENCODE, INDEX, REST, DECODE, DECODER, REST]
    assert stages_by_name(replayed[2:], KNOWN) == expected
    # a product for which another kernel was chosen stays what it was
    assert stages_by_name(replayed, KNOWN) == [REST, ENCODE, *expected]
    assert stages_by_name([], KNOWN) == []


def test_steps_are_split_at_the_longest_pauses() -> None:
    times = [0, 2, 4, 100, 102, 300, 302, 304]
    kernels = [Kernel(f"k{t}", t, t + 1) for t in times]
    steps = split_steps(kernels[::-1], 3)
    assert [[kernel.start for kernel in step] for step in steps] == [[0, 2, 4], [100, 102], [300, 302, 304]]
    assert split_steps(kernels[:2], 3) == []


def test_stages_add_up_to_the_step_with_its_pauses() -> None:
    one = _kernels("copy", *(name for name, _ in KNOWN))
    span = 60.0 + 5 - 10 + 5  # from the first kernel of a stage to the last, and the copy
    late = [Kernel("copy", -900, -895), *one[1:]]  # the device waited for the host behind it
    for kernels in (one, late):
        times = stage_times([kernels, kernels], KNOWN, step_ms=2.0)
        assert sum(times.values()) == pytest.approx(2.0)
        assert times[ENCODE] == pytest.approx(2.0 * 2 * 5 / span)
        assert times[REST] > 2.0 * 2 * 5 / span  # pauses are of no stage
        assert list(times) == [ENCODE, INDEX, DECODE, DECODER, REST]
    known = [(name, "loss: l1" if name == "fill" else stage) for name, stage in KNOWN]
    assert list(stage_times([one], known, 2.0)) == [ENCODE, INDEX, DECODE, DECODER, "loss: l1", REST]


def test_rates_stand_beside_their_ceilings() -> None:
    shape = Shape("x", 1000, 12, 100, 5)
    step = build_ours(make_problem(shape, torch.float32, torch.device("cpu")), Variant())
    ceilings = Ceilings(copy_gbs=2.0, gather_gbs=None, gemm_tflops=0.01, gemm_dtype="bfloat16")
    times = {ENCODE: 1.0, INDEX: 1.0, DECODE: 1.0, DECODER: 1.0}
    encode, index, decode, decoder = stage_records(times, step.config, shape, ceilings)
    assert encode["tflops"] == pytest.approx(2 * 1000 * 12 * 100 / 1e9)
    assert (encode["ceiling"], encode["share_of_ceiling"]) == ("gemm", pytest.approx(0.24))
    assert index == {"name": INDEX, "ms": 1.0, "share_of_step": 0.25}
    assert decode["gbs"] == pytest.approx(1000 * 5 * 12 * 2 / 1e6)
    assert "ceiling" not in decode  # was not measured
    assert decoder["gbs"] == pytest.approx(24 * 1200 / 1e6)
    assert (decoder["ceiling"], decoder["share_of_ceiling"]) == ("copy", pytest.approx(decoder["gbs"] / 2))
    dense, _ = stage_records({DECODE: 1.0, DENSE_PRODUCTS: 1.0}, step.config, shape, ceilings)
    assert "gbs" not in dense  # no rows were gathered


def _as_if_on_a_device(trace: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a trace of a step on the CPU in which each operator that PyTorch has itself launches one kernel."""
    made = []
    for number, event in enumerate(event for event in trace if str(event.get("name", "")).startswith("aten::")):
        launch = {"ph": "X", "cat": "cuda_runtime", "name": "launch", "tid": event["tid"], "dur": event["dur"]}
        made.append({**launch, "ts": event["ts"], "args": {"correlation": number}})
        made.append({**launch, "ts": event["ts"], "cat": "kernel", "name": "k", "args": {"correlation": number}})
    return [*trace, *made]


def test_every_part_of_a_step_names_itself(tmp_path: Path) -> None:
    problem = make_problem(Shape("x", 32, 12, 100, 5), torch.float32, torch.device("cpu"), tied=True, dead=20)
    step = build_ours(problem, Variant("float32", clip_norm=1.0))
    with profile(activities=[ProfilerActivity.CPU]) as profiler, torch.autograd.set_multithreading_enabled(False):
        step.uncaptured().run(problem.xs[0])
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    trace = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    stages = [stage for _, stage in launched_stages(_as_if_on_a_device(trace), step.parameters())]
    assert {ENCODE, INDEX, DECODE, CLIP, ENCODER, DECODER, "loss: auxk_loss", REST} <= set(stages)
    first = {stage: stages.index(stage) for stage in set(stages)}
    assert first[ENCODE] < first[DECODE] < first["loss: auxk_loss"] < first[CLIP] < min(first[ENCODER], first[DECODER])
