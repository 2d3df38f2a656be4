from __future__ import annotations

from dataclasses import dataclass, replace
from typing import get_args

import numpy as np
import pytest
import torch

from flashsae import BatchTopKSettings, TopKSettings, TrainConfig
from flashsae.architecture import description
from flashsae.errors import ConfigError
from flashsae.optim import default_lr
from flashsae.precision import Precision


@pytest.mark.parametrize(("d_in", "d_sae"), [(384, 4096), (768, 8192), (512, 4096), (4096, 32768), (1, 8)])
def test_what_is_not_given_is_worked_out(d_in: int, d_sae: int) -> None:
    config = TrainConfig(k=1, tokens=1_000_000, batch_tokens=1000).resolve(d_in)
    assert config.d_in == d_in
    assert config.d_sae == d_sae
    assert config.lr == default_lr(d_sae)
    assert config.steps == 1000
    assert config.warmup_steps == 50
    assert config.dead_after_tokens == 100_000
    assert config.k_aux == min(1024, max(1, d_in // 2))


def test_what_is_given_is_kept() -> None:
    given = TrainConfig(d_sae=77, k=3, tokens=10, batch_tokens=4, lr=1.0, warmup_steps=0, k_aux=2, dead_after_tokens=5)
    config = given.resolve(8)
    assert (config.d_sae, config.lr, config.warmup_steps, config.k_aux, config.dead_after_tokens) == (77, 1.0, 0, 2, 5)
    assert config.steps == 3


def test_the_help_says_what_each_precision_is() -> None:
    lines = (TrainConfig.__doc__ or "").partition("precision:")[2].partition("moments:")[0]
    words = {word.strip(":,.;") for word in lines.split()}
    assert set(get_args(Precision)) <= words
    assert {word for word in words if word.endswith("-int8")} <= set(get_args(Precision))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("k", 0, "k: expected a positive number, got 0"),
        ("tokens", -5, "tokens: expected a positive number, got -5"),
        ("batch_tokens", 0, "batch_tokens: expected a positive number, got 0"),
        ("lr", 0.0, r"lr: expected a positive number, got 0\.0"),
        ("lr", float("nan"), "lr: expected a positive number, got nan"),
        ("warmup_steps", -1, "warmup_steps: expected a number that is not negative, got -1"),
        ("decay_fraction", 1.5, r"decay_fraction: expected a fraction from 0 to 1, got 1\.5"),
        ("precision", "fp8", "precision: expected one of float32, tf32, bf16, bf16-int8, float32-int8, got 'fp8'"),
        ("moments", "float16", "moments: expected one of float32, bf16, got 'float16'"),
        ("auxk_alpha", -0.1, r"auxk_alpha: expected a number that is not negative, got -0\.1"),
    ],
)
def test_settings_out_of_range_are_named(name: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**{name: value})  # type: ignore[arg-type]


def test_k_above_d_sae_is_refused() -> None:
    with pytest.raises(ConfigError, match="k: expected k <= d_sae = 8, got 9"):
        TrainConfig(k=9).resolve(1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k_aux": 65}, "k_aux: expected k_aux <= d_sae = 64, got 65"),
        ({"batch_tokens": 101}, "batch_tokens: expected batch_tokens <= tokens = 100, got 101"),
        ({"warmup_steps": 11}, "warmup_steps: expected warmup_steps <= the steps of this training = 10, got 11"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**{"d_sae": 64, "k": 4, "tokens": 100, "batch_tokens": 10, **settings}).resolve(8)  # type: ignore[arg-type]


def test_settings_that_only_look_odd_are_taken() -> None:
    config = TrainConfig(
        d_sae=64, k=64, tokens=100, batch_tokens=100, warmup_steps=1, decay_fraction=1.0, k_aux=64,
        dead_after_tokens=10**9, checkpoint_every_steps=10**9, log_every_steps=10**9,
    ).resolve(8)  # fmt: skip
    assert config.steps == 1
    assert TrainConfig(d_sae=3, k=1).resolve(100).k_aux == 3


def test_numbers_of_numpy_are_numbers_and_what_is_none_is_refused() -> None:
    config = TrainConfig(k=np.int64(3), lr=np.float32(0.5), tokens=np.uint8(200), decay_fraction=np.float64(0.25))  # type: ignore[arg-type]
    assert [type(value) for value in (config.arch.k, config.lr, config.tokens, config.decay_fraction)] == [
        int, float, int, float,
    ]  # fmt: skip
    for name in ("lr", "clip_norm", "auxk_alpha", "decay_fraction", "k", "tokens", "seed"):
        for value in (float("nan"), True, np.bool_(1), "3", np.float64("nan"), torch.ones(2), [1]):
            with pytest.raises(ConfigError, match=f"{name}: expected "):
                TrainConfig(**{name: value})  # type: ignore[arg-type]
    for name in ("precision", "moments"):
        for value in (3, None, True, "float16", ["bf16"], torch.bfloat16):
            with pytest.raises(ConfigError, match=f"{name}: expected one of "):
                TrainConfig(**{name: value})  # type: ignore[arg-type]


def test_the_width_that_is_asked_for_is_that_of_the_activations() -> None:
    assert TrainConfig(d_in=8).resolve(8) == TrainConfig().resolve(8)
    with pytest.raises(ConfigError, match="d_in: expected 16, the width of the activations, got 8"):
        TrainConfig(d_in=8).resolve(16)


def test_settings_that_are_worked_out_stay_as_they_are() -> None:
    config = TrainConfig(d_sae=64).resolve(8)
    assert config.resolve(8) == config
    assert TrainConfig(**config.flat()) == config


def test_the_settings_of_the_architecture_stand_in_it_or_beside_the_others() -> None:
    config = TrainConfig(arch=BatchTopKSettings(k=5))
    assert TrainConfig(arch="batch_topk", k=5) == config != TrainConfig(k=5)
    assert TrainConfig(arch="batch_topk") == TrainConfig(arch=BatchTopKSettings())
    assert TrainConfig().arch == TopKSettings()
    assert replace(config, tokens=100).arch == BatchTopKSettings(k=5)
    assert {name: config.flat()[name] for name in ("arch", "k")} == {"arch": "batch_topk", "k": 5}
    assert hash(config) == hash(TrainConfig(arch="batch_topk", k=5))


@dataclass(frozen=True)
class Greedy:
    tokens: int = 3


@dataclass(frozen=True)
class Slow:
    k: int = 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"arch": "topk", "width": 5}, "width: topk has no such setting; it has k"),
        ({"bach_tokens": 5}, "bach_tokens: topk has no such setting"),
        ({"arch": "topj"}, "arch: expected one of .*batch_topk, .*topk.*, got 'topj'"),
        ({"arch": 3}, "arch: expected settings of an architecture, such as .*, got 3"),
        ({"arch": Greedy()}, "arch: expected settings of an architecture"),
        ({"arch": BatchTopKSettings(), "k": 3}, "k: expected it in arch=BatchTopKSettings"),
    ],
)
def test_an_architecture_or_setting_that_there_is_not_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**settings)


def test_an_architecture_has_defaults_of_its_own_for_what_is_left_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(description, "_REGISTERED", dict(description._REGISTERED))
    defaults = {
        "lr": lambda config: 1e-3 / config.d_sae, "betas": (0.0, 0.9), "eps": 1e-8, "warmup_steps": 3, "k_aux": 7,
        "warmup": "cosine", "warmup_start": 0.1, "decay_fraction": 0.0, "auxk_alpha": 0.0, "dead_after_tokens": 9,
    }  # fmt: skip
    topk = description.architecture_named("topk")
    description.register(replace(topk, name="slow", settings=Slow, defaults=defaults))
    config = TrainConfig(32, arch="slow", tokens=100, batch_tokens=10).resolve(8)
    for name, default in defaults.items():
        assert getattr(config, name) == (1e-3 / 32 if name == "lr" else default), name
    given = {"lr": 0.5, "betas": (0.1, 0.2), "decay_fraction": 0.3, "auxk_alpha": 0.4, "warmup": "linear"}
    own = TrainConfig(32, arch="slow", tokens=100, batch_tokens=10, **given).resolve(8)
    assert {name: getattr(own, name) for name in given} == given
    plain = TrainConfig(32, tokens=100, batch_tokens=10).resolve(8)
    assert (plain.betas, plain.eps, plain.decay_fraction) == ((0.9, 0.999), 6.25e-10, 0.2)
    assert (plain.auxk_alpha, plain.warmup, plain.warmup_start) == (1 / 32, "linear", 0.0)
    description.register(replace(topk, name="slow", settings=Slow, defaults={"seed": 3}))
    with pytest.raises(ConfigError, match="seed: expected defaults of settings that may be left open, and this is"):
        TrainConfig(32, arch="slow").resolve(8)


def test_a_weight_that_is_left_open_is_filled_in_before_it_is_used() -> None:
    (auxk,) = [term for term in description.architecture_named("topk").terms if term.name == "auxk_loss"]
    with pytest.raises(ConfigError, match=r"auxk_alpha: it is left open here; config\.resolve\(d_in\) gives"):
        auxk.weight_in(TopKSettings(), TrainConfig())
    assert auxk.weight_in(TopKSettings(), TrainConfig().resolve(8)) == 1 / 32


def test_an_architecture_has_settings_of_other_names_than_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(description, "_REGISTERED", dict(description._REGISTERED))
    description.register(replace(description.architecture_named("topk"), name="greedy", settings=Greedy))
    with pytest.raises(ConfigError, match="tokens: expected settings of greedy to have names of their own"):
        TrainConfig(arch=Greedy())
