"""What is done about dead latents, on a CUDA device: `pytest -m gpu`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import flashsae
from flashsae import SAE, SAEConfig, TopKSettings, TrainConfig
from flashsae.architecture import Progress
from flashsae.architecture import description as architectures
from flashsae.architectures.topk import ARCHITECTURE as TOPK
from flashsae.data.shuffle import RowShuffle
from flashsae.data.sources import ArraySource
from flashsae.data.synthetic import SuperpositionModel
from flashsae.sae import DeadLatents, Step, fvu_weights
from flashsae.settings.training import AuxK
from flashsae.testing import AUXK, assert_as_accurate
from flashsae.train import TrainState, init_state, train, train_step
from flashsae.train.checkpoint import save_checkpoint
from flashsae.train.state import to_checkpoint

pytestmark = pytest.mark.gpu

D, N, B, K_AUX = 64, 1024, 256, 32
DEAD = list(range(0, 200, 3))
X = SuperpositionModel(D, 256, active=5.0).sample(8000, seed=1)


@pytest.mark.parametrize("capacity", [len(DEAD), 96, N])
@pytest.mark.parametrize("form", get_args(AuxK))
def test_each_form_of_the_auxiliary_loss_is_as_accurate_as_dense_autograd(form: AuxK, capacity: int) -> None:
    counter = DeadLatents(N, after_tokens=10, device="cuda")
    counter.tokens_since_fired[DEAD] = 10

    def ours() -> dict[str, Tensor]:
        sae = SAE(SAEConfig(D, N, 8), seed=1).cuda()
        x = X[:B].cuda()
        step = Step(sae, x, x, sae.encode(x), fvu_weights(x, 2.5), counter.rows(capacity), K_AUX, form)
        loss = step.auxk_loss()
        assert loss is not None
        loss.backward()
        return {"loss": loss.detach()} | {n: p.grad + 0 for n, p in sae.named_parameters() if p.grad is not None}

    def dense(dtype: torch.dtype) -> dict[str, Tensor]:
        sae = SAE(SAEConfig(D, N, 8), seed=1).cuda()
        with torch.no_grad():
            residual = (X[:B].cuda() - sae(X[:B].cuda())).to(dtype)
        params = {name: p.detach().to(dtype).requires_grad_() for name, p in sae.named_parameters()}
        x = X[:B].cuda().to(dtype)
        loss = AUXK[form](x, params, residual, counter.mask(), K_AUX, target=x, variance=2.5)
        loss.backward()
        return {"loss": loss.detach()} | {n: p.grad for n, p in params.items() if p.grad is not None}

    exact, theirs = dense(torch.float64), dense(torch.float32)
    for name, result in ours().items():
        assert_as_accurate(result, theirs[name], exact[name], f"{form} {name}")


def test_a_captured_step_reads_the_noise_of_its_step() -> None:
    sae = SAE(SAEConfig(D, N, 8), device="cuda")
    sae.precision = "bf16-int8"
    sae.encode(X[:B].cuda())
    graph, seen = torch.cuda.CUDAGraph(), torch.zeros((), dtype=torch.int64, device="cuda")
    with torch.cuda.graph(graph):
        seen.copy_(sae.memory(X)["noise"])
    for step in (3, 8, 2**40):
        sae.set_progress(Progress(step, 2**41))
        graph.replay()
        assert int(seen) == step


@dataclass(frozen=True)
class RestartedSettings(TopKSettings):
    """Settings of a TopK that resamples."""

    resample_every_steps: int = 0


@pytest.fixture
def restarted() -> Iterator[None]:
    flashsae.register(replace(TOPK, name="restarted", title="Restarted", settings=RestartedSettings))
    yield
    architectures._REGISTERED.pop("restarted")


def _state(config: TrainConfig, checkpoints: Path | None = None) -> TrainState:
    state = init_state(config, RowShuffle(ArraySource(X), B, seed=0), torch.device("cuda"), checkpoints)
    if state.step == 0:
        with torch.no_grad():
            state.sae.b_enc[DEAD] = -50.0
    return state


@pytest.mark.usefixtures("restarted")
@pytest.mark.parametrize(("precision", "moments"), [("float32", "float32"), ("bf16", "float32"), ("bf16", "bf16")])
def test_captured_steps_go_on_with_latents_that_start_again(precision: str, moments: str, tmp_path: Path) -> None:
    config = TrainConfig(
        N, arch="restarted", k=8, resample_every_steps=20, tokens=B * 70, batch_tokens=B, precision=precision,
        moments=moments, auxk_alpha=0.0, device="cuda", checkpoint_every_steps=1000,
    ).resolve(D)  # fmt: skip
    whole = _state(config)
    finished = train(whole, config)
    assert bool((whole.sae.b_enc[DEAD] > -1).all())
    torch.testing.assert_close(finished.W_dec.norm(dim=1), torch.ones(N, device=finished.W_dec.device))
    state = _state(config)
    batches = state.batches
    while state.step < 35:
        batch = {site: acts.cuda() for site, acts in batches.next_batch().items()}
        train_step(state, batch, config)
    assert state.recent
    save_checkpoint(tmp_path, to_checkpoint(state, config))
    resumed = train(_state(config, tmp_path), config)
    for name, tensor in finished.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
