"""Settings by keyword, as `flashsae.fit` takes them."""

from __future__ import annotations

import inspect
from typing import Any, get_args, get_origin, get_type_hints

import pytest

import flashsae
from flashsae import BatchTopKSettings, TopKSettings, TrainConfig
from flashsae.errors import ConfigError
from flashsae.settings.keywords import TrainSettings, settings_by_keyword
from flashsae.settings.kinds import Length, declared_types, unwrap

DECLARED = declared_types(TrainConfig) | declared_types(type(TrainConfig().arch))


def test_what_editors_show_is_what_there_is() -> None:
    shown = get_type_hints(TrainSettings)
    assert shown.keys() == DECLARED.keys()
    for name, annotation in DECLARED.items():
        kind, limits, _ = unwrap(annotation)
        lengths = [limit.numbers for limit in limits if isinstance(limit, Length)]
        element = unwrap(get_args(kind)[0])[0] if get_origin(kind) is tuple else None
        plain = tuple[(element,) * lengths[0] if lengths else (element, ...)] if element else kind  # type: ignore[misc]
        is_any = kind is Any or name == "init_from"  # which may be an SAE, too
        assert shown[name] == (Any if is_any else plain | None), name
    parameters = inspect.signature(flashsae.fit).parameters
    assert set(parameters) == {*DECLARED, "x", "config", "run", "resume", "progress", "settings"}
    assert parameters["lr"].annotation == "float | None"


def test_keywords_go_before_config_and_none_is_not_given() -> None:
    config = TrainConfig(64, lr=0.5, seed=3, clip_norm=1.0, k=5)
    meant = settings_by_keyword({"lr": 0.25, "seed": None, "clip_norm": None, "k": 6, "d_sae": 32}, config)
    assert meant == TrainConfig(32, lr=0.25, seed=3, clip_norm=1.0, k=6)
    assert settings_by_keyword({}, None) == TrainConfig()
    assert settings_by_keyword({"k": None, "arch": None}, config) == config
    assert settings_by_keyword({"betas": [0.5, 0.9]}, None).betas == (0.5, 0.9)


@pytest.mark.parametrize(
    ("given", "config", "expected"),
    [
        ({"arch": "batch_topk"}, {"k": 5}, BatchTopKSettings(k=5)),
        ({"arch": "batch_topk", "k": 6}, {"k": 5}, BatchTopKSettings(k=6)),
        ({"arch": "batch_topk", "k": 6}, {}, BatchTopKSettings(k=6)),
        ({"arch": BatchTopKSettings(k=7)}, {"k": 5}, BatchTopKSettings(k=7)),
        ({"k": 6}, {"arch": "batch_topk", "k": 5}, BatchTopKSettings(k=6)),
        ({"arch": "topk"}, {"arch": "batch_topk", "k": 5}, TopKSettings(k=5)),
    ],
)
def test_settings_of_the_architecture_stand_beside_the_others(
    given: dict[str, Any], config: dict[str, Any], expected: object
) -> None:
    assert settings_by_keyword(given, TrainConfig(**config)).arch == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bach_tokens": 5}, r"bach_tokens: topk has no such setting; it has k.*\. Did you mean batch_tokens\?$"),
        ({"reusme": True}, r"reusme: topk has no such setting; .* Did you mean resume\?$"),
        ({"arch": "batch_topk", "kk": 3}, r"kk: batch_topk has no such setting; it has k\. Did you mean k\?$"),
        ({"arch": "relu", "k": 3}, r'k: relu has no such setting; .*\. arch="topk" has\.$'),
        ({"zzzzzz": None}, r"zzzzzz: topk has no such setting; it has k[^.]*\.$"),
        ({"arch": BatchTopKSettings(), "k": 3}, r"k: expected it in arch=BatchTopKSettings\(\.\.\.\), not beside it"),
        ({"arch": "topj"}, "arch: expected one of .*, got 'topj'"),
        ({"arch": 3}, "arch: expected settings of an architecture, .*, got 3"),
        ({"lr": "fast"}, "lr: expected a number, got 'fast'"),
        ({"k": 2.5}, "k: expected a whole number"),
        ({"betas": (0.9, 0.99, 0.999)}, r"betas: expected a list of 2 numbers, got \(0.9, 0.99, 0.999\)"),
    ],
)
def test_what_is_no_setting_is_one_sentence(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings_by_keyword(given, None, beside=("resume",))


def test_a_setting_that_another_architecture_has_is_told_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashsae.settings.training._has", lambda arch, name: arch == "batch_topk")
    with pytest.raises(ConfigError, match=r'zzzzzz: topk has no such setting; .*\. arch="batch_topk" has\.$'):
        settings_by_keyword({"zzzzzz": 3}, None)


def test_config_is_named_where_it_gave_the_architecture() -> None:
    with pytest.raises(
        ConfigError, match=r"kk: batch_topk, the arch of config, has no such setting\. Did you mean k\?"
    ):
        settings_by_keyword({"kk": 3}, TrainConfig(arch="batch_topk"))
