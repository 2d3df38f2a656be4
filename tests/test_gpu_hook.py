"""SAEs in models that run on a GPU: the sparse kernels, the caches of generate, and SAEs that lie elsewhere."""

from __future__ import annotations

import copy
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flashsae import SAE, SAEConfig, ablate, clamp, hook, steer
from flashsae.architecture import settings_of
from flashsae.testing import poison_empty

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def model(tiny: ModuleType) -> nn.Module:
    made: nn.Module = tiny.gpt2().eval().cuda()
    made.generation_config.eos_token_id = None  # type: ignore[union-attr]
    made.generation_config.pad_token_id = 0  # type: ignore[union-attr]
    return made


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(3)).cuda()


def sae_of(arch: str = "topk", dtype: torch.dtype = torch.float32) -> SAE:
    given = {"k": 4} if arch.endswith("topk") else {}
    return SAE(SAEConfig(16, 64, arch=settings_of(arch, **given)), dtype=dtype).eval()


@pytest.mark.parametrize("arch", ["topk", "batch_topk", "jump_relu", "transcoder:topk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generate_is_that_of_the_cpu(arch: str, dtype: torch.dtype, model: nn.Module, ids: Tensor) -> None:
    sae, key = sae_of(arch, dtype), "h.1.mlp" if arch.startswith("transcoder") else "h.1"
    edits = [steer(3, 6.0, at="new"), ablate([5, 9]), clamp(40, 2.0, at=-1)]
    found: dict[str, Any] = {}
    for device in ("cpu", "cuda"):
        part = copy.deepcopy(model).to(device)
        with poison_empty(), hook(part, {key: copy.deepcopy(sae).to(device)}, edits) as codes:
            texts = part.generate(ids.to(device), max_new_tokens=4, do_sample=False)
        found[device] = texts.cpu(), codes[key].to_dense().cpu().float(), codes.edited[key].to_dense().cpu().float()
    assert torch.equal(found["cpu"][0], found["cuda"][0])
    atol = 0.05 if dtype == torch.bfloat16 else 1e-2
    for ours, theirs in zip(found["cuda"][1:], found["cpu"][1:]):
        # bfloat16 may choose another one of two latents that are equal but for its rounding
        torch.testing.assert_close(ours.sort(-1).values, theirs.sort(-1).values, rtol=0.05, atol=atol)
        same = torch.isclose(ours, theirs, rtol=0.05, atol=atol).all(-1)
        assert same.all() if dtype == torch.float32 else same.float().mean() >= 0.9
    assert (found["cuda"][2][:, 7:, 3] > 5).all()


@pytest.mark.parametrize("through", ["latents", "model"])
def test_gradients_are_those_of_the_cpu(through: Any, model: nn.Module, ids: Tensor) -> None:
    grads = []
    for device in ("cpu", "cuda"):
        part, sae = copy.deepcopy(model).to(device), sae_of().to(device)
        wanted = part(ids.to(device)).logits
        with hook(part, {"h.0": sae, "h.2": sae}, gradients=through) as codes:
            logits = part(ids.to(device)).logits
        assert torch.equal(logits, wanted)
        logits[:, -1, 3].sum().backward()
        grads.append([code.replace(code.acts.grad).to_dense().cpu() for code in codes.values()])  # type: ignore[arg-type]
    for ours, theirs in zip(*grads):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("cache", [None, "static"])
def test_a_bfloat16_model_with_every_cache(cache: str | None, model: nn.Module, ids: Tensor) -> None:
    part = copy.deepcopy(model).bfloat16()
    for sae in (sae_of().cuda(), sae_of(dtype=torch.bfloat16).cuda()):
        wanted = part(ids).logits
        with hook(part, {"h.*": sae}):
            assert torch.equal(part(ids).logits, wanted)
        with hook(part, {"h.1": sae}, clamp(5, 9.0, at="new")) as codes:
            part.generate(ids, max_new_tokens=4, do_sample=False, cache_implementation=cache)
        assert (codes.edited["h.1"].to_dense()[0, :, 5] == 9).int().tolist() == [0] * 7 + [1] * 3


def test_nothing_of_all_latents_of_all_tokens_is_made(tiny: ModuleType) -> None:
    d_sae, tokens = 1 << 17, 16 * 512
    module = nn.Sequential(nn.Identity(), nn.Identity())
    x = torch.randn(16, 512, 64, device="cuda", requires_grad=True)
    sae = SAE(SAEConfig(64, d_sae, 16), device="cuda").eval()
    for given in ({}, {"gradients": "latents"}, {"error": False}):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with hook(module, {"0": sae}, [steer([7, 8], 3.0), ablate(range(d_sae // 2))], **given) as codes:  # type: ignore[arg-type]
            out = module(x)
        out.square().sum().backward()
        assert codes.edited["0"].top_acts.shape == (16, 512, 18)
        assert torch.cuda.max_memory_allocated() - before < tokens * d_sae * 4 / 4, given


def test_an_sae_runs_where_the_activations_are(model: nn.Module, ids: Tensor) -> None:
    sae = sae_of()
    with hook(model, {"h.1": sae}, steer(3, 2.0)) as codes:
        found = model(ids).logits
    assert sae.W_dec.device.type == "cpu"
    assert codes["h.1"].acts.device.type == "cuda"
    with hook(model, {"h.1": copy.deepcopy(sae).cuda()}, steer(3, 2.0)):
        assert torch.equal(model(ids).logits, found)

    class Spread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([nn.Identity(), nn.Identity()])

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.parts[1](self.parts[0](x).cuda())
            return found

    spread, x = Spread(), torch.randn(2, 5, 16)
    with hook(spread, {"parts.*": sae}, {"parts.*": steer(3, 2.0)}) as codes:
        out = spread(x)
    torch.testing.assert_close(out.cpu(), x + 4 * sae.W_dec[3].detach())
    assert [code.acts.device.type for code in codes.values()] == ["cpu", "cuda"]
