"""Caches are merged, looked at and written from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flashsae.data.cache import ActivationCache
from helpers.command_line import run_main


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with caches a and b, of a few documents."""
    folder = tmp_path_factory.mktemp("caches")
    for name in ("a", "b"):
        text = folder / f"{name}[" / "odd].txt"  # which is no markup
        text.parent.mkdir()
        text.write_text("\n\n".join(f"Paragraph {i} of {name} says that the cat sat on mat {i}." for i in range(20)))
        assert run_main("cache", "minilm", text, "--hookpoint", "encoder.layer.0", "--out", folder / name) == 0
    return folder


def test_caches_are_merged_and_described(caches: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merged, file = tmp_path / "merged", tmp_path / "described.json"
    assert run_main("cache", "--merge", caches / "a", caches / "b", "--out", merged) == 0
    assert f"Train on them: flashsae train --activations {merged}" in capsys.readouterr().out
    both = sum(ActivationCache(caches / name).n_rows for name in ("a", "b"))
    assert ActivationCache(merged).n_rows == both
    assert run_main("cache", "--verify", merged) == 0
    assert run_main("cache", "--describe", merged, "--json", file) == 0
    told = capsys.readouterr().out
    for words in (
        f"{both:,} tokens of 40 documents", "minilm", "a[/odd].txt", "encoder.layer.0, 384 dimensions", "bfloat16",
        "median", "position", "effective dimensions", "outlier tokens", "int8",
    ):  # fmt: skip
        assert words in told
    described = json.loads(file.read_text())
    assert (described["rows"], described["documents"]) == (both, 40)
    assert described["sites"][0]["rounds_away"].keys() == {"bfloat16", "int8"}


def test_a_cache_is_extended_by_the_same_command(caches: Path, tmp_path: Path) -> None:
    text = caches / "a[" / "odd].txt"
    words = ("cache", "minilm", text, "--hookpoint", "encoder.layer.0", "--out", tmp_path / "acts")
    for tokens in ("50", "100"):
        assert run_main(*words, "--max-tokens", tokens) == 0
        assert ActivationCache(tmp_path / "acts").n_rows == int(tokens)
    assert run_main(*words) == 0
    assert ActivationCache(tmp_path / "acts").n_rows == ActivationCache(caches / "a").n_rows


def test_numbers_that_are_not_finite_are_null_in_json(
    caches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flashsae.data.cache_index.CacheIndex.rounded_away", lambda index, name: float("inf"))
    assert run_main("cache", "--describe", caches / "a", "--json", tmp_path / "x.json") == 0
    told = json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail)
    assert told["sites"][0]["rounds_away"]["bfloat16"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--json", "x"], "json: expected --describe FOLDER beside it"),
        (["--merge", "a", "b"], "out: expected --out FOLDER"),
        (["--merge", "a", "--out", "c"], "merge: expected two or more caches, got 1"),
        (["--describe", "nowhere"], "nowhere holds no index.json. Name a folder that flashsae cache wrote."),
        (["--describe", "a", "--device", "cpu"], "describe: expected no other setting beside it, got device"),
        ([], "out: expected --out FOLDER for a cache to be written, or --verify or --describe FOLDER to look at one"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    words: list[str], message: str, caches: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(caches)
    assert run_main("cache", *words) == 1
    assert message in capsys.readouterr().err
