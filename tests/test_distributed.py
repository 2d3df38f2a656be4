"""Two processes under DistributedDataParallel: gradients that are factors are averaged as ordinary ones are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flashsae
from flashsae import distributed

SCRIPT = """
import sys
import torch
from torch.nn.parallel import DistributedDataParallel
from flashsae import SAE, SAEConfig
from flashsae.optim import FactoredAdam

def start():
    return SAE(SAEConfig(6, 400, 3), seed=1, dtype=torch.float64)

def loss(sae, rank, step):
    generator = torch.Generator().manual_seed(100 * rank + step)
    x = torch.randn(20, 6, generator=generator, dtype=torch.float64)
    return (sae(x) - x).square().sum()

def work(rank, folder):
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    weights = {}
    for name, options in KINDS.items():
        sae = start()
        model = DistributedDataParallel(sae, **options)
        optimizer = FactoredAdam(model.parameters(), 1e-2)
        for step in range(3):
            optimizer.zero_grad()
            with model.no_sync():
                loss(model, rank, step + 50).backward()
            loss(model, rank, step).backward()
            optimizer.step()
        weights[name] = sae.state_dict()
    torch.save(weights, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()

KINDS = {"plain": {}, "views": {"gradient_as_bucket_view": True}, "small buckets": {"bucket_cap_mb": 0.01}}

if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.multiprocessing.start_processes(work, (sys.argv[1],), 2, start_method="fork")
    alone = start()
    adam = torch.optim.Adam(alone.parameters(), 1e-2, eps=6.25e-10)
    for step in range(3):
        adam.zero_grad()
        (sum(loss(alone, rank, part) for rank in (0, 1) for part in (step, step + 50)) / 2).backward()
        adam.step()
    torch.save(alone.state_dict(), f"{sys.argv[1]}/alone.pt")
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_data_parallel_processes_stay_together_and_equal_one_process(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second, alone = (torch.load(tmp_path / f"{name}.pt") for name in ("0", "1", "alone"))
    for kind, weights in first.items():
        for name, tensor in weights.items():
            assert torch.equal(tensor, second[kind][name]), (kind, name)
            torch.testing.assert_close(tensor, alone[name], rtol=1e-10, atol=1e-12)


def test_what_a_step_needs_of_the_whole_batch_passes_through_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    config = flashsae.TrainConfig(batch_tokens=32, clip_norm=0.1)
    asked: list[tuple[str, object]] = []
    for name in ("joined", "summed", "tokens_of", "averaged"):

        def passing(value: object, name: str = name) -> object:
            asked.append((name, tuple(value.shape) if isinstance(value, torch.Tensor) else type(value)))
            return value

        monkeypatch.setattr(distributed, name, passing)
    flashsae.fit(x, d_sae=400, k=3, tokens=32, config=config, progress=False)
    dead, norm, batch = ("summed", (400,)), ("summed", ()), ("tokens_of", int)
    assert {dead, norm, batch, ("averaged", float)} <= set(asked)
    assert len([name for name, _ in asked if name == "joined"]) == 4  # two matrices: for the norm, and for the step


def test_the_largest_of_a_batch_are_chosen_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    x, W = torch.randn(20, 6), torch.randn(90, 6)
    asked = []
    largest = distributed.largest

    def counted(keys: torch.Tensor, wanted: int) -> torch.Tensor:
        asked.append(wanted)
        return largest(keys, wanted)

    monkeypatch.setattr(distributed, "largest", counted)
    code = flashsae.ops.encode_batch_topk(x, W, torch.zeros(90), 3)
    assert asked == [60]
    expected = torch.zeros(20 * 90, dtype=torch.bool)
    expected[(x @ W.T).flatten().topk(60).indices] = True
    assert torch.equal(code.to_dense() != 0, expected.view(20, 90))
