from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flashsae.bench.ceilings import Ceilings
from flashsae.bench.ours import Variant, build_ours
from flashsae.bench.problem import Shape, make_problem
from flashsae.bench.stages import (
    AUXK,
    CLIP,
    DECODE,
    DENSE,
    ENCODE,
    INDEX,
    PASSES,
    REST,
    Kernel,
    parameter_order,
    split_steps,
    stage_records,
    stage_times,
    stages_of,
)

ENCODER, DECODER = PASSES["W_enc_T"], PASSES["W_dec"]
PARAMETERS = ["W_dec", "W_enc_T", "b_enc", "b_dec"]
FILL, COPY = "void at::vectorized_elementwise_kernel<FillFunctor>", "Memcpy DtoD"
SELECT = ["nvjet_sm90_tst_320x128", "encode_topk_group_max_kernel", "encode_topk_select_kernel"]
SORT = ["void DeviceRadixSortOnesweepKernel", "arange", "void searchsorted_cuda_kernel<int, int>"]
PASS = ["latent_rows_partial_kernel", "adam_rows_kernel"]
BIAS = ["adam_rows_kernel"] * 2
STEP = [
    *(FILL, COPY, "encode_topk_center_kernel", *SELECT, *SELECT, *SORT, "variance_pieces_kernel"),
    *("decode_sparse_loss_kernel", "sum", "latent_sums_kernel", *PASS, *PASS, *BIAS, COPY),
]


def _runs(stages: list[str]) -> list[tuple[str, int]]:
    runs: list[tuple[str, int]] = []
    for stage in stages:
        runs[-1:] = [(stage, runs[-1][1] + 1)] if runs and runs[-1][0] == stage else [*runs[-1:], (stage, 1)]
    return runs


def test_kernels_of_a_step_fall_into_stages() -> None:
    stages = stages_of(STEP, PARAMETERS)
    assert _runs(stages) == [
        *((REST, 2), (ENCODE, 7), (INDEX, 3), (REST, 1), (DECODE, 1), (REST, 2)),
        *((DECODER, 2), (ENCODER, 2), (REST, 3)),
    ]


def test_the_order_of_the_optimiser_names_the_passes() -> None:
    stages = stages_of(STEP, ["b_dec", "W_enc_T", "W_dec", "b_enc"])
    assert _runs(stages)[-4:] == [(REST, 4), (ENCODER, 2), (DECODER, 1), (REST, 2)]
    problem = make_problem(Shape("x", 8, 6, 20, 3), torch.float32, torch.device("cpu"))
    assert sorted(parameter_order(build_ours(problem, Variant()))) == sorted(PARAMETERS)


def test_rescoring_belongs_to_the_certified_encode() -> None:
    certified = ["encode_topk_round_kernel", *SELECT[:2], "encode_topk_candidates_kernel"]
    certified += ["decode_sparse_bwd_acts_kernel", "encode_topk_finish_kernel", "encode_topk_redo_kernel"]
    stages = stages_of([*certified, *SORT, "decode_sparse_loss_kernel", *PASS], PARAMETERS)
    assert _runs(stages) == [(ENCODE, 7), (INDEX, 3), (DECODE, 1), (DECODER, 2)]


def test_the_auxiliary_loss_is_a_stage_of_its_own() -> None:
    aux = ["index_select", *SELECT, "gemm", "latent_sums_kernel", "gemm"]
    stages = stages_of([*SELECT, *SORT, "decode_sparse_loss_kernel", *aux, *PASS, *PASS], PARAMETERS)
    assert _runs(stages) == [(ENCODE, 3), (INDEX, 3), (DECODE, 1), (AUXK, 7), (DECODER, 2), (ENCODER, 2)]


def test_clipping_is_a_stage_of_its_own() -> None:
    norm = ["latent_rows_partial_kernel", "row_squares_kernel", "sum"]
    stages = stages_of([*SELECT, *SORT, "decode_sparse_loss_kernel", *norm, *PASS], PARAMETERS)
    assert _runs(stages)[3:] == [(CLIP, 2), (REST, 1), (DECODER, 2)]


def test_dense_codes_have_products_for_a_decode() -> None:
    stages = stages_of([*SELECT, *SORT, "scatter", "nvjet", "nvjet", "adam_rows_kernel"], PARAMETERS)
    assert _runs(stages) == [(ENCODE, 3), (INDEX, 3), (REST, 1), (DENSE, 2), (DECODER, 1)]


def test_unknown_kernels_are_everything_else() -> None:
    assert stages_of(["a", "b"], PARAMETERS) == [REST, REST]
    assert stages_of([], PARAMETERS) == []


def test_steps_are_split_at_the_longest_pauses() -> None:
    times = [0, 2, 4, 100, 102, 300, 302, 304]
    kernels = [Kernel(f"k{t}", t, t + 1) for t in times]
    steps = split_steps(kernels[::-1], 3)
    assert [[kernel.start for kernel in step] for step in steps] == [[0, 2, 4], [100, 102], [300, 302, 304]]
    assert split_steps(kernels[:2], 3) == []


def test_stages_add_up_to_the_step_with_its_pauses() -> None:
    one = [Kernel(name, 10.0 * i, 10.0 * i + 5) for i, name in enumerate(STEP)]
    span = 10.0 * (len(STEP) - 2) - 5 + 2 * 5
    late = [replace(kernel, start=kernel.start - 900, end=kernel.end - 900) for kernel in one[:2]] + one[2:]
    for kernels in (one, late):  # the device waited for the host behind the second kernel
        times = stage_times([kernels, kernels], PARAMETERS, step_ms=2.0)
        assert sum(times.values()) == pytest.approx(2.0)
        assert times[ENCODE] == pytest.approx(2.0 * 7 * 5 / span)
        assert times[REST] > 2.0 * 8 * 5 / span  # pauses are of no stage
        assert list(times) == [ENCODE, INDEX, DECODE, ENCODER, DECODER, REST]


def test_rates_stand_beside_their_ceilings() -> None:
    shape = Shape("x", 1000, 12, 100, 5)
    step = build_ours(make_problem(shape, torch.float32, torch.device("cpu")), Variant())
    ceilings = Ceilings(copy_gbs=2.0, gather_gbs=None, gemm_tflops=0.01, gemm_dtype="bfloat16")
    encode, index, decode, decoder = stage_records(
        {ENCODE: 1.0, INDEX: 1.0, DECODE: 1.0, DECODER: 1.0}, step, shape, ceilings
    )
    assert encode["tflops"] == pytest.approx(2 * 1000 * 12 * 100 / 1e9)
    assert (encode["ceiling"], encode["share_of_ceiling"]) == ("gemm", pytest.approx(0.24))
    assert index == {"name": INDEX, "ms": 1.0, "share_of_step": 0.25}
    assert decode["gbs"] == pytest.approx(1000 * 5 * 12 * 2 / 1e6)
    assert "ceiling" not in decode  # was not measured
    assert decoder["gbs"] == pytest.approx(24 * 1200 / 1e6)
    assert (decoder["ceiling"], decoder["share_of_ceiling"]) == ("copy", pytest.approx(decoder["gbs"] / 2))
