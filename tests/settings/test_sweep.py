"""Which SAEs settings with several values make, and what each is called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flashsae import TrainConfig
from flashsae.errors import CheckpointError, ConfigError
from flashsae.settings import ActivationsConfig, RunConfig
from flashsae.settings.sweep import Several, common, grid, names_of


def test_every_combination_makes_an_sae() -> None:
    found = grid({"d_sae": 64}, {"k": [2, 4], "lr": [1e-3, 1e-4]})
    assert [(each["k"], each["lr"], each["d_sae"]) for each in found] == [
        (2, 1e-3, 64), (2, 1e-4, 64), (4, 1e-3, 64), (4, 1e-4, 64),
    ]  # fmt: skip


def test_settings_that_an_architecture_has_not_are_those_of_others() -> None:
    found = grid({"target_l0": 9.0}, {"arch": ["topk", "jump_relu"], "k": [2, 4]})
    assert found == [{"arch": "topk", "k": 2}, {"arch": "topk", "k": 4}, {"arch": "jump_relu", "target_l0": 9.0}]


def test_tables_stand_before_what_is_above_them_and_may_have_lists() -> None:
    saes = [{"arch": "topk", "k": Several([2, 4])}, {"arch": "jump_relu", "target_l0": 3.0, "d_sae": 32}]
    found = grid({"d_sae": 64}, {"seed": [0, 1]}, saes)
    assert [(e["arch"], e.get("k"), e["d_sae"], e["seed"]) for e in found] == [
        ("topk", 2, 64, 0), ("topk", 4, 64, 0), ("topk", 2, 64, 1), ("topk", 4, 64, 1),
        ("jump_relu", None, 32, 0), ("jump_relu", None, 32, 1),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("base", "lists", "saes", "message"),
    [
        ({}, {"k": [2, 2]}, [], r"^k: expected different values, got 2 twice\."),
        ({}, {"k": []}, [], r"^k: expected one value or several, got an empty list\."),
        ({"k": 2}, {}, [{"seed": 1}, {"seed": 1}], r"^sae: expected SAEs that differ, got two with k 2, seed 1\."),
        ({"kk": 2}, {"k": [1, 2]}, [], r"^kk: topk has no such setting; .* Did you mean k\?"),
        ({"target_l0": 2}, {"k": [1, 2]}, [], r"^target_l0: topk has no such setting; .* arch=\"jump_relu\" has\."),
    ],
)
def test_what_makes_no_different_saes_is_told(
    base: dict[str, Any], lists: dict[str, Any], saes: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        grid(base, lists, saes)


def _names(*configs: TrainConfig, places: tuple[str, ...] = ()) -> list[str]:
    return names_of(list(zip(places or ("h",) * len(configs), configs, strict=True)))


def test_names_tell_what_differs() -> None:
    assert _names(TrainConfig(k=16), TrainConfig(k=32)) == ["k16", "k32"]
    assert _names(TrainConfig(k=16), TrainConfig(arch="jump_relu", target_l0=3), TrainConfig(k=8)) == [
        "topk-k16", "jump_relu", "topk-k8",
    ]  # fmt: skip
    two = [TrainConfig(arch="jump_relu", target_l0=n) for n in (3, 4)]
    assert _names(*two) == ["target_l0=3", "target_l0=4"]
    assert _names(TrainConfig(k=2), TrainConfig(k=2), places=("layers.6", "layers.7@in")) == ["layers.6", "layers.7@in"]
    assert _names(TrainConfig(betas=(0.0, 0.9)), TrainConfig(betas=(0.5, 0.9))) == ["betas0,0.9", "betas0.5,0.9"]
    assert _names(TrainConfig(init_from=Path("/a/b c")), TrainConfig(init_from=Path("/a/d"))) == [
        "init_fromb_c", "init_fromd",
    ]  # fmt: skip
    assert _names(TrainConfig(128), TrainConfig(), TrainConfig(256)) == ["d_sae128", "sae", "d_sae256"]


def test_names_are_unique_and_fit_for_folders() -> None:
    same = [TrainConfig(init_from=Path(f"/{n}/run")) for n in range(3)]
    assert _names(*same) == ["init_fromrun", "init_fromrun-2", "init_fromrun-3"]
    long = [TrainConfig(arch="matryoshka", prefixes=tuple(range(1, n))) for n in (90, 91)]
    names = _names(*long)
    assert len(set(names)) == 2
    assert all(len(name) <= 120 for name in names)


def test_what_all_share_stands_above_and_the_rest_in_tables() -> None:
    shared, saes = common(grid({"d_sae": 64, "seed": 3}, {"arch": ["topk", "batch_topk"], "lr": [1e-3, 1e-4]}))
    assert shared == {"d_sae": 64, "seed": 3}
    assert saes[0] == {"arch": "topk", "lr": 1e-3}


CONFIG = RunConfig(
    ActivationsConfig(hookpoint="h.{1,2}"),
    TrainConfig(d_sae=64, tokens=4096),
    (),
    False,
    ({"k": 3, "betas": [0.5, 0.9]}, {"arch": "jump_relu", "target_l0": 2.0, "hookpoint": "h.3"}),
    2,
)


def test_settings_of_several_saes_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(CONFIG.to_toml())
    assert RunConfig.from_toml(path) == CONFIG
    topk, jump_relu = CONFIG.members()
    assert (topk.train.arch.k, topk.train.betas, topk.train.d_sae) == (3, (0.5, 0.9), 64)
    assert (jump_relu.train.arch.target_l0, jump_relu.activations.hookpoint) == (2.0, "h.3")
    assert topk.sae == ()
    assert topk.at_once is None
    assert "sae" not in RunConfig().to_toml().replace("d_sae", "")


@pytest.mark.parametrize(
    ("sae", "message"),
    [
        (
            [{"device": "cpu"}, {}],
            r"^device: expected one value for all SAEs .*, got one in \[\[sae\]\] number 1\.",
        ),
        ([3], r"^sae: expected tables of settings, got int as number 1\."),
        ([{"k": 0}], "^k: expected a positive number, got 0"),
        ([{"nothing": 0}], "^nothing: topk, .* has no such setting"),
        ([{"k": 2}, {"k": 2.0}], r"^sae: expected SAEs that differ, got number 2 with the settings of number 1\."),
        ([{"hookpoint": 3}], "^hookpoint: expected a string, got 3"),
    ],
)
def test_tables_that_make_no_saes_are_refused_in_python_and_in_a_file(
    sae: list[Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig(sae=tuple(sae))
    path = tmp_path / "config.toml"
    import tomli_w

    path.write_text(RunConfig().to_toml().partition("\n")[2] + tomli_w.dumps({"sae": sae}))
    with pytest.raises(CheckpointError, match="cannot read the settings of the run"):
        RunConfig.from_toml(path)
