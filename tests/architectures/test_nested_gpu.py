"""Nested reconstructions on a CUDA device: `pytest -m gpu`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import flashsae
from flashsae import SAE, TrainConfig
from flashsae.architecture import settings_of
from flashsae.data.synthetic import SuperpositionModel
from flashsae.ops import Pattern, SparseCode, by_value, decode_loss, encode_batch_topk, encode_topk
from flashsae.testing import integer_inputs, poison_empty
from helpers.codes import ragged, to
from helpers.steps import Tensors, leaves, step_inputs

pytestmark = pytest.mark.gpu
NAMES = ("x", "W_enc_T", "b_enc", "W_dec", "b_dec")
N = 3000


@pytest.fixture(autouse=True)
def _sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHSAE_DENSE_ABOVE", "1")
    torch.cuda.init()
    torch.mm(torch.ones(8, 8, device="cuda"), torch.ones(8, 8, device="cuda"))  # else backward threads find no context


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", [768, 1000])
@pytest.mark.parametrize("kind", ["prefixes", "varying", "budgets", "all budgets"])
def test_t0_losses_and_gradients_equal_those_of_the_cpu(
    kind: str, d: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    k, levels = 64, {"prefixes": (50, 200, 210, 1500, N)}
    pattern = Pattern.topk(torch.rand(60, N, generator=generator).topk(k).indices, N)
    if kind == "varying":
        pattern = ragged([0, 64, 1, 300, 20, 33, 64, 500, *[48] * 20], N, generator, spare=9)
    elif "budgets" in kind:
        levels = {"budgets": (1, 2, 17, k) if kind == "budgets" else tuple(range(1, k + 1))}
    weights = [float(1 + number % 2) for number in range(len(next(iter(levels.values()))))]
    shapes = {"acts": tuple(pattern.latents.shape), "target": (pattern.B, d), "W_dec": (N, d), "b_dec": (d,)}
    inputs = {name: integer_inputs(*shape, generator=generator, largest=1) for name, shape in shapes.items()}
    inputs["W_dec"] *= torch.rand(N, d, generator=generator) < 0.02  # sums stay small enough for bfloat16
    for name in ("W_dec", "b_dec"):
        inputs[name] = inputs[name].to(dtype)

    def run(pattern: Pattern, inputs: Tensors) -> Tensors:
        p = leaves(inputs)
        found = decode_loss(
            SparseCode(pattern, p["acts"]), p["W_dec"], p["b_dec"], p["target"], **levels, level_weights=weights
        )
        grads = torch.autograd.grad(found.loss, list(p.values()))
        result = {"losses": found.level_losses, "residual": found.residual, **dict(zip(p, grads))}
        return {name: tensor.detach().cpu() for name, tensor in result.items()}

    with poison_empty():
        ours = run(to(pattern, "cuda"), {name: tensor.cuda() for name, tensor in inputs.items()})
    used = slice(None) if pattern.starts is None else slice(int(pattern.starts[-1]))
    for name, expected in run(pattern, inputs).items():
        part = used if name == "acts" else slice(None)
        if dtype == torch.bfloat16 and name in ("acts", "W_dec"):  # whose sums bfloat16 rounds
            torch.testing.assert_close(ours[name][part], expected[part], rtol=2e-2, atol=1.0)
        else:
            assert torch.equal(ours[name][part], expected[part]), name


def step(p: Tensors, kind: str, precision: Any) -> Tensors:
    """Encode, compare at several levels, and return every result and all gradients."""
    q, levels = leaves(p), {"prefixes": p["prefixes"]}
    encode = encode_batch_topk if kind == "varying" else encode_topk
    code = encode(q["x"], q["W_enc_T"], q["b_enc"], 9, b_dec=q["b_dec"], precision=precision)
    if kind == "budgets":
        code, levels = by_value(code), {"budgets": (1, 4, 9)}
    code = code.replace(code.acts.relu())
    weights = [1.0, 2.0, 0.5] if kind == "budgets" else None
    found = decode_loss(code, q["W_dec"], q["b_dec"], q["x"], **levels, level_weights=weights, precision=precision)
    grads = torch.autograd.grad(found.loss, [q[name] for name in NAMES])
    result = {"loss": found.loss.detach(), "losses": found.level_losses, "residual": found.residual}
    return result | dict(zip(NAMES, grads))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("kind", ["fixed", "varying", "budgets"])
def test_a_captured_step_never_waits_and_reads_prefixes_anew(
    kind: str, precision: Any, generator: torch.Generator
) -> None:
    def inputs(*prefixes: int) -> Tensors:
        p = step_inputs(100, 64, N, generator, integer=False) | {"prefixes": torch.tensor(prefixes)}
        return {name: tensor.cuda() for name, tensor in p.items()}

    captured_of, replayed_with = inputs(5, 100, N), inputs(700, 701, N)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(captured_of, kind, precision)
    torch.cuda.current_stream().wait_stream(side)
    eager = step(replayed_with, kind, precision)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(captured_of, kind, precision)
    for name, tensor in replayed_with.items():
        captured_of[name].copy_(tensor)
    graph.replay()
    torch.cuda.synchronize()
    for name, tensor in eager.items():
        assert torch.equal(captured[name], tensor), name


ARCHS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("matryoshka", {}),
    ("matryoshka", {"prefix_sampling": "random"}),
    ("matryoshka:topk", {"level_loss": "sum"}),
    ("hierarchical_topk", {}),
)


@pytest.mark.parametrize(("name", "given"), ARCHS)
def test_a_training_repeats_and_resumes_bit_for_bit(name: str, given: dict[str, Any], tmp_path: Path) -> None:
    x = SuperpositionModel(64, 128, active=4.0).sample(8192, seed=1).split(512)
    config = TrainConfig(
        batch_tokens=512, tokens=512 * 40, device="cuda", checkpoint_every_steps=10, shuffle_tokens=2048,
        precision="bf16", dead_after_tokens=1024,
    )  # fmt: skip

    def fit(parts: Any, run: str, resume: bool = False) -> SAE:
        arch = settings_of(name, k=8, **given)
        folder = tmp_path / run
        return flashsae.fit(parts, d_sae=256, arch=arch, config=config, run=folder, resume=resume, progress=False)

    class Killed(list[Tensor]):
        epochs = 0

        def __iter__(self) -> Any:
            self.epochs += 1
            for number, part in enumerate(super().__iter__()):
                if self.epochs == 2 and number == 10:
                    raise KeyboardInterrupt
                yield part

    whole = fit(list(x), "a")
    with pytest.raises(KeyboardInterrupt):
        fit(Killed(x), "b")
    resumed = fit(list(x), "b", resume=True)
    for key, tensor in whole.state_dict().items():
        assert tensor.device.type == "cuda"
        assert torch.equal(tensor, resumed.state_dict()[key]), key
