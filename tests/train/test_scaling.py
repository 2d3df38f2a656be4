from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flashsae
from flashsae import SAE, TrainConfig
from flashsae.architecture import architecture_named, architecture_names
from flashsae.architecture import description as architectures
from flashsae.architectures.topk import ARCHITECTURE as TOPK
from flashsae.architectures.topk import TopKSettings
from flashsae.data.shuffle import RowShuffle
from flashsae.data.sources import ArraySource
from flashsae.data.synthetic import SuperpositionModel
from flashsae.errors import ConfigError, DataError, FlashSAEError, FlashSAEWarning
from flashsae.files.documents import sealed
from flashsae.files.reading import sha256
from flashsae.sae.units import layer_norm
from flashsae.train import TrainState, init_state, train, train_step
from flashsae.train.checkpoint import list_checkpoints
from helpers import sites

X = SuperpositionModel(8, 16, active=2.0).sample(640, seed=1)
Y = 1000 * X @ torch.randn(8, 6, generator=torch.Generator().manual_seed(3))
SITES = {"before": X, "after": Y}
KINDS = ("power_of_two", "none", "mean_square", "layer_norm")
OURS = [name for name in architecture_names(installed=False) if architecture_named(name).sites == ("x",)]
"""All autoencoders, also those that are yet to come."""
PAIRED = ["transcoder", "skip_transcoder:jump_relu", "transcoder:batch_topk", "bridge"]
"""What reads one site and writes another."""
SEVERAL = ["crosscoder", "crosscoder:topk"]
"""What reads and writes both."""
SMALL: dict[str, Any] = {"batch_tokens": 64, "tokens": 64 * 12, "checkpoint_every_steps": 5, "d_sae": 16}


@pytest.fixture(autouse=True)
def registered() -> None:
    sites.register()


def state_of(x: Any, kind: str, checkpoints: Path | None = None, **changes: Any) -> tuple[TrainState, TrainConfig]:
    source = ArraySource(x)
    settings = config(kind, **changes).resolve(source.widths)
    return init_state(settings, RowShuffle(source, 64, seed=0), torch.device("cpu"), checkpoints), settings


def same(a: SAE, b: SAE) -> bool:
    return all(torch.equal(tensor, b.state_dict()[name]) for name, tensor in a.state_dict().items())


def beside_each_other(arch: str) -> tuple[Tensor, Tensor]:
    if arch in SEVERAL:
        return (torch.cat([X, Y], 1),) * 2
    return (X, Y) if arch in PAIRED else (X, X)


EVERY = [
    *((arch, kind) for arch in OURS for kind in KINDS),
    *((arch, kind) for arch in [*PAIRED, *SEVERAL] for kind in KINDS[:3]),
]
CASES = [
    *((arch, kind, "float32") for arch, kind in EVERY),
    *((arch, kind, "bf16") for arch, kind in EVERY if arch in ("batch_topk", "transcoder", "crosscoder")),
]


@pytest.mark.parametrize(("arch", "kind", "precision"), CASES)
def test_the_finished_sae_does_to_activations_what_the_trained_one_does_to_scaled_ones(
    arch: str, kind: str, precision: str
) -> None:
    x: Any = X if arch in OURS else SITES
    state, config = state_of(x, kind, arch=arch, precision=precision)
    sae = train(state, config)
    beside = beside_each_other(arch)
    seen, target = state.scaling(*beside)
    assert {seen.dtype, target.dtype} == {torch.float32}
    trained = SAE(state.sae.config)
    split = {name: state.optimizer.float32_weights(weight) for name, weight in state.sae.named_parameters()}
    trained.load_state_dict({**state.sae.state_dict(), **split})
    trained.eval()
    with torch.no_grad():
        code, scaled_code = sae.encode(beside[0]), trained.encode(seen)
        agree = ((code.to_dense() != 0) == (scaled_code.to_dense() != 0)).all(1)
        assert agree.float().mean() > 0.98  # of the others two latents are equal up to rounding
        x_hat, scaled = sae(beside[0]), trained(seen)
        wide = trained.double()
        reference = wide.decode(scaled_code.replace(scaled_code.acts.double()))
        if kind == "layer_norm":
            mean, deviation = X.double().mean(1, keepdim=True), X.double().std(1, keepdim=True) + 1e-5
            reference, scaled = reference * deviation + mean, (scaled.double() * deviation + mean).float()
        else:
            factors = torch.tensor([site.factor for site in state.scaling.writes for _ in range(site.width)])
            reference, scaled = reference / factors.double(), (scaled.double() / factors).float()
    exact = kind in ("power_of_two", "none") and arch not in PAIRED and sae.architecture.finish is None
    if exact:
        assert torch.equal(x_hat, scaled)
    torch.testing.assert_close(x_hat[agree], scaled[agree], rtol=1e-5, atol=1e-5 * float(scaled.abs().amax()))
    keeps_norms = any(row.name == "W_dec" and row.unit_norm for row in sae.architecture.parameters)
    if keeps_norms and sae.architecture.finish is None and len({site.factor for site in state.scaling.writes}) == 1:
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(16))


@pytest.mark.parametrize("arch", PAIRED)
def test_tokens_whose_statistics_are_not_known_are_not_normalised(arch: str) -> None:
    with pytest.raises(ConfigError, match=r"reads or reconstructs others beside it\. Take mean_square"):
        state_of(SITES, "layer_norm", arch=arch)


def test_what_training_sees_has_the_scale_that_was_asked_for() -> None:
    state, _ = state_of(SITES, "mean_square", arch="crosscoder")
    seen, _ = state.scaling(*(torch.cat([X, Y], 1),) * 2)
    assert [part.square().mean().item() for part in seen.split([8, 6], 1)] == pytest.approx([1, 1], rel=1e-6)
    state, _ = state_of(SITES, "power_of_two", arch="bridge")
    for part in state.scaling(X, Y):  # each near 1/4
        assert 0.17 < part.var(dim=0, correction=0).mean().sqrt() < 0.36
    state, _ = state_of(SITES, "power_of_two", arch="crosscoder")
    assert len({site.factor for site in state.scaling.writes}) == 1  # what is reconstructed keeps its proportions
    state, _ = state_of(3 * X, "none")
    assert torch.equal(state.scaling(X, X)[0], X)
    state, _ = state_of(3 * X, "layer_norm")
    assert torch.equal(state.scaling(3 * X, Y)[0], layer_norm(3 * X))


@pytest.mark.parametrize("kind", ["power_of_two", "mean_square"])
def test_the_unit_of_activations_changes_no_direction(kind: str) -> None:
    one, other = (flashsae.fit(x, progress=False, config=config(kind)) for x in (X, X * 2.0**13))
    assert torch.equal(one.W_dec, other.W_dec)
    assert torch.equal(one.b_dec * 2.0**13, other.b_dec)


def config(kind: str, **changes: Any) -> TrainConfig:
    arch = changes.get("arch", "topk")
    few = {name: 3 for name in ("k", "target_l0") if hasattr(architecture_named(arch).settings, name)}
    return TrainConfig(**SMALL | few | {"normalize_activations": kind} | changes)


@pytest.mark.parametrize(("arch", "kind"), [case for case in EVERY if case[1] != "none" or case[0] == "topk"])
def test_a_training_is_resumed_to_the_same_bytes(arch: str, kind: str, tmp_path: Path) -> None:
    x: Any = X if arch in OURS else SITES
    settings = config(kind, arch=arch)
    whole = flashsae.fit(x, d_sae=16, config=settings, run=tmp_path / "run", progress=False)
    newest = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    for part in newest.iterdir():
        part.unlink()
    newest.rmdir()
    resumed = flashsae.fit(x, d_sae=16, config=settings, run=tmp_path / "run", resume=True, progress=False)
    assert same(whole, resumed)
    assert whole.config == resumed.config
    assert (whole.config.normalize_activations == "layer_norm") == (kind == "layer_norm")
    other = "mean_square" if kind == "none" else "none"
    with pytest.raises(FlashSAEError, match=f"normalize_activations was '{kind}' and is '{other}' now"):
        flashsae.fit(x, d_sae=16, config=config(other, arch=arch), run=tmp_path / "run", resume=True, progress=False)


@pytest.mark.parametrize("arch", ["topk", "batch_topk"])
def test_a_checkpoint_of_version_4_is_resumed(arch: str, tmp_path: Path) -> None:
    settings, x = config("power_of_two", arch=arch), 40 * X
    whole = flashsae.fit(x, d_sae=16, config=settings, run=tmp_path / "run", progress=False)
    old, new = list_checkpoints(tmp_path / "run" / "checkpoints")
    for part in new.iterdir():
        part.unlink()
    new.rmdir()
    saved = json.loads((old / "state.json").read_text())
    scale = saved.pop("scaling")["writes"][0]["factor"]
    assert scale != 1.0
    saved["scale"] = scale
    known = {
        "arch",
        "k",
        "d_sae",
        "d_in",
        "d_out",
        "tokens",
        "batch_tokens",
        "precision",
        "moments",
        "lr",
        "warmup_steps",
    }
    known |= {"decay_fraction", "clip_norm", "auxk_alpha", "k_aux", "dead_after_tokens", "shuffle_tokens", "seed"}
    known |= {"log_every_steps", "evaluate_every_steps", "checkpoint_every_steps", "device"}
    for name in ("start", "room"):
        saved.pop(name, None)
    saved["config"] = {name: value for name, value in saved["config"].items() if name in known}
    (old / "state.json").write_text(json.dumps(saved))
    manifest = json.loads((old / "manifest.json").read_text())
    manifest |= {"format_version": 4, "sha256": {**manifest["sha256"], "state.json": sha256(old / "state.json")}}
    (old / "manifest.json").write_text(json.dumps(sealed(manifest)))
    resumed = flashsae.fit(x, d_sae=16, config=settings, run=tmp_path / "run", resume=True, progress=False)
    assert same(whole, resumed)


def fitted(x: Any, kind: str, **changes: Any) -> SAE:
    return flashsae.fit(x, d_sae=16, config=config(kind, **changes), progress=False)


@pytest.mark.parametrize("kind", KINDS)
def test_activations_of_every_dtype_that_hold_the_same_numbers_give_the_same_sae(kind: str) -> None:
    x = X.bfloat16()
    expected = fitted(x.float(), kind)
    assert same(fitted(x, kind), expected)
    assert same(fitted(x.double(), kind), expected)
    assert same(fitted(X.half().double(), kind), fitted(X.half(), kind))
    parts = [part.float() for part in x.split(50)]
    assert same(fitted([part.double() for part in parts], kind), fitted(parts, kind))
    assert same(fitted([part.bfloat16() for part in parts], kind), fitted(parts, kind))


def test_sites_may_have_different_dtypes() -> None:
    narrow = {"before": X.bfloat16(), "after": (Y / 1000).bfloat16()}
    for arch in ("bridge", "crosscoder"):
        expected = fitted({site: x.float() for site, x in narrow.items()}, "mean_square", arch=arch)
        assert same(fitted({**narrow, "after": narrow["after"].double()}, "mean_square", arch=arch), expected)


def test_narrow_activations_are_read_where_they_lie() -> None:
    x = X.bfloat16()
    source = ArraySource(x)
    assert source.rows(torch.arange(5))["x"].dtype == torch.bfloat16
    state, settings = state_of(x, "mean_square")
    largest = max_elements_of_new_tensors(lambda: train_step(state, state.batches.next_batch(), settings))
    assert largest < x.numel()


def max_elements_of_new_tensors(work: Any) -> int:
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.is_floating_point():
                sizes.append(out.untyped_storage().nbytes() // out.element_size())
            return out

    with Spy():
        work()
    assert sizes
    return max(sizes)


@pytest.mark.parametrize("kind", ["power_of_two", "mean_square", "layer_norm"])
def test_float64_activations_are_scaled_before_they_are_narrowed(kind: str) -> None:
    """Their squares are beyond float32, and small coordinates below its smallest number."""
    factor = 2.0**-98 if kind == "power_of_two" else 2.0**110
    wide = X.double()
    if kind == "layer_norm":
        torch.testing.assert_close(fitted(wide * factor, kind).W_dec, fitted(wide, kind).W_dec, rtol=0.05, atol=0.05)
        return
    one, other = fitted(wide, kind), fitted(wide * factor, kind)
    assert torch.equal(one.W_dec, other.W_dec)
    assert torch.equal(one.W_enc_T, other.W_enc_T)
    assert flashsae.evaluate(other, wide * factor).fvu == pytest.approx(flashsae.evaluate(one, wide).fvu, rel=1e-3)


def test_tokens_of_huge_norm_are_told_of_unless_they_are_normalised() -> None:
    x = X.clone()
    x[::80] *= 300
    with pytest.warns(FlashSAEWarning, match="hold .* of the variance"):
        fitted(x, "mean_square")
    fitted(x, "layer_norm")  # a warning would be an error


@pytest.mark.parametrize(
    ("x", "kind", "message"),
    [
        (X * 1e15, "none", r"the activations reach .*e\+15, which float32 has no room to square"),
        (X * 1e-15, "none", r"the activations reach .*e-15, which float32 has no room to square"),
        (X * 1e-7, "layer_norm", r"deviate by .*e-\d\d from their mean, to which layer_norm adds 1e-05 before"),
        (torch.ones(640, 1) + X[:, :1], "layer_norm", r"expected layer_norm of at least two coordinates a site, got 1"),
        ({"before": torch.zeros(640, 8), "after": Y}, "mean_square", "that are read do not vary"),
        ({"before": torch.ones(640, 8), "after": Y}, "power_of_two", "that are read do not vary"),
        ({"a": X, "b": torch.ones(640, 8)}, "mean_square", "activations of b do not vary: 640 sampled tokens are eq"),
        ({"a": torch.zeros(640, 8), "b": X}, "power_of_two", "the activations of a do not vary"),
    ],
)
def test_what_cannot_be_scaled_so_is_said(x: Any, kind: str, message: str) -> None:
    arch = {} if not isinstance(x, dict) else {"arch": "bridge" if "before" in x else "crosscoder"}
    with pytest.raises((DataError, ConfigError), match=message):
        fitted(x, kind, **arch)


@dataclass(frozen=True)
class _Unscaled(TopKSettings):
    """Settings of an architecture whose default is another one."""


def test_an_architecture_may_have_a_default_of_its_own() -> None:
    flashsae.register(
        replace(TOPK, name="unscaled", settings=_Unscaled, defaults={"normalize_activations": "mean_square"})
    )
    try:
        resolved = TrainConfig(arch="unscaled").resolve(8)
        assert resolved.normalize_activations == "mean_square"
        assert TrainConfig(arch="unscaled", normalize_activations="none").resolve(8).normalize_activations == "none"
        assert TrainConfig().resolve(8).normalize_activations == "power_of_two"
    finally:
        architectures._REGISTERED.pop("unscaled")
