from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

import flashsae
from flashsae import SAE, Architecture, BatchTopKSettings, Parameter, SAEConfig, TopKSettings
from flashsae.architecture import AUTOENCODER, RECONSTRUCTION, architecture_named, architecture_of, settings_of
from flashsae.architecture import description as architectures
from flashsae.errors import ConfigError, DtypeError
from flashsae.sae import Step

SRC = Path(flashsae.__file__).parent


@dataclass(frozen=True)
class OneSettings:
    """Settings of an architecture that keeps one latent."""

    slope: float = 0.1


ONE = Architecture(
    name="one",
    title="One",
    settings=OneSettings,
    parameters=AUTOENCODER,
    encode=lambda sae, x: flashsae.ops.encode_topk(x, sae.W_enc_T, sae.b_enc, 1, b_dec=sae.b_dec),
    terms=(RECONSTRUCTION,),
    l0=lambda settings: 1,
)


@pytest.fixture
def one() -> Iterator[Architecture]:
    yield flashsae.register(ONE)
    architectures._REGISTERED.pop("one")


def test_an_architecture_is_found_by_name_and_by_its_settings(one: Architecture) -> None:
    assert {"topk", "batch_topk", "one"} <= set(architectures.architecture_names())
    assert architecture_named("topk") is architecture_of(TopKSettings())
    assert architecture_named("one") is architecture_of(OneSettings()) is one
    sae = SAE(SAEConfig(4, 9, arch=OneSettings()))
    assert repr(sae).startswith("SAE(One, d_in=4, d_sae=9, slope=0.1,")
    assert (sae(torch.randn(5, 4)).shape, sae.encode(torch.randn(5, 4)).acts.shape) == ((5, 4), (5, 1))


def test_a_copy_and_a_pickle_of_an_sae_have_the_architecture_itself() -> None:
    sae = SAE(SAEConfig(6, 20, arch=BatchTopKSettings(k=3)))
    for twin in (copy.deepcopy(sae), pickle.loads(pickle.dumps(sae))):
        assert twin.architecture is sae.architecture is architecture_named("batch_topk")
        assert all(torch.equal(tensor, twin.state_dict()[name]) for name, tensor in sae.state_dict().items())


def test_a_copy_is_itself_whatever_has_its_name_by_now(one: Architecture) -> None:
    sae = SAE(SAEConfig(4, 9, arch=OneSettings()))
    flashsae.register(replace(ONE, title="One again"))
    assert copy.deepcopy(sae).architecture is one


def test_what_is_no_architecture_is_one_sentence() -> None:
    with pytest.raises(
        ConfigError, match=r"arch: expected one of .*topk.*, got 'top-k'\. Did you mean topk\? One of your own"
    ):
        architecture_named("top-k")
    with pytest.raises(ConfigError, match="arch: expected settings of an architecture, such as TopKSettings"):
        SAEConfig(3, 5, arch=OneSettings())
    for other in (TopKSettings, architecture_named("topk")):
        with pytest.raises(ConfigError, match=r"arch: expected settings .* Give an instance of its settings"):
            SAEConfig(3, 5, arch=other)
    with pytest.raises(ConfigError, match="arch: expected either k, which makes a TopK SAE"):
        SAEConfig(3, 5)
    with pytest.raises(ConfigError, match="arch: expected either k, which makes a TopK SAE"):
        SAEConfig(3, 5, 2, arch=TopKSettings(2))
    with pytest.raises(ConfigError, match="slope: topk has no such setting; it has k"):
        settings_of("topk", slope=1.0)
    with pytest.raises(ConfigError, match=r"k: expected it in arch=TopKSettings\(...\), not beside it"):
        settings_of(TopKSettings(), k=3)
    with pytest.raises(ConfigError, match="d_out: TopK reconstructs what it reads: leave it out"):
        SAEConfig(3, 5, 2, d_out=4)
    with pytest.raises(ConfigError, match="k: expected k <= d_sae = 5, got 6"):
        SAEConfig(3, 5, arch=BatchTopKSettings(6))


def test_names_settings_and_parameters_are_taken_once(one: Architecture) -> None:
    assert flashsae.register(replace(ONE)) == ONE  # once more, as a module that is loaded again does
    with pytest.raises(ConfigError, match="two: expected a name and settings of its own, but One has these settings"):
        flashsae.register(replace(ONE, name="two"))
    with pytest.raises(ConfigError, match="one: expected a name and settings of its own, but One has this name"):
        flashsae.register(replace(ONE, settings=type("Other", (OneSettings,), {})))
    with pytest.raises(ConfigError, match="topk: expected a name and settings of its own, but TopK has this name"):
        flashsae.register(replace(ONE, name="topk"))
    with pytest.raises(ConfigError, match="settings of three: expected a frozen dataclass"):
        flashsae.register(replace(ONE, name="three", settings=dict))
    bare = dataclass(frozen=True)(type("Bare", (), {"__annotations__": {"slope": float}}))
    with pytest.raises(ConfigError, match="settings of bare: expected a default for each, but slope has none"):
        flashsae.register(replace(ONE, name="bare", settings=bare))
    twice = (*AUTOENCODER, Parameter("b_enc", ("d_in",), "another"))
    with pytest.raises(ConfigError, match="parameters of four: expected each name once, got b_enc again"):
        flashsae.register(
            replace(ONE, name="four", parameters=twice, settings=dataclass(frozen=True)(type("S", (), {})))
        )


def test_a_weight_that_nobody_sets_and_an_encode_that_gives_no_code_are_named(one: Architecture) -> None:
    sae, x = SAE(SAEConfig(6, 20, 3)), torch.ones(2, 6)
    step = Step(sae, x, x, sae.encode(x), torch.ones(2))
    with pytest.raises(
        ConfigError, match="weight of auxk_loss: expected a setting 'auxk_alpha' of the architecture or"
    ):
        step.total()
    sae.architecture = replace(one, encode=lambda sae, x: x)
    with pytest.raises(
        DtypeError, match=r"encode of One: expected a SparseCode, as ops\.encode_topk returns it, got Tensor"
    ):
        sae(x)


def test_settings_are_known_without_torch() -> None:
    code = (
        "import sys; from flashsae import architecture as a; [a.architecture_named(n) for n in a.architecture_names()]"
    )
    done = subprocess.run([sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"], check=False)
    assert done.returncode == 0


def test_the_table_says_what_a_parameter_is() -> None:
    sae = SAE(SAEConfig(6, 20, arch=BatchTopKSettings(3)))
    shapes = {name: tuple(tensor.shape) for name, tensor in sae.state_dict().items()}
    assert shapes == {row.name: row.sizes(sae.config.sizes) for row in sae.architecture.parameters}
    trained = {row.name for row in sae.architecture.parameters if row.trained}
    assert trained == {name for name, _ in sae.named_parameters()} == {"W_enc_T", "b_enc", "W_dec", "b_dec"}
    assert [row.name for row in sae.architecture.parameters if row.per_latent] == ["W_enc_T", "b_enc", "W_dec"]
    rescaled = sae.rescaled(4.0)
    for row in sae.architecture.parameters:
        assert torch.equal(getattr(rescaled, row.name), getattr(sae, row.name) / 4.0**row.power)


LEARNS_NO_NAME = ("train", "optim", "evaluate", "report", "logs", "run", "cli/program.py", "cli/commands.py")


@pytest.mark.parametrize("place", LEARNS_NO_NAME)
def test_nothing_around_an_architecture_names_one(place: str) -> None:
    files = sorted((SRC / place).rglob("*.py")) if (SRC / place).is_dir() else [SRC / place]
    assert files
    words = re.compile("|".join(["top_?k", *map(re.escape, architectures.architecture_names())]), re.IGNORECASE)
    found = [
        f"{path.name}: {line.strip()}" for path in files for line in path.read_text().splitlines() if words.search(line)
    ]
    assert not found


def test_settings_of_our_architectures_have_a_short_name() -> None:
    for name in architectures.architecture_names(installed=False):
        settings = architecture_named(name).settings
        assert getattr(flashsae, settings.__name__) is settings
        assert settings.__name__ in dir(flashsae)
    with pytest.raises(AttributeError, match="module 'flashsae' has no attribute 'NoSettings'"):
        flashsae.NoSettings  # noqa: B018
