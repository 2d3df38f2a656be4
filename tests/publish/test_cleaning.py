from pathlib import Path
from typing import Any

import pytest

from flashsae.errors import ConfigError
from flashsae.publish.cleaning import cleaned

TOKEN = "hf_" + "a1B2" * 8


def test_paths_are_shortened_wherever_they_stand_and_that_is_told() -> None:
    shortened: list[str] = []
    value = {"dataset": "/home/ann/wiki.jsonl", "k": 3, "in": [{"file": Path("/x/y.txt")}, "org/name"], "none": None}
    assert cleaned(value, "config.toml", shortened) == {
        "dataset": "wiki.jsonl", "k": 3, "in": [{"file": "y.txt"}, "org/name"], "none": None,
    }  # fmt: skip
    assert shortened == ["config.toml: dataset", "config.toml: in: file"]


@pytest.mark.parametrize(
    "value",
    [
        TOKEN,
        {"model_kwargs": [f"token={TOKEN}"]},
        "https://ann:geheim@host/texts.jsonl",
        "https://:geheim@host/texts.jsonl",
        ["AKIA" + "A1" * 8],
        "ghp_" + "x1" * 12,
        "auth_token=abcdefgh",
        "api_key = abcdefgh",
        "https://host/texts.jsonl?X-Amz-Signature=abcdefgh",
    ],
)
def test_secrets_are_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"looks like a token or a password, so nothing is pushed\. Take it out of"):
        cleaned({"a": value}, "config.toml", [])


@pytest.mark.parametrize(
    "value", ["trust_remote_code=true", "token=False", "https://host/x@y", "hf_short", "tokens = 1"]
)
def test_what_is_no_secret(value: str) -> None:
    assert cleaned(value, "config.toml", []) == value
