"""Every command of the page on inputs writes the cache that it says: each token once, in inputs as they are told."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from pathlib import Path

import pytest

from flashsae.cli import main
from flashsae.data.cache import ActivationCache
from helpers import tiny_models
from helpers.pages import ROOT

COMMANDS = re.findall(r"^\| .* \| `flashsae (cache \./model [^`]*)` \|$", (ROOT / "docs/inputs.md").read_text(), re.M)
CHATS = [{"messages": [{"role": "cat", "content": text}, {"role": "assistant", "content": "it went out"}]}
         for text in tiny_models.DOCUMENTS]  # fmt: skip
SEEN = {
    "--pack": "documents packed",
    "--pack-apart": "each as if it stood alone",
    "--overlap": "the last 4 again where a document goes on",
    "--bos-every": "<s> at each document alone",
    "--no-prepend-bos": "no special token around them",
    "--assistant-only": "rows of the assistant's words alone",
}
"""What an option of a command makes the program say."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands read."""
    folder = tmp_path_factory.mktemp("inputs")
    tokenizer = tiny_models.chat_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    tiny_models.gpt2().save_pretrained(folder / "model")  # type: ignore[operator]
    tokenizer.save_pretrained(folder / "model")
    (folder / "prose.txt").write_text("\n\n".join(tiny_models.DOCUMENTS))
    (folder / "chats.jsonl").write_text("".join(f"{json.dumps(chat)}\n" for chat in CHATS))
    return folder


def test_the_page_has_every_choice() -> None:
    assert len(COMMANDS) == 9
    assert all(any(option in command for command in COMMANDS) for option in SEEN)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.partition("16 ")[2])
def test_commands_give_every_token_once(
    folder: Path, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    words = shlex.split(command)
    words[words.index("acts")] = str(tmp_path / "acts")
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 0, capsys.readouterr().err
    told = capsys.readouterr().out
    assert all((phrase in told) == (option in words) for option, phrase in SEEN.items()), told
    chunks = [chunk for chunk, _ in ActivationCache(tmp_path / "acts", held_out=0.0).chunks("train")]
    found = Counter(
        pair for chunk in chunks for pair in zip(chunk.group.tolist(), tiny_models.need(chunk.token_ids).tolist())
    )
    ids = {word: 2 + place for place, word in enumerate(tiny_models.WORDS)} | {"assistant": 19}
    is_chat, is_alone = "chats.jsonl" in words, "--assistant-only" in words
    texts = [f"cat {text} assistant it went out" if is_chat else text for text in tiny_models.DOCUMENTS]
    texts = ["it went out"] * len(texts) if is_alone else texts
    assert found == Counter((number, ids[word]) for number, text in enumerate(texts) for word in text.split())
