from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import flashsae
from flashsae import SAE, Parameter, SAEConfig, TrainConfig
from flashsae.architecture import architecture_named, architecture_names
from flashsae.architectures.topk import ARCHITECTURE as TOPK
from flashsae.architectures.topk import TopKSettings
from flashsae.data.shuffle import RowShuffle
from flashsae.data.sources import ArraySource
from flashsae.data.synthetic import SuperpositionModel
from flashsae.errors import CheckpointError, ConfigError
from flashsae.train import TrainState, init_state, train
from flashsae.train.checkpoint import list_checkpoints
from flashsae.train.init_from import check_saved_start
from helpers import sites

X = 40 * SuperpositionModel(8, 16, active=2.0).sample(640, seed=1) + 3
Y = 1000 * X @ torch.randn(8, 6, generator=torch.Generator().manual_seed(3))
SITES = {"before": X, "after": Y}
SMALL: dict[str, Any] = {"batch_tokens": 64, "tokens": 64 * 12, "checkpoint_every_steps": 5, "d_sae": 16}
OURS = [name for name in architecture_names(installed=False) if architecture_named(name).sites == ("x",)]
"""All autoencoders, also those that are yet to come."""
PAIRED = ["transcoder", "skip_transcoder:jump_relu", "transcoder:batch_topk", "bridge"]
"""What reads one site and writes another."""
SEVERAL = ["crosscoder", "crosscoder:topk"]
"""What reads and writes both."""
PAIRS = [
    ("power_of_two", "none"),
    ("none", "mean_square"),
    ("mean_square", "power_of_two"),
    ("mean_square", "mean_square"),
    ("layer_norm", "layer_norm"),
]


@pytest.fixture(autouse=True)
def registered() -> None:
    sites.register()


def config(**changes: Any) -> TrainConfig:
    settings = architecture_named(changes.get("arch", "topk")).settings
    few = {name: 3 for name in ("k", "target_l0") if hasattr(settings, name)}
    return TrainConfig(**SMALL | few | changes)


def data_of(arch: str) -> Any:
    return X if arch in OURS else SITES


def start(x: Any, start: SAE | None = None, **changes: Any) -> TrainState:
    source = ArraySource(x)
    settings = config(**changes).resolve(source.widths)
    batches = RowShuffle(source, 64, seed=0)
    return init_state(settings, batches, torch.device("cpu"), start=start)


def same(a: SAE, b: SAE) -> bool:
    return all(torch.equal(tensor, b.state_dict()[name]) for name, tensor in a.state_dict().items())


def joined(arch: str) -> tuple[torch.Tensor, torch.Tensor]:
    if arch in SEVERAL:
        return (torch.cat([X, Y], 1),) * 2
    return (X, Y) if arch in PAIRED else (X, X)


@pytest.mark.parametrize(("first", "again"), PAIRS)
@pytest.mark.parametrize("arch", [*OURS, *PAIRED, *SEVERAL])
def test_a_training_starts_with_the_function_that_was_saved(arch: str, first: str, again: str) -> None:
    if first == "layer_norm" and arch not in OURS:
        return
    x = data_of(arch)
    saved = flashsae.fit(x, config=config(arch=arch, normalize_activations=first), progress=False)
    state = start(x, saved, arch=arch, normalize_activations=again)
    begun = state.current_sae()
    read, _ = joined(arch)
    x_hat, expected = begun(read), saved(read)
    if first in ("power_of_two", "none") and again in ("power_of_two", "none"):
        assert same(begun, saved)
        assert torch.equal(x_hat, expected)
    agree = ((begun.encode(read).to_dense() != 0) == (saved.encode(read).to_dense() != 0)).all(1)
    assert agree.float().mean() > 0.98
    largest = float(expected.detach().abs().amax())
    torch.testing.assert_close(x_hat[agree], expected[agree], rtol=1e-5, atol=1e-5 * largest)
    assert state.step == 0


def test_split_weights_start_whole() -> None:
    saved = flashsae.fit(X, config=config(), progress=False)
    state = start(X, saved, precision="bf16")
    assert state.sae.W_dec.dtype == torch.bfloat16
    assert same(state.finished_sae(), saved)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_saved_sae_of_another_dtype_is_gone_on_with(dtype: torch.dtype, tmp_path: Path) -> None:
    saved = flashsae.fit(X, config=config(), progress=False).to(dtype)
    saved.save(tmp_path / "sae")
    begun = start(X, init_from=tmp_path / "sae").current_sae()
    for name, tensor in begun.state_dict().items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, saved.state_dict()[name].float(), rtol=0, atol=0)


def test_fine_tuning_goes_on_where_training_ended(tmp_path: Path) -> None:
    saved = flashsae.fit(X, config=config(tokens=64 * 60), progress=False)
    saved.save(tmp_path / "sae")
    tuned = flashsae.fit(X, config=config(init_from=tmp_path / "sae", lr=1e-4), progress=False)
    anew = flashsae.fit(X, config=config(lr=1e-4), progress=False)
    before, after, other = (flashsae.evaluate(sae, X).fvu for sae in (saved, tuned, anew))
    assert after < before < 0.7 * other


def test_the_folder_of_a_run_will_do_and_is_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = flashsae.fit(X, config=config(), progress=False)
    saved.save(tmp_path / "run" / "sae")
    monkeypatch.chdir(tmp_path)
    settings = config(init_from="run")
    monkeypatch.chdir("/")
    assert settings.init_from == tmp_path / "run"
    assert same(start(X, init_from=settings.init_from).current_sae(), saved)


def test_the_running_threshold_starts_anew_where_there_was_none() -> None:
    saved = flashsae.fit(X, config=config(), progress=False)
    begun = start(X, saved, arch="batch_topk").current_sae()
    assert torch.equal(begun.W_dec, saved.W_dec)
    assert (begun.threshold.item(), begun.threshold_steps.item()) == (0.0, 0.0)
    other = flashsae.fit(X, config=config(arch="batch_topk"), progress=False)
    state = start(X, other, arch="batch_topk", k=5)
    assert torch.equal(state.current_sae().threshold, other.threshold)
    assert other.threshold_steps.item() == state.sae.threshold_steps.item() == 12
    back = start(X, other).current_sae()
    assert torch.equal(back.W_enc_T, other.W_enc_T)
    trained = train(state, config(arch="batch_topk", k=5).resolve(8))
    assert trained.threshold_steps.item() == 24


@dataclass(frozen=True)
class LearntSettings(TopKSettings):
    """Settings of an architecture that learns a threshold.

    Args:
        k: Latents active for each token.
    """


@pytest.mark.parametrize(
    ("saved", "asked", "message"),
    [
        (SAEConfig(8, 32, 3), {}, r"one of topk with d_sae 32, and not 16\. Ask"),
        (SAEConfig(9, 16, 3), {}, "with d_in 9, and not 8; d_out 9, and not 8"),
        (
            SAEConfig(8, 16, 3),
            {"arch": "learnt"},
            "expected an SAE like the one that is asked for, Learnt, .* no level",
        ),
        ("learnt", {}, "one of learnt with level of its own"),
        (SAEConfig(8, 16, 3), {"normalize_activations": "layer_norm"}, "normalize_activations other than layer_norm"),
        (SAEConfig(8, 16, 3, normalize_activations="layer_norm"), {}, "with normalize_activations layer_norm"),
        ("bridge", {}, "one of bridge with other sites; no b_dec that is subtracted from its input"),
    ],
)
def test_another_sae_is_refused_in_a_sentence(saved: Any, asked: dict[str, Any], message: str, tmp_path: Path) -> None:
    level = Parameter("level", ("d_sae",), "learnt", power=1)
    flashsae.register(
        replace(TOPK, name="learnt", title="Learnt", settings=LearntSettings, parameters=(*TOPK.parameters, level))
    )
    kinds = {"learnt": LearntSettings(k=3), "bridge": sites.BridgeSettings(k=3)}
    sae = SAE(SAEConfig(8, 16, arch=kinds[saved]) if isinstance(saved, str) else saved)
    sae.save(tmp_path / "sae")
    with pytest.raises(ConfigError, match=rf"^init_from: .*{message}"):
        start(X, init_from=tmp_path / "sae", **asked)
    if "d_in" not in message:  # which only the activations tell
        with pytest.raises(ConfigError, match=rf"^init_from: .*{message}"):
            check_saved_start(config(init_from=tmp_path / "sae", **asked))
    check_saved_start(config())


def test_rows_that_training_would_make_shorter_are_refused() -> None:
    sae = SAE(SAEConfig(8, 16, 3))
    with torch.no_grad():
        sae.W_dec[3] *= 1.5
    with pytest.raises(ConfigError, match=r"init_from: expected rows of W_dec of norm 1, .* norms from 1 to 1\.5"):
        start(X, sae)


@pytest.mark.parametrize("arch", ["crosscoder", "crosscoder:topk"])
def test_a_crosscoder_goes_on_where_its_sites_have_other_scales(arch: str) -> None:
    saved = flashsae.fit(SITES, config=config(arch=arch), progress=False)
    x = {"before": 3 * X, "after": Y / 50}
    state = start(x, saved, arch=arch)
    torch.testing.assert_close(state.sae.W_dec.norm(dim=1), torch.ones(16))
    begun, read = state.current_sae(), torch.cat([3 * X, Y / 50], 1)
    agree = ((begun.encode(read).to_dense() != 0) == (saved.encode(read).to_dense() != 0)).all(1)
    assert agree.float().mean() > 0.98
    for ours, theirs in zip(begun(read)[agree].split([8, 6], 1), saved(read)[agree].split([8, 6], 1)):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.detach().abs().amax()))


def test_what_is_no_saved_sae_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no SAE of a format that is known"):
        start(X, init_from=tmp_path)
    with pytest.raises(CheckpointError, match="none holds no SAE: there is no such file or folder"):
        check_saved_start(config(init_from=tmp_path / "none"))
    with pytest.raises(ConfigError, match="init: expected no other start beside init_from, got data"):
        config(init_from=tmp_path, init="data")
    with pytest.raises(ConfigError, match="init: expected one of random, data, got 'zeros'"):
        config(init="zeros")


def _lose_the_newest(run: Path) -> None:
    shutil.rmtree(list_checkpoints(run / "checkpoints")[-1])


@pytest.mark.parametrize("arch", [*OURS, *PAIRED])
@pytest.mark.parametrize("init", ["data", "path"])
def test_a_start_is_remembered_by_what_is_resumed(arch: str, init: str, tmp_path: Path) -> None:
    x = data_of(arch)
    saved = flashsae.fit(x, config=config(arch=arch), progress=False)
    saved.save(tmp_path / "sae")
    changes = {"init": "data"} if init == "data" else {"init_from": tmp_path / "sae"}
    settings = config(arch=arch, normalize_activations="mean_square", **changes)
    whole = flashsae.fit(x, config=settings, run=tmp_path / "run", progress=False)
    _lose_the_newest(tmp_path / "run")
    shutil.rmtree(tmp_path / "sae")  # what is resumed has all that it needs
    resumed = flashsae.fit(x, config=settings, run=tmp_path / "run", resume=True, progress=False)
    assert same(resumed, whole)
    with pytest.raises(CheckpointError, match=r"init(_from)? was .* and is .* now"):
        flashsae.fit(
            x, config=replace(settings, init="random", init_from=None), run=tmp_path / "run", resume=True,
            progress=False,
        )  # fmt: skip


def test_an_sae_in_memory_is_gone_on_with_and_remembered(tmp_path: Path) -> None:
    saved = flashsae.fit(X, config=config(), progress=False)
    whole = flashsae.fit(X, config=config(), init_from=saved, run=tmp_path / "run", progress=False)
    saved.save(tmp_path / "sae")
    assert same(flashsae.fit(X, config=config(), init_from=tmp_path / "sae", progress=False), whole)
    assert same(flashsae.fit(X, config=config(), init_from=str(tmp_path / "sae"), progress=False), whole)
    _lose_the_newest(tmp_path / "run")
    run: dict[str, Any] = {"config": config(), "run": tmp_path / "run", "resume": True, "progress": False}
    assert same(flashsae.fit(X, init_from=saved, **run), whole)
    with pytest.raises(CheckpointError, match="of a training that went on from another SAE"):
        flashsae.fit(X, init_from=whole, **run)
    with pytest.raises(CheckpointError, match="of a training that went on from another SAE"):
        flashsae.fit(X, **run)


def test_what_is_not_asked_for_is_as_it_was() -> None:
    few: dict[str, Any] = {"tokens": 64, "batch_tokens": 64, "progress": False}
    saved = flashsae.fit(X, config=config(arch="batch_topk", normalize_activations="layer_norm"), progress=False)
    assert flashsae.fit(X, init_from=saved, **few).config == saved.config
    with pytest.raises(ConfigError, match=r"init_from: .* with d_sae 16, and not 20"):
        flashsae.fit(X, init_from=saved, d_sae=20, **few)
    assert flashsae.fit(X, init_from=saved, k=2, **few).config.arch == flashsae.BatchTopKSettings(k=2)
    assert flashsae.fit(X, init_from=saved, arch="topk", k=2, **few).config.arch == TopKSettings(k=2)
    assert flashsae.fit(X, init_from=saved, arch="topk", **few).config.arch == TopKSettings(k=saved.config.arch.k)
    with pytest.raises(ConfigError, match=r"init_from: .* normalize_activations layer_norm"):
        flashsae.fit(X, init_from=saved, normalize_activations="none", **few)
    with pytest.raises(ConfigError, match="kk: batch_topk has no such setting"):
        flashsae.fit(X, init_from=saved, kk=2, **few)
    with pytest.raises(ConfigError, match="init: expected no other start beside init_from"):
        flashsae.fit(X, init_from=saved, init="data", **few)
    with pytest.raises(ConfigError, match="init_from: expected one SAE to go on from, got one beside that in /none"):
        flashsae.fit(X, init_from=saved, config=config(init_from="/none"), progress=False)
    with pytest.raises(ConfigError, match="init_from: expected a path, got 3"):
        flashsae.fit(X, init_from=3, **few)


def test_data_find_more_than_random_directions_in_a_short_training() -> None:
    model = SuperpositionModel(32, 64, active=3.0, seed=1)
    x, held_out = model.sample(4000, seed=2), model.sample(1000, seed=3)
    fvu = {
        init: flashsae.evaluate(flashsae.fit(x, config=config(d_sae=256, init=init), progress=False), held_out).fvu
        for init in ("random", "data")
    }
    assert fvu["data"] < fvu["random"]


@pytest.mark.parametrize("arch", ["transcoder", "skip_transcoder:batch_topk"])
def test_decoder_rows_of_a_transcoder_start_as_the_targets_of_its_tokens(arch: str) -> None:
    state = start(SITES, arch=arch, init="data")
    x, y = state.scaling(X, Y)
    rows = torch.arange(0, 640, 640 // 16)[:16]
    for weights, tokens in ((state.sae.W_enc_T, x), (state.sae.W_dec, y)):
        points = torch.nn.functional.normalize(tokens[rows] - tokens[rows].mean(0), dim=1)
        cosines = (torch.nn.functional.normalize(weights.detach(), dim=1) * points).sum(1)
        assert cosines.min() > 0.75
    torch.testing.assert_close(state.sae.b_dec.detach(), y.mean(0))


@pytest.mark.parametrize("init", ["random", "data"])
def test_more_latents_than_tokens_may_start_from_data(init: str) -> None:
    for x in (X[:100], [X[:50], X[50:100]]):
        sae = flashsae.fit(x, config=config(d_sae=300, init=init), progress=False)
        assert flashsae.evaluate(sae, X).fvu < 0.9


def test_the_folder_of_a_batch_topk_sae_resumes_with_its_threshold(tmp_path: Path) -> None:
    saved = flashsae.fit(X, config=config(arch="batch_topk"), progress=False)
    saved.save(tmp_path / "sae")
    begun = start(X, arch="batch_topk", init_from=tmp_path / "sae").current_sae()
    assert flashsae.evaluate(begun, X).fvu == flashsae.evaluate(saved, X).fvu
