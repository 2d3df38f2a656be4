"""The same code on a CUDA device: `pytest -m gpu`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch

import flashsae
from flashsae import SAE, SAEConfig, TrainConfig
from flashsae.data.synthetic import SuperpositionModel
from flashsae.ops import decode_sparse, encode_topk
from flashsae.testing import integer_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def test_t0_operations_equal_those_of_the_cpu(generator: torch.Generator) -> None:
    shapes = {"x": (37, 13), "W_enc_T": (101, 13), "b_enc": (101,), "b_dec": (13,), "W_dec": (101, 13)}
    cpu = {name: integer_inputs(*shape, generator=generator) for name, shape in shapes.items()}
    upstream = integer_inputs(37, 13, generator=generator)

    def run(device: str) -> list[torch.Tensor]:
        p = {name: tensor.to(device).requires_grad_() for name, tensor in cpu.items()}
        top_acts, top_indices = encode_topk(p["x"], p["W_enc_T"], p["b_enc"], 7, b_dec=p["b_dec"])
        x_hat = decode_sparse(top_acts, top_indices, p["W_dec"], p["b_dec"])
        grads = torch.autograd.grad(x_hat, list(p.values()), upstream.to(device))
        return [t.cpu() for t in (top_acts, top_indices, x_hat, *grads)]

    for ours, expected in zip(run("cuda"), run("cpu")):
        assert torch.equal(ours, expected)


def test_training_repeats_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    x = SuperpositionModel(64, 128, active=4.0).sample(8192, seed=1)
    parts = list(x.split(512))
    config = TrainConfig(
        batch_tokens=512, tokens=512 * 40, device="cuda", checkpoint_every_steps=10, shuffle_tokens=2048
    )

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
    assert [path.name for path in (tmp_path / "c" / "checkpoints").iterdir()] == ["step-00000020"]
    resumed = fit(parts, "c", resume=True)
    for name, tensor in whole.state_dict().items():
        assert tensor.device.type == "cuda"
        assert torch.equal(tensor, again.state_dict()[name]), name
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_bfloat16_input_on_the_device() -> None:
    sae = SAE(SAEConfig(64, 512, 8)).cuda()
    x = torch.randn(100, 64, device="cuda")
    assert sae(x.bfloat16()).device.type == "cuda"
    assert flashsae.evaluate(sae, x).l0 == pytest.approx(8)
