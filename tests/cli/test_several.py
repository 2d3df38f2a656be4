"""Several values on the command line and in a file: what they make, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flashsae.cli import main
from flashsae.cli.several import kinds_of, read_sweep, several_in, values_of
from flashsae.errors import ConfigError
from flashsae.run import start
from flashsae.settings import ActivationsConfig, TrainConfig
from flashsae.settings.run import RunConfig

KINDS = kinds_of(["topk", "jump_relu"])


@pytest.mark.parametrize(
    ("words", "rest", "lists"),
    [
        ("train --k 16 32 64 gpt2", "train gpt2", {"k": (16, 32, 64)}),
        ("train gpt2 --k 16,32", "train gpt2", {"k": (16, 32)}),
        ("train --k 16 --seed 3 --k=32", "train --seed 3", {"k": (16, 32)}),
        ("train --arch topk batch_topk text.txt", "train text.txt", {"arch": ("topk", "batch_topk")}),
        ("train --arch topk,transcoder:gated", "train", {"arch": ("topk", "transcoder:gated")}),
        ("train --precision bf16 tf32 --lr 1e-3 2e-3", "train", {"precision": ("bf16", "tf32"), "lr": (1e-3, 2e-3)}),
        ("train --d-sae 1e3 2_000", "train", {"d_sae": (1000, 2000)}),
        ("train --k 16 gpt2 --betas 0.9 0.99", "train --k 16 gpt2 --betas 0.9 0.99", {}),
        ("train --k 16 -- --k 32", "train --k 16 -- --k 32", {}),
        ("train --hookpoint h.1 --hookpoint h.2 --k", "train --hookpoint h.1 --hookpoint h.2 --k", {}),
    ],
)
def test_options_with_several_values_are_taken_out(words: str, rest: str, lists: dict[str, Any]) -> None:
    assert several_in(words.split(), KINDS) == (rest.split(), lists)


def test_a_value_that_a_setting_may_not_have_is_told() -> None:
    with pytest.raises(ConfigError, match=r"^k: expected a whole number .* got 'nonsense'"):
        several_in(["train", "--k", "nonsense", "3"], KINDS)
    with pytest.raises(ConfigError, match=r"^k: expected a positive number, got 0\."):
        several_in(["train", "--k", "16", "0"], KINDS)
    assert values_of(["train", "--arch=topk", "--arch", "gated", "relu", "x"], "arch") == ["topk", "gated", "relu"]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[RunConfig]:
    """Take the settings of a run instead of doing it."""
    seen: list[RunConfig] = []

    def take(config: RunConfig) -> None:
        seen.append(config)
        raise SystemExit(0)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(start, "check", take)
    return seen


def _main(words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    return int(ended.value.code or 0)


def _told(config: RunConfig) -> list[tuple[Any, ...]]:
    members = [member.train for member in config.members()]
    return [(m.flat()["arch"], m.flat().get("k"), m.flat().get("target_l0"), m.d_sae, m.seed) for m in members]


def test_lists_on_the_command_line_make_a_grid(made: list[RunConfig]) -> None:
    assert _main("train --arch topk jump_relu --k 2 4 --target-l0 3 --d-sae 64 --seed 7 --at-once 2") == 0
    assert _told(made[0]) == [
        ("topk", 2, None, 64, 7), ("topk", 4, None, 64, 7), ("jump_relu", None, 3.0, 64, 7),
    ]  # fmt: skip
    assert made[0].at_once == 2
    assert made[0].train.d_sae == 64


def test_a_file_makes_the_same_and_the_command_line_goes_before_it(made: list[RunConfig]) -> None:
    Path("sweep.toml").write_text(
        'model = "gpt2"\nhookpoint = ["h.1", "h.2:in"]\nd-sae = 64\nseed = 7\nbetas = [0.5, 0.9]\n'
        '[[sae]]\narch = "topk"\nk = [2, 4]\n[[sae]]\narch = "jump_relu"\ntarget_l0 = 3\nd_sae = 32\n'
    )
    assert _main("train --sweep sweep.toml") == 0
    assert _told(made[0])[::2] == [("topk", 2, None, 64, 7), ("topk", 2, None, 64, 7), ("jump_relu", None, 3.0, 32, 7)]
    assert [m.activations.hookpoint for m in made[0].members()] == ["h.1", "h.1", "h.2:in", "h.2:in", "h.1", "h.2:in"]
    assert made[0].activations.model == "gpt2"
    assert made[0].train.betas == (0.5, 0.9)
    Path("two.toml").write_text(
        "k = [2, 4]\nd_sae = 64\nreport = false\nexclude_ids = [1, 2]\n[model_kwargs]\nattention = 'eager'\n"
    )
    assert _main("train --sweep two.toml --k 8 --lr 1e-3 1e-4 --d-sae 16") == 0
    assert _told(made[1]) == [("topk", 8, None, 16, 0)] * 2
    assert made[1].report is False
    assert made[1].activations.exclude_ids == (1, 2)
    assert "attention" in str(made[1].activations.model_kwargs)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "",
            "expected a setting with several values, such as k = [16, 32], or tables [[sae]], got settings of one SAE.",
        ),
        ("k = 3", "expected a setting with several values"),
        ("k = []", "k: expected one value or several, got an empty list."),
        ("sae = []", "sae: expected at least one table [[sae]], got an empty list."),
        ("sae = 3", "sae: expected tables [[sae]], each with settings of an SAE."),
        ("k = [2, 2]", "k: expected different values, got 2 twice."),
        ("[[sae]]\nk = 2\n[[sae]]\nk = 2", "sae: expected SAEs that differ, got two with k 2."),
        ("kk = [2, 3]\nk = [1, 2]", "there is no setting 'kk' of flashsae train. Did you mean k?"),
        ("k = [2, 3]\nnothing = 1", "there is no setting 'nothing' of flashsae train."),
        ("[[sae]]\nkk = 2\n[[sae]]\nk = 3", "kk: topk has no such setting"),
        (
            'model = ["gpt2", "minilm"]\nk = [1, 2]',
            "model: expected one value, since all SAEs of a run",
        ),
        ('dataset = ["a", "b"]\nk = [1, 2]', "dataset: expected one value, since all SAEs of a run"),
        ('dataset = ["a", "b"]\nk = [1, 2]', 'got 2. A mixture has weights: ["A@0.7", "B@0.3"].'),
        ("[[saes]]\nk = [1, 2]", "expected tables [[sae]], got tables [[saes]]."),
        (
            'device = ["cpu", "cuda"]\nk = [1, 2]',
            "device: expected one value, since all SAEs of a run",
        ),
        ('[[sae]]\nmodel = "gpt2"', "model: expected it above the tables [[sae]], since all SAEs of a run share it."),
        ("[training]\nk = 2", "expected settings and tables [[sae]], got the section [training]."),
        ("k = [2, 3.5]", "k: expected a whole number below 2**63"),
        ("k = [2, 3", "cannot read"),
        ('arch = ["topk", "nonsense"]', "arch: expected one of"),
        ("[[sae]]\nk = -1", "k: expected a positive number, got -1."),
    ],
)
def test_a_sweep_that_makes_no_saes_is_one_sentence(
    content: str, message: str, made: list[RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("sweep.toml").write_text(content)
    assert _main("train --sweep sweep.toml") == 1
    told = capsys.readouterr().err
    assert message in told
    assert "sweep.toml" in told
    assert told.count("\n") == 1
    assert not made


def test_a_file_may_name_a_mixture(made: list[RunConfig]) -> None:
    Path("sweep.toml").write_text('dataset = ["a.txt@0.7", "b.txt@0.3"]\nk = [1, 2]')
    assert _main("train --sweep sweep.toml") == 0
    assert made[0].activations.dataset == "a.txt@0.7, b.txt@0.3"


@pytest.mark.parametrize("words", ["--k 8", "--k 8 16", "--arch topk", "--hookpoint h.2", "--seed 3"])
def test_an_option_that_every_table_goes_before_is_refused(
    words: str, made: list[RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("sweep.toml").write_text(
        "seed = 4\n[[sae]]\narch = 'topk'\nk = [2, 4]\nhookpoint = 'h.0'\nseed = 1\n"
        "[[sae]]\narch = 'jump_relu'\ntarget_l0 = 2\nhookpoint = 'h.1'\nseed = 2\n"
    )
    assert _main(f"train --sweep sweep.toml {words}") == 1
    name = words.split()[0].removeprefix("--")
    told = f"flashsae: sweep.toml: {name}: expected no such option, since each table [[sae]] that could take it has its"
    assert capsys.readouterr().err.startswith(told)
    assert _main("train --sweep sweep.toml --lr 1e-3 --d-sae 64 128") == 0
    assert len(made[0].members()) == 6


def test_what_a_sweep_cannot_stand_beside_is_told(made: list[RunConfig], capsys: pytest.CaptureFixture[str]) -> None:
    Path("sweep.toml").write_text("k = [1, 2]")
    Path("my.toml").write_text("lr = 1e-3")
    Path("saes.toml").write_text("[[sae]]\nk = 1\n[[sae]]\nk = 2")
    for words, message in (
        ("train --sweep sweep.toml --config my.toml", "sweep: expected no --config beside it"),
        ("train --sweep nowhere.toml", "sweep: cannot read nowhere.toml: No such file or directory."),
        (
            "train --config saes.toml",
            "config: expected the settings of one SAE in saes.toml, got tables",
        ),
        ("train --extend 5", "extend: expected --resume RUN beside it, a run that has ended."),
        ("train --resume runs/x --k 2 4", "resume: expected no other setting beside it, got k"),
        ("train --resume runs/x --sweep sweep.toml", "resume: expected no other setting beside it, got"),
    ):
        assert _main(words) == 1, words
        assert message in capsys.readouterr().err, words
    with pytest.raises(ConfigError, match="expected a path"):
        read_sweep("")


def test_the_settings_that_a_run_wrote_make_the_same_run_again(made: list[RunConfig]) -> None:
    tables: tuple[dict[str, Any], ...] = (
        {"arch": "topk", "k": 3, "betas": [0.5, 0.9]},
        {"arch": "jump_relu", "target_l0": 2.0, "hookpoint": "h.3"},
    )
    reading, train = ActivationsConfig(hookpoint="h.{1,2}"), TrainConfig(d_sae=64, tokens=4096, extended=(2048,))
    config = RunConfig(reading, train, ("tensorboard",), False, tables, 2)
    Path("config.toml").write_text(config.to_toml())
    assert _main("train --sweep config.toml") == 0
    assert made[0].members() == config.members()
    assert made[0].at_once == 2
