"""Every setting there is arrives from a flag, a file and Python alike, or is refused by name. New ones are covered."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, make_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import tomli_w

from flashsae import TopKSettings, architecture, backend
from flashsae.bench import step as bench_step
from flashsae.cli import caching, commands, converting, main, sharing
from flashsae.errors import ConfigError
from flashsae.formats.registry import format_named
from flashsae.run import execute as runs
from flashsae.run import start
from flashsae.settings import ActivationsConfig, ReadingConfig, RunConfig, TrainConfig
from flashsae.settings.kinds import (
    Joined,
    KeyValues,
    Length,
    PositiveInt,
    check,
    check_fields,
    declared_types,
    metadata_of,
    unwrap,
)

OF_RUN = {n: kind for n, kind in declared_types(RunConfig).items() if n not in ("activations", "train")}
PARTS = {"activations": ActivationsConfig, "train": TrainConfig}
TRAIN = declared_types(ActivationsConfig) | declared_types(TrainConfig) | declared_types(TopKSettings) | OF_RUN
del TRAIN["arch"]  # a name, which decides what other settings there are
del TRAIN["sae"], TRAIN["extended"]  # what only runs write
CACHE = declared_types(ReadingConfig) | {
    name: kind
    for name, kind in get_type_hints(commands.cache, include_extras=True).items()
    if name not in ("reading", "return", "json")  # json stands beside describe: tests/cli/test_caching.py
}
STEP = {
    name: kind for name, kind in get_type_hints(commands.step, include_extras=True).items() if name not in ("return",)
}

Arrived = dict[str, Any]


def other(annotation: Any, default: Any) -> Any:
    """Return a value, as TOML has it, that a setting may have and does not have by default."""
    kind, limits, _ = unwrap(annotation)
    if any(isinstance(limit, KeyValues) for limit in limits):
        return ["name=word"]
    if get_origin(kind) is tuple:
        lengths = [limit.numbers for limit in limits if isinstance(limit, Length)]
        return [other(get_args(kind)[0], None)] * next(iter(lengths), 1)
    if get_origin(kind) is Literal:
        return next(choice for choice in get_args(kind) if choice != default)
    candidates: dict[Any, list[Any]] = {
        bool: [default is not True],
        int: [7],
        float: [0.25, 7.5],
        str: ["word"],
        Path: ["~/there"],
    }
    return next(value for value in candidates[kind] if _may_be(value, annotation))


def _may_be(value: Any, annotation: Any) -> bool:
    try:
        check("", value, annotation)
    except ConfigError:
        return False
    return True


def wrong(annotation: Any) -> Iterator[Any]:
    """Yield values, as TOML has them, of other kinds than the setting's."""
    kind = unwrap(annotation)[0]
    of_any = ["no", 3, 3.7, True, ["x"], [3], [[]], ""]
    may_be: dict[Any, Callable[[Any], bool]] = {
        str: lambda value: isinstance(value, str) and value != "",
        Path: lambda value: isinstance(value, str) and value != "",
    }
    fits = may_be.get(kind, lambda value: _may_be(value, annotation))
    return (value for value in of_any if not fits(value) and not (value == ["x"] and metadata_of(annotation, Joined)))


def words(name: str, value: Any) -> list[str]:
    """Return the words of a command line for a setting."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [word for each in (value if isinstance(value, list) else [value]) for word in (f"--{flag}", str(each))]


@pytest.fixture
def arrived(monkeypatch: pytest.MonkeyPatch) -> Arrived:
    """What the code behind the command line is called with, instead of doing anything."""
    seen: Arrived = {}

    def take(**values: Any) -> None:
        seen.clear()
        seen.update(values)
        raise SystemExit(0)

    def train(config: RunConfig) -> None:
        parts = {f.name: getattr(config, f.name) for f in fields(config)}
        take(**vars(parts.pop("activations")), **parts.pop("train").flat(), **parts)

    def cache(reading: ReadingConfig, out: Path, **others: Any) -> None:
        take(**vars(reading), out=out, **others)

    def step(shape: Any, precision: str, **others: Any) -> None:
        take(**vars(shape), precision=precision, json=others.pop("path"), tiny=others.pop("is_tiny"), **others)

    monkeypatch.setattr(start, "check", train)
    monkeypatch.setattr(caching, "cache_activations", cache)
    monkeypatch.setattr(caching, "merge_caches", lambda places, out, _: take(merge=places, out=out))
    monkeypatch.setattr(caching, "summarise", lambda place: take(describe=place))
    monkeypatch.setattr(bench_step, "bench_step", step)
    for module in (backend, caching):
        monkeypatch.setattr(module, "resolve_device", lambda device: device)
    monkeypatch.setattr(caching, "verify_cache", lambda place: take(verify=place))
    return seen


def _main(*arguments: str) -> int:
    try:
        main(arguments)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


EVERY = [
    *[("train", name) for name in TRAIN],
    *[("cache", name) for name in CACHE],
    *[("bench step", name) for name in STEP],
]
SHARING = [(command.__name__,) for command in sharing.COMMANDS]
DECLARED = {"train": TRAIN, "cache": CACHE, "bench step": STEP}
APART = ("stream", "verify", "describe", "merge")  # what may not stand beside another setting


def _default(name: str) -> Any:
    for settings in (ActivationsConfig(), TrainConfig(), TopKSettings(), RunConfig()):
        if hasattr(settings, name):
            return getattr(settings, name)
    return {"peers": True, "precision": "bf16"}.get(name)


@pytest.mark.parametrize("command", DECLARED)
@pytest.mark.parametrize("alone", ["", *APART])
def test_every_setting_arrives_from_flags_from_a_file_and_from_python(
    command: str, alone: str, arrived: Arrived, tmp_path: Path
) -> None:
    apart = {"": set(APART), **{name: set(DECLARED[command]) - {name} for name in APART}}[alone]
    declared = {name: kind for name, kind in DECLARED[command].items() if name not in apart}
    if not declared:
        return  # a setting of another command
    values = {name: other(annotation, _default(name)) for name, annotation in declared.items()}
    if "context_length" in values:
        values["context_length"] = 70  # more than what is left out of it
    meant = {name: check(name, value, declared[name]) for name, value in values.items()}
    assert not any(value == _default(name) for name, value in meant.items())
    needed = ["--out", "acts"] if alone == "merge" else []

    flags = [word for name, value in values.items() for word in words(name, value)]
    assert _main(*command.split(), *needed, *flags) == 0
    assert arrived.items() >= meant.items()
    arrived.clear()
    file = tmp_path / "my.toml"
    file.write_text(tomli_w.dumps(values))
    assert _main(*command.split(), *needed, "--config", str(file)) == 0
    assert arrived.items() >= meant.items()
    if command == "train":
        assert {name: _in_python(name, value) for name, value in values.items()} == meant


BESIDE: dict[str, dict[str, Any]] = {"pack_apart": {"pack": True}}
"""What a setting needs beside it."""


def _in_python(name: str, value: Any) -> Any:
    for part, settings in PARTS.items():
        if name in declared_types(settings):
            built = RunConfig(**{part: settings(**{name: value, **BESIDE.get(name, {})})})
            return getattr(getattr(built, part), name)
    if name in declared_types(TopKSettings):
        return getattr(RunConfig(train=TrainConfig(**{name: value})).train.arch, name)
    return getattr(RunConfig(**{name: value}), name)


@pytest.mark.parametrize(("command", "name"), EVERY)
def test_every_setting_of_the_wrong_kind_is_refused_by_name_and_file(
    command: str, name: str, arrived: Arrived, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annotation = DECLARED[command][name]
    for value in wrong(annotation):
        with pytest.raises(ConfigError, match=rf"^{name}: expected "):
            _in_python(name, value) if command == "train" else check(name, value, annotation)
    file = tmp_path / "my.toml"
    file.write_text(tomli_w.dumps({name: value}))
    assert _main(*command.split(), "--config", str(file), *(["--out", "a"] if command == "cache" else [])) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"flashsae: {file}: {name}: expected "), told
    assert told.count("\n") == 1
    assert not arrived


ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def _commands(text: str) -> list[str]:
    """Return what a text tells to type: lines of code that begin with flashsae, and code within a line that does."""
    whole = text.replace("\\\n", " ")
    lines = [line.partition("#")[0] for line in re.findall(r"^ *flashsae (.*)$", whole, re.MULTILINE)]
    within = (" ".join(words.split()) for words in re.findall(r"`flashsae ([^`]*)`", whole))
    return [*lines, *(words for words in within if not re.search(r"--config$", words))]


def test_every_command_in_help_and_documents_is_one(
    arrived: Arrived, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    Path("my.toml").write_text("k = 64")
    Path("sweep.toml").write_text("k = [16, 32]")
    monkeypatch.setattr(start, "saved_config", lambda run: RunConfig())
    monkeypatch.setattr(start, "extended", lambda config, run, tokens: config)
    monkeypatch.setattr(runs, "draw_report", lambda run, console: [])
    monkeypatch.setattr(converting, "convert", lambda asked, console: format_named(asked.to))
    monkeypatch.setattr("flashsae.neuronpedia.export", lambda run, out, asked: out)
    monkeypatch.setattr("flashsae.publish.command.push_run", lambda run, asked, console: None)
    found = [command for document in DOCUMENTS for command in _commands(document.read_text("utf-8"))]
    for words in ((), ("train",), ("cache",), ("report",), ("doctor",), *SHARING, ("bench",), ("bench", "step")):
        assert _main(*words, "--help") == 0
        examples = capsys.readouterr().out.partition("Examples:")[2]
        assert _commands(examples), f"flashsae {' '.join(words)} --help shows no example"
        assert all(len(line.strip()) <= 78 for line in examples.splitlines())  # else they are wrapped on most screens
        found += _commands(examples)
    for command in found:
        words = [word for word in shlex.split(command.partition("   ")[0]) if word != "..."]
        assert _main(*words) == 0, f"flashsae {command}: {capsys.readouterr().err}"


def test_a_flag_goes_before_the_file_and_the_files_name_may_have_dashes(arrived: Arrived, tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    file.write_text('k = 5\nd-sae = 96\nreport = false\nlogger = ["wandb"]\n', "utf-8-sig")
    assert _main("train", "--config", str(file), "--k", "6", "--report", "--logger", "tensorboard") == 0
    assert (arrived["k"], arrived["d_sae"]) == (6, 96)
    assert arrived["report"] is True
    assert arrived["logger"] == ("tensorboard",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("kk = 5", "there is no setting 'kk' of flashsae train. Did you mean k?"),
        ("doctor = 5", "there is no setting 'doctor' of flashsae train. flashsae train --help names all"),
        ("cache = true", "there is no setting 'cache' of flashsae train."),
        ("d_sae = 5\nd-sae = 6", "d_sae stands there twice."),
        ("[train]\nk = 5", "got the section [train]. Write each setting on a line of its own"),
        ("k = {a = 3}", "got the section [k]"),
        ("k = = 5", "it is not TOML"),
        ("a = " + 5000 * "[", "it is not TOML"),
    ],
)
def test_a_file_that_is_wrong_is_one_sentence_with_its_name(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "my.toml"
    file.write_text(content)
    assert _main("train", "--config", str(file)) == 1
    told = capsys.readouterr().err
    assert message in told
    assert str(file) in told


def test_a_file_is_read_by_commands_without_settings_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my.toml").write_text("k = 5")
    assert _main("doctor", "--config", str(tmp_path / "my.toml")) == 1
    assert "no setting 'k' of flashsae doctor" in capsys.readouterr().err
    assert _main("doctor", "--config", str(tmp_path)) == 1
    assert "Is a directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--k", "3.7"], "k: expected a whole number below 2**63, such as 1_000_000, got 3.7."),
        (["--tokens", "1000.9"], "tokens: expected a whole number"),
        (["--seed", "9223372036854775808"], "seed: expected a whole number below 2**63"),
        (["--k", "1e400"], "k: expected a whole number"),
        (["--lr", "nan"], "lr: expected a positive number, got nan."),
        (["--lr", "inf"], "lr: expected a positive number, got inf."),
        (["--k", "k"], "Invalid value for --k"),
        (["--model", ""], "model: expected a string, got ''."),
        (["--run", "~nobody-of-this-name/run"], "run: expected a path whose user exists"),
        (["--hookpoints", "h.6"], "Unknown option: --hookpoints. Did you mean --hookpoint?"),
        (["gpt2", "--hookpoints=h.6"], "Did you mean --hookpoint?"),
        (["gpt2", "text", "more"], "nothing takes the words 'more'; see --help. Several texts are a mixture, with we"),
        (["-k", "3"], "Unknown option: -k."),
        (["--resume", "runs/a", "--k", "32"], "resume: expected no other setting beside it, got k;"),
        (["--resume", "runs/a", "--report"], "resume: expected no other setting beside it, got report;"),
    ],
)
def test_words_that_are_wrong_are_one_sentence(
    flags: list[str], message: str, arrived: Arrived, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _main("train", *flags) in (1, 2)
    told = capsys.readouterr().err
    assert told.startswith("flashsae: ")
    assert message in told
    assert told.count("\n") == 1
    assert not arrived


@pytest.mark.parametrize(
    "words",
    [
        ["--betas", "0.8", "0.99", "gpt2"],
        ["--betas", "0.8,0.99", "gpt2"],
        ["--betas=0.8,.99", "gpt2"],
        ["gpt2", "--betas", "8e-1, 0.99"],
        ["gpt2", "--betas", "0.8", "--lr", "0.5", "--betas", "0.99"],
        ["--betas", "[0.8, 0.99]", "gpt2", "--exclude-ids", "5", "7,9"],
    ],
)
def test_lists_of_numbers_are_written_as_one_likes(words: list[str], arrived: Arrived) -> None:
    assert _main("train", *words, "--hookpoint", "h.6") == 0
    assert (arrived["betas"], arrived["model"]) == ((0.8, 0.99), "gpt2")
    assert arrived["exclude_ids"] == ((5, 7, 9) if "--exclude-ids" in words else None)


@pytest.mark.parametrize("betas", [["0.9"], ["0.9", "0.99", "0.999"], ["0.9", "1"], ["-0.1", "0.9"], ["0.9", "nan"]])
def test_betas_are_two_and_below_one(betas: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert _main("train", "--betas", *betas) == 1
    assert "betas: expected a " in capsys.readouterr().err
    with pytest.raises(ConfigError, match="betas: expected a list of "):
        TrainConfig(betas=tuple(map(float, betas)))


def test_the_file_may_lie_in_the_home_folder(
    arrived: Arrived, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my.toml").write_text("k = 5")
    assert _main("train", "--config", "~/my.toml") == 0
    assert arrived["k"] == 5
    assert _main("train", "--config", "~nobody-of-this-name/my.toml") == 1
    assert "expected a path whose user exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        "cache gpt2 x.txt --hookpoint h.0 --out hf://me/x",
        "cache --merge a b --out hf://me/x",
        "cache --describe a --json hf://me/x",
        "train --run hf://me/x",
        "train --activations hf://me/x --plan",
        "train gpt2 x.txt --hookpoint h.0 --activations hf://me/x",
        "train --resume hf://me/x",
        "report hf://me/x",
        "convert a hf://me/x --to saelens",
        "push a --to-folder hf://me/x",
        "neuronpedia a hf://me/x --set mine",
        "bench step --tiny --json hf://me/x",
    ],
)
def test_no_folder_is_called_like_an_address(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _main(*words.split()) == 1
    told = capsys.readouterr().err
    assert "expected a path on this machine, got 'hf:/" in told
    assert told.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_verification_takes_no_setting_that_it_would_ignore(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--device", "auto"], ["--out", "acts"], ["minilm"]):
        assert _main("cache", *words, "--verify", "acts") == 1
        assert "verify: expected no other setting beside it, got " in capsys.readouterr().err
    assert _main("cache", "--verify", "acts", "--describe", "acts") == 1
    assert "expected no other setting beside it, got " in capsys.readouterr().err
    assert _main("cache", "minilm", "--merge", "a", "b", "--out", "c") == 1
    assert "merge: expected no other setting beside it, got model; it runs no model." in capsys.readouterr().err


def test_a_file_beside_resume_is_refused_as_flags_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my.toml").write_text("k = 32")
    assert _main("train", "--resume", str(tmp_path), "--config", str(tmp_path / "my.toml")) == 1
    assert "expected no other setting beside it, got k;" in capsys.readouterr().err


@dataclass(frozen=True)
class GateSettings:
    """Settings of an architecture that somebody registers.

    Args:
        width: Gates of each latent.
        slope: How steep a gate is.
    """

    width: PositiveInt = 3
    slope: float | None = None

    def __post_init__(self) -> None:
        check_fields(self)


@pytest.fixture
def gates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architecture.description, "_REGISTERED", dict(architecture.description._REGISTERED))
    architecture.register(replace(architecture.architecture_named("topk"), name="gates", settings=GateSettings))


@pytest.mark.usefixtures("gates")
def test_the_settings_of_an_architecture_arrive_from_flags_and_from_a_file(arrived: Arrived, tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    assert _main("train", "--arch", "gates", "--width", "1e1", "--d-sae", "64") == 0
    assert (arrived["arch"], arrived["width"], arrived["slope"], arrived["d_sae"]) == ("gates", 10, None, 64)
    file.write_text('slope = 2\narch = "gates"\n')
    assert _main("train", "--config", str(file), "--width=4") == 0
    assert (arrived["arch"], arrived["width"], arrived["slope"]) == ("gates", 4, 2.0)
    file.write_text('arch = "gates"\nk = 3')
    assert _main("train", f"--config={file}", "--arch=topk") == 0  # the command line goes before the file
    assert (arrived["arch"], arrived["k"]) == ("topk", 3)
    config = RunConfig(train=TrainConfig(arch="gates", width=5, d_sae=8))
    file.write_text(config.to_toml())
    assert _main("train", "--config", str(file)) == 0
    assert {name: arrived[name] for name in config.train.flat()} == config.train.flat()


@pytest.mark.usefixtures("gates")
@pytest.mark.parametrize(
    ("words", "content", "message"),
    [
        (["--arch", "gates", "--k", "3"], "", "Unknown option: --k"),
        (["--arch", "gates", "--width", "0"], "", "width: expected a positive number, got 0."),
        (["--arch", "gate"], "", "got 'gate'."),
        (["--arch"], "", "--arch"),
        ([], 'arch = "gate"', "got 'gate'."),
        ([], "arch = 3", "got '3'."),
        ([], 'arch = "gates"\nk = 3', "no setting 'k' of flashsae train. gates has no setting k; --arch topk has."),
        (["--arch", "gates"], "width = 2.5", "my.toml: width: expected a whole number"),
    ],
)
def test_a_setting_that_the_architecture_lacks_is_refused_by_name(
    words: list[str],
    content: str,
    message: str,
    arrived: Arrived,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "my.toml").write_text(content)
    assert _main("train", "--config", str(tmp_path / "my.toml"), *words) in (1, 2)
    told = capsys.readouterr().err
    assert told.startswith("flashsae: ")
    assert message in told
    assert told.count("\n") == 1
    assert not arrived


@pytest.mark.usefixtures("gates")
@pytest.mark.parametrize("name", ["held_out", "report", "resume", "tokens"])
def test_an_architecture_whose_setting_is_called_as_one_of_the_run_is_refused(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = make_dataclass("Settings", [(name, int, 3)], frozen=True)
    architecture.register(replace(architecture.architecture_named("topk"), name="taking", settings=settings))
    assert _main("train", "--arch", "taking", "--plan") == 1
    assert f"flashsae: {name}: expected settings of taking to have names of their own" in capsys.readouterr().err


@pytest.mark.usefixtures("gates")
def test_help_shows_the_settings_of_the_architecture_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = []
    for words in (["--arch", "gates"], []):
        assert _main("train", *words, "--help") == 0
        shown.append(capsys.readouterr().out)
    text = " ".join(shown[0].replace("│", " ").split())  # wherever a line ends
    named = re.search(r"Architecture of the SAE: ([\w, ]+), or one of a package", text)
    assert named is not None
    assert {"batch_topk", "gates", "topk"} <= set(named[1].split(", "))
    for line in ("Gates of each latent.", "How steep a gate is.", "--d-sae"):
        assert line in shown[0]
    assert "--k " not in shown[0]
    assert re.search("--k .*Latents active for each token", shown[1])
    assert "--width" not in shown[1]


@pytest.mark.parametrize(("word", "meant"), [("1e6", 1_000_000), ("1_000", 1000), ("2.0", 2), ("0x10", 16)])
def test_whole_numbers_may_be_written_as_people_write_them(word: str, meant: int, arrived: Arrived) -> None:
    assert _main("train", "--tokens", word) == 0
    assert arrived["tokens"] == meant


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["--hookpoint", "h.1:in", "--k", "3", "--hookpoint=h.1"], "h.1:in, h.1"),
        (["--hookpoint", "h.{1,2}"], "h.{1,2}"),
        (["--hookpoint=h.1,h.2", "gpt2", "--hookpoint", "h.3"], "h.1,h.2, h.3"),
    ],
)
def test_hookpoints_may_be_repeated(given: list[str], meant: str, arrived: Arrived) -> None:
    assert _main("train", *given) == 0
    assert arrived["hookpoint"] == meant
    assert _main("cache", "--out", "acts", *(word for word in given if word not in ("--k", "3"))) == 0
    assert arrived["hookpoint"] == meant


def test_texts_may_be_repeated_or_a_list_in_a_file(arrived: Arrived, tmp_path: Path) -> None:
    assert _main("train", "--dataset", "a@0.7", "--k", "3", "--dataset=b@0.3") == 0
    assert arrived["dataset"] == "a@0.7, b@0.3"
    assert _main("train", "gpt2", "a@0.7", "owner/b@.3e0", "c@1e-3", "--hookpoint", "h.1") == 0
    assert (arrived["model"], arrived["dataset"]) == ("gpt2", "a@0.7, owner/b@.3e0, c@1e-3")
    assert _main("train", "--dataset", "a@0.7", "b@0.3", "--k", "3") == 0
    assert arrived["dataset"] == "a@0.7, b@0.3"
    assert (
        _main("train", "gpt2", "a@0.7", "b", "--hookpoint", "h.1") == 2
    )  # of which the weight may have been forgotten
    assert _main("train", "gpt2", "a@0.7,b", "--hookpoint", "h.1") == 0
    assert arrived["dataset"] == "a@0.7,b"
    (tmp_path / "x.toml").write_text('dataset = ["a@0.7", "b@0.3"]')
    assert _main("train", "--config", str(tmp_path / "x.toml")) == 0
    assert arrived["dataset"] == "a@0.7, b@0.3"


def test_a_hookpoint_without_a_value_is_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    assert _main("train", "--hookpoint", "h.1", "--hookpoint") == 2
    assert "--hookpoint" in capsys.readouterr().err
    assert _main("train", "--hookpoint=", "--k", "3") == 1
    assert "hookpoint: expected a string, got ''" in capsys.readouterr().err
