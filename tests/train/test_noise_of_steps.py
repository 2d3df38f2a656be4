"""Every selection of a training rounds with the noise of its step, whatever the architecture, resumed or not."""

from __future__ import annotations

import copy
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import flashsae
from flashsae import SAE, SAEConfig
from flashsae.architecture import Progress, architecture_names, settings_of
from helpers.resumed import same_after_a_kill

X = torch.randn(200, 6, generator=torch.Generator().manual_seed(3)) + 0.2
Y = X.roll(1, 1) * 2
STEPS = 4
SETTINGS = {"tokens": 32 * STEPS, "d_sae": 48, "batch_tokens": 32, "dead_after_tokens": 1, "progress": False}
SEVERAL = {"crosscoder": {"a": X, "b": Y}, "transcoder": {"in": X, "out": Y}, "skip_transcoder": {"in": X, "out": Y}}
ARCHS = [*architecture_names(installed=False), "transcoder:jump_relu", "skip_transcoder:batch_topk", "crosscoder:relu"]


class Seeds(TorchDispatchMode):
    """Notes what noise each encoder that runs is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int | None]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("flashsae::")
        if name.startswith("encode_"):
            self.seen.append((name, None if args[-1] is None else int(args[-1])))
        return func(*args, **(kwargs or {}))


def seeds_of(name: str, precision: str, **settings: Any) -> list[tuple[str, int | None]]:
    with Seeds() as seeds:
        flashsae.fit(SEVERAL.get(name.partition(":")[0], X), arch=name, precision=precision, **SETTINGS, **settings)
    return seeds.seen


@pytest.mark.parametrize("name", ARCHS)
def test_every_encoder_of_every_architecture_has_that_of_its_step(name: str) -> None:
    own = {"k": 3} if hasattr(settings_of(name), "k") else {}
    seen = seeds_of(name, "bf16-int8", **own)
    steps = [seed for _, seed in seen]
    assert set(steps) == set(range(STEPS))
    assert steps == sorted(steps)  # type: ignore[type-var]
    if "topk" in name:  # few latents are active, so that some are dead
        assert steps.count(STEPS - 1) == 2


@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_nothing_else_has_any(precision: str) -> None:
    assert {seed for _, seed in seeds_of("topk", precision, k=3)} == {None}


def test_a_resumed_training_goes_on_with_that_of_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**SETTINGS, "k": 3, "precision": "float32-int8", "checkpoint_every_steps": 2}
    del settings["progress"]
    with Seeds() as seeds:
        same_after_a_kill(tmp_path, monkeypatch, x=X, after=3, **settings)
    found = [(seed, len(list(group))) for seed, group in groupby(seed for _, seed in seeds.seen)]
    whole, cut = found[:STEPS], found[STEPS:]
    assert [seed for seed, _ in whole] == [seed for seed, _ in cut] == [*range(STEPS)]
    assert [count for _, count in cut] == [count * (1 + (seed == 2)) for seed, count in whole]  # step 2 was done again


def sae_of(precision: Any = "bf16-int8", arch: str = "topk") -> SAE:
    sae = SAE(SAEConfig(6, 48, arch=settings_of(arch)))
    sae.precision = precision
    return sae


def test_it_is_changed_in_place_so_that_a_captured_step_reads_it_anew() -> None:
    sae = sae_of()
    noise = sae.noise
    assert noise is not None
    assert (noise.dtype, noise.shape) == (torch.int64, ())
    for step in (0, 7, 2**40):
        sae.set_progress(Progress(step, 2**41))
        assert sae.noise is noise
        assert int(noise) == step


def test_it_is_no_parameter_and_not_saved(tmp_path: Path) -> None:
    sae = sae_of()
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    assert sae.noise is not None
    assert sae.state_dict().keys() == before.keys()
    assert not [name for name, _ in (*sae.named_parameters(), *sae.named_buffers()) if "noise" in name]
    sae.save(tmp_path / "sae")
    again = SAE.load(tmp_path / "sae")
    assert again.noise is None  # the precision is not saved either


def test_it_goes_where_the_sae_goes() -> None:
    sae = sae_of()
    sae.set_progress(Progress(5, 9))
    assert int(sae.noise) == 5  # type: ignore[arg-type]
    twin = copy.deepcopy(sae)
    assert int(twin.noise) == 5  # type: ignore[arg-type]
    assert twin.noise is not sae.noise
    assert sae.to("meta").noise.device.type == "meta"  # type: ignore[union-attr]
    assert int(twin.rescaled(2.0).noise) == 5  # type: ignore[arg-type]


def test_none_stays_that_was_made_where_tensors_hold_no_numbers() -> None:
    sae, mode = sae_of(), FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        assert sae.encode(mode.from_tensor(X)).acts.shape == (200, 32)
    assert type(sae.noise) is Tensor
    assert torch.equal(sae.encode(X).acts, sae_of("bf16").encode(X).acts)


def test_one_that_inference_made_can_be_changed_by_a_training() -> None:
    sae = sae_of()
    with torch.inference_mode():
        sae.encode(X)
    sae.set_progress(Progress(3, 9))
    assert int(sae.noise) == 3  # type: ignore[arg-type]


def test_memory_hands_it_to_encoders_of_ones_own() -> None:
    for training in (True, False):
        assert int(sae_of().train(training).memory(X)["noise"]) == 1
        assert "noise" not in sae_of("bf16").train(training).memory(X)
        assert "noise" not in sae_of(None).train(training).memory(X)


def test_an_sae_with_a_screen_is_compiled_whole() -> None:
    def codes(x: Tensor, sae: SAE) -> Tensor:
        return sae.encode(x).acts

    sae = sae_of().eval()
    expected = codes(X, sae)
    fresh = sae_of().eval()
    for each in (fresh, sae):  # one that has none yet, and one that has
        compiled = torch.compile(codes, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(X, each), expected)
        torch._dynamo.reset()
