"""The same code on a CUDA device: `pytest -m gpu`."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import flashsae
from flashsae import SAE, SAEConfig, TrainConfig
from flashsae.data.acts import Batch
from flashsae.data.synthetic import SuperpositionModel
from flashsae.ops import (
    FactoredGradient,
    decode,
    decode_loss,
    encode_above,
    encode_batch_topk,
    encode_topk,
    linear,
    per_latent,
    pre_acts,
)
from flashsae.ops.adam_rows import AdamRule, adam_rows, row_squares
from flashsae.ops.adam_rows.reference import merge_halves
from flashsae.ops.encode.keys import Keys
from flashsae.ops.encode.launch import launch_encode_topk
from flashsae.ops.factors import RowGradient, SparseFactor
from flashsae.optim import FactoredAdam
from flashsae.precision import Precision, is_rounded
from flashsae.testing import assert_as_accurate, integer_inputs
from flashsae.train.graph import CapturedSteps
from helpers.codes import index_of, topk_of
from helpers.selection import HARD, hard_inputs, selection_mistakes
from helpers.steps import Tensors, leaves, step_inputs, whole_step

pytestmark = pytest.mark.gpu


DEVICE = "cuda"
F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def _context() -> None:
    torch.cuda.init()
    torch.mm(torch.ones(8, 8, device=DEVICE), torch.ones(8, 8, device=DEVICE))  # else backward threads find no context


@pytest.fixture
def sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHSAE_DENSE_ABOVE", "1")


def to_device(inputs: Tensors) -> Tensors:
    return {name: tensor.to(DEVICE) for name, tensor in inputs.items()}


MODES = [*((F32, precision) for precision in get_args(Precision)), (BF16, None)]
MODE_NAMES = [*get_args(Precision), "bfloat16 tensors"]
CAPTURED = ["float32", "bf16", "bf16-int8", "float32-int8"]
SCREENED = [("bf16-int8", "float32"), ("float32-int8", "bf16")]
SHAPES = [(0, 3, 5, 2), (1, 1, 1, 1), (37, 13, 101, 7), (130, 70, 600, 33), (64, 96, 2048, 1), (9, 768, 4096, 300)]


@pytest.mark.parametrize("dense_above", ["1", "0"])
@pytest.mark.parametrize(("dtype", "precision"), MODES, ids=MODE_NAMES)
@pytest.mark.parametrize(("B", "d", "n", "k"), SHAPES)
def test_t0_a_step_equals_that_of_the_cpu(
    B: int, d: int, n: int, k: int, dtype: torch.dtype, precision: Precision | None, dense_above: str,
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if dense_above == "0" and (dtype == BF16 or is_rounded(precision)):
        pytest.skip("dense products round the reconstruction once more")
    monkeypatch.setenv("FLASHSAE_DENSE_ABOVE", dense_above)
    inputs = step_inputs(B, d, n, generator, integer=True, dtype=dtype)
    ours = whole_step(to_device(inputs), k, precision)
    for name, expected in whole_step(inputs, k, precision).items():
        assert ours[name].dtype == expected.dtype, name
        assert torch.equal(ours[name].cpu(), expected), name


@pytest.mark.usefixtures("sparse")
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_t1_as_accurate_as_dense_autograd(dtype: torch.dtype, generator: torch.Generator) -> None:
    B, d, n, k = 512, 384, 8192, 32
    inputs = to_device(step_inputs(B, d, n, generator, integer=False, dtype=dtype))
    inputs["W_dec"] /= 20  # so that neither target nor reconstruction is lost in the other
    encoder, decoder = ("x", "W_enc_T", "b_enc", "b_dec"), ("top_acts", "W_dec", "b_dec", "x")
    code = encode_topk(*(inputs[n] for n in encoder[:3]), k, b_dec=inputs["b_dec"])
    indices = code.top_indices
    inputs["top_acts"] = code.acts.relu()
    upstream = torch.randn(B, k, generator=generator).to(DEVICE)

    def ours(inputs: Tensors) -> Tensors:
        p = leaves(inputs)
        again = encode_topk(p["x"], p["W_enc_T"], p["b_enc"], k, b_dec=p["b_dec"])
        acts = again.acts.relu()
        assert torch.equal(again.top_indices, indices)
        result = dict(zip(encoder, torch.autograd.grad(acts, [p[n] for n in encoder], upstream)))
        result |= {"acts": acts.detach()}
        loss, x_hat, _ = decode_loss(code.replace(p["top_acts"]), p["W_dec"], p["b_dec"], p["x"])
        grads = torch.autograd.grad(loss, [p[n] for n in decoder])
        return {**result, "loss": loss.detach(), "x_hat": x_hat, **{f"loss {n}": g for n, g in zip(decoder, grads)}}

    def dense(inputs: Tensors) -> Tensors:
        p = leaves(inputs)
        acts = ((p["x"] - p["b_dec"]) @ p["W_enc_T"].T + p["b_enc"]).gather(1, indices).relu()
        result = dict(zip(encoder, torch.autograd.grad(acts, [p[n] for n in encoder], upstream.to(acts))))
        code = p["W_dec"].new_zeros(B, n).scatter(1, indices, p["top_acts"].to(p["W_dec"].dtype))
        x_hat = code @ p["W_dec"] + p["b_dec"]
        loss = (p["x"] - x_hat).square().sum(dtype=torch.float64 if x_hat.dtype == torch.float64 else F32)
        grads = torch.autograd.grad(loss, [p[n] for n in decoder])
        # the code is float32 whatever the weights are
        result |= {"acts": acts.detach().to(loss.dtype), "loss": loss.detach(), "x_hat": x_hat.detach()}
        return {**result, **{f"loss {n}": g for n, g in zip(decoder, grads)}}

    our, theirs = ours(inputs), dense(inputs)
    exact = dense({name: tensor.double() for name, tensor in inputs.items()})
    for name in exact:
        assert_as_accurate(our[name], theirs[name], exact[name], name)


@pytest.mark.parametrize("precision", get_args(Precision))
def test_t3_two_steps_give_the_same_bits(precision: Precision, generator: torch.Generator) -> None:
    inputs = to_device(step_inputs(500, 200, 3000, generator, integer=False))
    first, second = (whole_step(inputs, 20, precision) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("precision", CAPTURED)
def test_a_captured_step_replays_as_an_eager_one(precision: Precision, generator: torch.Generator) -> None:
    inputs = to_device(step_inputs(100, 64, 2000, generator, integer=False))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            whole_step(inputs, 9, precision)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = whole_step(inputs, 9, precision)
    for name, tensor in step_inputs(100, 64, 2000, generator, integer=False).items():
        inputs[name].copy_(tensor)
    graph.replay()
    eager = whole_step(inputs, 9, precision)
    torch.cuda.synchronize()
    for name in eager:
        assert torch.equal(captured[name], eager[name]), name


def varying_step(p: Tensors, precision: Precision) -> Tensors:
    """Go through every operation on codes of varying length, and return every result and all gradients."""
    q = leaves(p)
    weights, names = (q["x"], q["W_enc_T"], q["b_enc"]), ("x", "W_enc_T", "b_enc", "W_dec", "b_dec")
    largest = encode_batch_topk(*weights, 9, b_dec=q["b_dec"], precision=precision)
    others = encode_above(*weights, p["thresholds"], b_dec=q["b_dec"], capacity=800, precision=precision)
    code = largest.replace(largest.acts.relu())
    found = decode_loss(code, q["W_dec"], q["b_dec"], q["x"], prefixes=(700, len(q["b_enc"])), precision=precision)
    again = pre_acts(*weights, others.pattern, b_dec=q["b_dec"], precision=precision)
    values = others.acts * per_latent(q["b_enc"], others.pattern) + again
    x_hat = decode(others.replace(values), q["W_dec"], precision=precision)
    outputs = [found.loss, x_hat]
    grads = torch.autograd.grad(outputs, [q[n] for n in names], [torch.ones_like(outputs[0]), p["upstream"].to(x_hat)])
    assert others.pattern.count is not None
    assert others.pattern.overflowed is not None
    result = {"loss": found.loss, "x_hat": found.x_hat, "other": x_hat, "acts": largest.acts, "values": values}
    result |= {"count": others.pattern.count, "overflowed": others.pattern.overflowed}
    result |= {"latents": largest.pattern.latents, "other latents": others.pattern.latents}
    return {n: t.detach() for n, t in result.items()} | {f"grad {n}": g for n, g in zip(names, grads)}


@pytest.mark.usefixtures("sparse")
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("threshold", [20.0, 35.0])  # of which the first asks for more than there is room for
def test_a_captured_step_of_codes_of_varying_length_never_waits(
    precision: Precision, threshold: float, generator: torch.Generator
) -> None:
    def inputs() -> Tensors:
        p = step_inputs(100, 64, 2000, generator, integer=False)
        return to_device(p | {"thresholds": torch.full((2000,), threshold)})

    captured_of, replayed_with = inputs(), inputs()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            varying_step(captured_of, precision)
    torch.cuda.current_stream().wait_stream(side)
    eager = varying_step(replayed_with, precision)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = varying_step(captured_of, precision)
    for name, tensor in replayed_with.items():
        captured_of[name].copy_(tensor)
    graph.replay()
    torch.cuda.synchronize()
    assert bool(eager["overflowed"]) == (int(eager["count"]) > 800) == (threshold == 20.0)
    for name, expected in eager.items():
        assert torch.equal(captured[name], expected), name


@pytest.mark.usefixtures("sparse")
def test_other_batch_sizes_compile_nothing_anew(generator: torch.Generator) -> None:
    from triton.runtime.jit import JITFunction

    from flashsae.ops.decode import kernels as decode_kernels
    from flashsae.ops.encode import certify_kernels, kernels, redo_kernels
    from flashsae.ops.latent_rows import kernels as rows_kernels

    def compiled() -> int:
        modules = decode_kernels, certify_kernels, kernels, redo_kernels, rows_kernels
        found = {id(f): f for module in modules for f in vars(module).values() if isinstance(f, JITFunction)}
        return sum(len(cache[0]) for f in found.values() for cache in f.device_caches.values())

    def run(B: int) -> None:
        for precision in ("float32", "bf16"):
            whole_step(to_device(step_inputs(B, 48, 1000, generator, integer=False)), 8, precision)

    run(37)
    before = compiled()
    assert before > 8
    for B in (39, 113, 500, 999):
        run(B)
    run(64)  # what divides by 16 may be compiled once more
    between = compiled()
    for B in (128, 2048):
        run(B)
    assert compiled() == between


# 40 inputs of 4096 tokens: more than ten million picks
BIG = [(kind, seed, 4096) for kind in ("normal", "huge and tiny rows") for seed in range(20)]
STRAINED = [(kind, seed, 128) for kind in HARD if kind not in ("normal", "huge and tiny rows") for seed in range(2)]
K = 64
assert sum(tokens for *_, tokens in BIG) * K >= 10**7


@pytest.mark.parametrize(("kind", "seed", "tokens"), BIG + STRAINED)
def test_t2_certified_float32_selects_as_float64_does(
    kind: str, seed: int, tokens: int, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, W, bias = (tensor.to(DEVICE) for tensor in hard_inputs(kind, tokens, 768, 24576, generator))
    counts = torch.zeros(tokens, dtype=torch.int32, device=DEVICE)
    _, indices = launch_encode_topk(x, W, Keys(bias), K, "float32", [512 << 20, 0], candidate_counts=counts)
    assert int(indices.diff(dim=1).min()) > 0
    wrong = excused = 0
    for start in range(0, tokens, 512):
        part = slice(start, start + 512)
        mistakes = selection_mistakes(x[part], W, bias, indices[part])
        wrong, excused = wrong + mistakes[0], excused + mistakes[1]
    with capsys.disabled():
        print(
            f"\n{kind}, seed {seed}: of {indices.numel()} picks {wrong} wrong, {excused} differ inside rounding; "
            f"candidates of a token: mean {counts.float().mean():.1f}, largest {counts.max()}"
        )
    assert wrong == 0


ROWS, WIDTH = 600_000, 4096  # more than 2**31 elements


@pytest.mark.usefixtures("sparse")
def test_rows_beyond_two_to_the_31_elements_are_read_and_written_right(generator: torch.Generator) -> None:
    if torch.cuda.get_device_properties(0).total_memory < 30 * 2**30:
        pytest.skip("the device has less than 30 GiB")
    latents = torch.tensor([0, 1, 524_287, 524_288, 524_289, 555_555, ROWS - 1])
    small = integer_inputs(len(latents), WIDTH, generator=generator, largest=1, dtype=BF16)
    W_dec = torch.zeros(ROWS, WIDTH, dtype=BF16, device=DEVICE)
    W_dec[latents.to(DEVICE)] = small.to(DEVICE)
    codes = torch.rand(20, len(latents), generator=generator).topk(3).indices
    acts = integer_inputs(20, 3, generator=generator, largest=1)
    target = integer_inputs(20, WIDTH, generator=generator, largest=1, dtype=BF16)

    def run(acts: Tensor, codes: Tensor, W_dec: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        acts, W_dec = acts.requires_grad_(), W_dec.requires_grad_()
        code = topk_of(acts, codes, W_dec)
        x_hat, loss = decode(code, W_dec), decode_loss(code, W_dec, None, target)
        return (
            x_hat.detach(), loss.loss.detach(), loss.residual,
            *torch.autograd.grad(loss.loss, [acts, W_dec]), *torch.autograd.grad(x_hat, [acts, W_dec], target),
        )  # fmt: skip

    ours = run(acts.to(DEVICE), latents[codes].to(DEVICE), W_dec, target.to(DEVICE))
    expected = run(acts.detach(), codes, small, target)
    for a, b in zip(ours, expected):
        if a.dim() and len(a) == ROWS:
            assert int(a.any(dim=1).sum()) == int(b.any(dim=1).sum())  # nothing elsewhere
            a = a[latents.to(DEVICE)]
        assert torch.equal(a.cpu(), b)


def test_encoder_rows_beyond_two_to_the_31_elements(generator: torch.Generator) -> None:
    if torch.cuda.get_device_properties(0).total_memory < 60 * 2**30:
        pytest.skip("the device has less than 60 GiB")
    latents = torch.tensor([0, 1, 524_287, 524_288, 524_289, 555_555, ROWS - 1])
    W_enc_T = torch.zeros(ROWS, WIDTH, device=DEVICE)
    W_enc_T[latents.to(DEVICE)] = 1.0
    b_enc = torch.zeros(ROWS, device=DEVICE)
    code = encode_topk(torch.ones(5, WIDTH, device=DEVICE), W_enc_T, b_enc, len(latents))
    assert code.top_indices.tolist() == [latents.tolist()] * 5
    assert bool((code.acts == WIDTH).all())


def test_latent_pass_over_rows_beyond_two_to_the_31_elements(generator: torch.Generator) -> None:
    if torch.cuda.get_device_properties(0).total_memory < 60 * 2**30:
        pytest.skip("the device has less than 60 GiB")
    latents = torch.tensor([0, 1, 524_287, 524_288, 524_289, 555_555, ROWS - 1])
    codes = torch.rand(20, len(latents), generator=generator).topk(3).indices
    coeffs = integer_inputs(20, 3, generator=generator)
    rows = integer_inputs(20, WIDTH, generator=generator)
    rule = AdamRule(eps=1.0)

    def run(d_sae: int, codes: Tensor, device: str) -> tuple[Tensor, ...]:
        weights = torch.zeros(d_sae, WIDTH, dtype=BF16, device=device)
        low = torch.zeros(d_sae, WIDTH, dtype=torch.int16, device=device)
        moments = torch.zeros(d_sae, WIDTH, device=device), torch.zeros(d_sae, WIDTH, device=device)
        index = index_of(codes.to(device), d_sae)
        gradient = RowGradient(SparseFactor(index, coeffs.to(device), rows.to(device)))
        scalars = torch.tensor([0.5, 1.0], dtype=torch.float64, device=device)
        bias_correction = torch.tensor([0.1, 0.001], dtype=torch.float64, device=device)
        adam_rows(weights, moments, gradient, scalars[0], scalars[1], bias_correction, rule, low=low)
        return weights, low, *moments, row_squares(weights, gradient, True)[:, None]

    ours, expected = run(ROWS, latents[codes], DEVICE), run(len(latents), codes, "cpu")
    for a, b in zip(ours, expected):
        assert int(a.any(dim=1).sum()) == int(b.any(dim=1).sum())  # nothing elsewhere
    high, low, *rest = (a[latents.to(DEVICE)].cpu() for a in ours)
    for a, b in zip((merge_halves(high, low), *rest), (merge_halves(*expected[:2]), *expected[2:])):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("precision", "moments"), [("float32", "float32"), ("bf16", "bf16"), ("tf32", "float32"), *SCREENED]
)
def test_training_repeats_and_resumes_bit_for_bit(precision: Precision, moments: Any, tmp_path: Path) -> None:
    x = SuperpositionModel(64, 128, active=4.0).sample(8192, seed=1)
    parts = list(x.split(512))
    config = TrainConfig(
        batch_tokens=512, tokens=512 * 40, device="cuda", checkpoint_every_steps=10, shuffle_tokens=2048,
        precision=precision, moments=moments, clip_norm=1.0, dead_after_tokens=1024,
    )  # fmt: skip

    def fit(batches: Iterable[torch.Tensor], run: str, resume: bool = False) -> SAE:
        folder = tmp_path / run
        return flashsae.fit(batches, d_sae=256, k=8, config=config, run=folder, resume=resume, progress=False)

    class KilledInTheSecondEpoch(list[torch.Tensor]):
        epochs = 0

        def __iter__(self) -> Iterator[torch.Tensor]:
            self.epochs += 1
            for number, part in enumerate(super().__iter__()):
                if self.epochs == 2 and number == 10:
                    raise KeyboardInterrupt
                yield part

    whole, again = fit(parts, "a"), fit(parts, "b")
    with pytest.raises(KeyboardInterrupt):
        fit(KilledInTheSecondEpoch(parts), "c")
    kept = sorted(path.name for path in (tmp_path / "c" / "checkpoints").iterdir())
    assert kept == ["step-00000010", "step-00000020"]
    resumed = fit(parts, "c", resume=True)
    for name, tensor in whole.state_dict().items():
        assert tensor.device.type == "cuda"
        assert torch.equal(tensor, again.state_dict()[name]), name
        assert torch.equal(tensor, resumed.state_dict()[name]), name


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize(("k", "k_aux"), [(8, 1500), (1100, 8)])
def test_more_latents_than_a_program_holds_are_trained(k: int, k_aux: int, precision: Precision) -> None:
    x = SuperpositionModel(64, 128, active=4.0).sample(2048, seed=1)
    saes = [
        flashsae.fit(
            x, d_sae=4096, k=k, k_aux=k_aux, batch_tokens=256, tokens=256 * 24, dead_after_tokens=512, device="cuda",
            precision=precision, progress=False,
        )
        for _ in range(2)
    ]  # fmt: skip
    for name, tensor in saes[0].state_dict().items():
        assert torch.equal(tensor, saes[1].state_dict()[name]), name
        assert tensor.isfinite().all(), name


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("arch", ["transcoder:batch_topk", "skip_transcoder", "crosscoder", "crosscoder:topk"])
def test_saes_of_several_sites_repeat_resume_and_train_as_on_the_cpu(
    arch: str, precision: Precision, tmp_path: Path
) -> None:
    x = SuperpositionModel(64, 128, active=4.0).sample(8192, seed=1)
    mix = torch.randn(64, 48, generator=torch.Generator().manual_seed(2))
    acts = {"in": 20 * x, "out": (x @ mix).relu()}
    config = TrainConfig(
        batch_tokens=512, tokens=512 * 40, device="cuda", checkpoint_every_steps=10, precision=precision,
        dead_after_tokens=1024,
    )  # fmt: skip

    def fit(run: str | None, config: TrainConfig = config, resume: bool = False) -> SAE:
        folder = None if run is None else tmp_path / run
        return flashsae.fit(acts, d_sae=256, k=8, arch=arch, config=config, run=folder, resume=resume, progress=False)

    whole, again = fit("a"), fit(None)
    shutil.rmtree(tmp_path / "a" / "checkpoints" / "step-00000040")
    resumed = fit("a", resume=True)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    on_cpu = fit(None, replace(config, device="cpu"))
    ours, theirs = (flashsae.evaluate(sae, acts).fvu for sae in (whole, on_cpu))
    assert ours == pytest.approx(theirs, rel=0.05)


@pytest.mark.parametrize(("dtype", "precision"), MODES, ids=MODE_NAMES)
@pytest.mark.parametrize("shape", [(0, 3, 5), (37, 13, 101), (130, 70, 64)])
def test_t0_a_linear_map_equals_that_of_the_cpu(
    shape: tuple[int, int, int], dtype: torch.dtype, precision: Precision | None, generator: torch.Generator
) -> None:
    B, d_in, d_out = shape
    x, W, grad = (integer_inputs(*s, generator=generator, dtype=F32) for s in ((B, d_in), (d_out, d_in), (B, d_out)))
    found = []
    for device in ("cpu", DEVICE):
        p, q = (t.to(device, dtype).requires_grad_() for t in (x, W))
        y = linear(p, q, precision=precision)
        found.append([y.detach(), *torch.autograd.grad(y, (p, q), grad.to(device))])
    for ours, expected in zip(found[1], found[0]):
        assert torch.equal(ours.cpu(), expected)


def test_an_old_graph_among_the_garbage_does_not_break_a_capture() -> None:
    x = {"x": torch.ones(4, 3, device="cuda")}

    def total(batch: Batch) -> dict[str, torch.Tensor]:
        return {"sum": batch["x"].sum()}

    def leave_garbage() -> None:
        steps = CapturedSteps()
        for _ in range(2):
            steps(total, x, "kind")
        cycle: list[Any] = [steps]
        cycle.append(cycle)

    def step(batch: Batch) -> dict[str, torch.Tensor]:
        _ = [[[]] for _ in range(20_000)]  # so many that Python looks for garbage
        return total(batch)

    gc.disable()
    leave_garbage()
    steps = CapturedSteps()
    steps(total, x, "kind")
    gc.enable()
    assert steps(step, x, "kind")["sum"].item() == 12.0
    assert gc.isenabled()


def test_factored_gradients_pass_through_the_tools_of_torch() -> None:
    """Clipping and unscaling on the device, without the numbers of a gradient."""
    x = torch.randn(300, 48, device="cuda")
    trained = []
    for make in (FactoredAdam, torch.optim.Adam):
        sae = SAE(SAEConfig(48, 4000, 8), seed=1).cuda()
        optimizer = make(sae.parameters(), 1e-3, eps=1e-6)
        scaler = torch.amp.GradScaler("cuda", init_scale=8.0)
        norms = []
        for _ in range(4):
            optimizer.zero_grad()
            scaler.scale(sae.decode_loss(sae.encode(x), x).loss).backward()
            scaler.unscale_(optimizer)
            norms.append(torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0).item())
            if make is FactoredAdam:
                assert isinstance(sae.W_dec.grad, FactoredGradient)
                assert sae.W_dec.grad._content.numbers is None
            scaler.step(optimizer)
            scaler.update()
        trained.append((sae, norms))
    assert trained[0][1] == pytest.approx(trained[1][1], rel=1e-4)
    for ours, theirs in zip(*(sae.parameters() for sae, _ in trained)):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_bfloat16_input_on_the_device() -> None:
    sae = SAE(SAEConfig(64, 512, 8)).cuda()
    x = torch.randn(100, 64, device="cuda")
    assert sae(x.bfloat16()).device.type == "cuda"
    assert flashsae.evaluate(sae, x).l0 == pytest.approx(8)
