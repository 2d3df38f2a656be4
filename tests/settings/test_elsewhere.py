from __future__ import annotations

import pytest

import flashsae
from flashsae.architecture import architecture_named, architecture_names
from flashsae.cli import commands
from flashsae.cli.options import declared_by
from flashsae.errors import ConfigError
from flashsae.settings.elsewhere import _ELSEWHERE, near_setting, our_name
from flashsae.settings.kinds import declared_types
from flashsae.settings.training import TrainConfig

OURS = {
    *declared_by(commands.train),
    *declared_by(commands.cache),
    *declared_types(TrainConfig),
    *(name for arch in architecture_names() for name in declared_types(architecture_named(arch).settings)),
}


def test_all_that_is_asked_for_is_a_setting() -> None:
    assert set(_ELSEWHERE) <= OURS


def test_no_name_of_others_is_a_setting_of_the_same_command() -> None:
    of_training = {*declared_by(commands.train), *declared_types(TrainConfig)}
    assert {name for names in _ELSEWHERE.values() for name in names} & of_training == set()


def test_what_there_is_goes_before_what_there_is_not() -> None:
    assert our_name("batch_size") == "batch_tokens"
    assert our_name("batch_size", ["lr", "forward_tokens"]) == "forward_tokens"
    assert our_name("k") == "k"
    assert near_setting("dict_size", ["d_sae"]) == " Did you mean d_sae?"
    assert near_setting("dict_size", ["k"]) == ""
    assert near_setting("batch_token", ["batch_tokens"]) == " Did you mean batch_tokens?"


@pytest.mark.parametrize(
    ("name", "hint"),
    [("learning_rate", "Did you mean lr?"), ("l1_coefficient", 'arch="gated" has l1.'), ("foo", "k_anneal_fraction.")],
)
def test_a_call_that_uses_their_names_is_told_ours(name: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        flashsae.TrainConfig(**{name: 1})
    assert str(caught.value).startswith(f"{name}: topk has no such setting; it has k,")
    assert str(caught.value).endswith(hint)
