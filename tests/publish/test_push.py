"""Pushes to a stand-in for the hub: one commit or none, and each sentence on what is not allowed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import flashsae
from flashsae.cli import main
from flashsae.errors import CheckpointError
from flashsae.places.hub import Place
from flashsae.publish.push import outdated, push
from helpers import hub as stand_in
from helpers import published as runs
from helpers.hub import READER, WRITER, Hub

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of huggingface_hub itself


@pytest.fixture(autouse=True)
def _without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw nothing: figures are slow, and have tests of their own."""
    for name in ("training_plots", "dictionary_plots", "comparing_plots"):
        monkeypatch.setattr(f"flashsae.publish.folder.{name}", lambda *_: [])


def call(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["push", *map(str, words), "--format", "flashsae"])
    said = capsys.readouterr()
    assert ended.value.code == 0, said.err
    return " ".join(said.out.split())


def refused(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["push", *map(str, words), "--format", "flashsae"])
    assert ended.value.code == 1
    return capsys.readouterr().err.strip().removeprefix("flashsae: ")


def test_what_is_pushed_is_loaded_again(finished: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    said = call(capsys, finished, "me/saes", "--license", "mit")
    assert f"pushed: {hub.url}/me/saes/tree/main" in said
    assert hub.repos["me/saes"].messages == ["initial commit", "Push TopK SAE of openai-community/gpt2, h.6"]
    there = hub.files("me/saes")
    for name in ("flashsae.json", "flashsae.safetensors"):
        assert there[name] == (finished / "sae" / name).read_bytes()
    assert b"license: mit" in there["README.md"]
    sae = flashsae.load("hf://me/saes")
    x = torch.randn(3, runs.D_IN)
    assert torch.equal(sae(x), flashsae.SAE.load(finished / "sae")(x))


def test_the_same_again_is_no_commit(finished: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    call(capsys, finished, "me/saes")
    before = dict(hub.repos["me/saes"].branches)
    assert "nothing has changed since the last push" in call(capsys, finished, "me/saes")
    assert hub.repos["me/saes"].branches == before
    call(capsys, finished, "hf://me/saes", "--license", "mit", "--message", "Say the license")
    assert hub.repos["me/saes"].messages[-1] == "Say the license"


def test_revisions_and_folders(finished: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.put("me/saes", {"LICENSE": "mine", "README.md": "all my SAEs"})
    said = call(capsys, finished, "me/saes", "--revision", "try/2", "--path-in-repo", "h.6/topk/")
    assert said.endswith("/me/saes/tree/try/2/h.6/topk")
    assert set(hub.files("me/saes")) == {"LICENSE", "README.md"}
    there = hub.files("me/saes", "try/2")
    assert there["README.md"] == b"all my SAEs"
    assert b'flashsae.load("hf://me/saes@try%2F2/h.6/topk")' in there["h.6/topk/README.md"]
    assert flashsae.load("hf://me/saes@try%2F2/h.6/topk").config.d_sae == runs.D_SAE
    assert "nothing has changed" in call(
        capsys, finished, "me/saes", "--revision", "try/2", "--path-in-repo", "h.6/topk"
    )


def test_private_repositories(
    finished: Path, hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    call(capsys, finished, "me/saes", "--private")
    assert hub.repos["me/saes"].private
    call(capsys, finished, "me/saes", "--private")
    call(capsys, finished, "me/saes")
    hub.put("me/open", {"a.txt": ""})
    assert refused(capsys, finished, "me/open", "--private").startswith(
        "private: expected a repository that is private, or none yet, and me/open is public."
    )
    assert set(hub.files("me/open")) == {"a.txt"}
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(CheckpointError, match="no such repository that can be seen without a token"):
        flashsae.load("hf://me/saes")


def test_several_saes(tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    call(capsys, runs.write_sweep(tmp_path / "sweep"), "me/saes")
    with pytest.raises(CheckpointError, match=r"it holds 2 SAEs: seed0, seed1\. Name one of them"):
        flashsae.load("hf://me/saes")
    assert flashsae.load("hf://me/saes/seed1").config.d_sae == runs.D_SAE


def test_what_an_earlier_push_left_goes_and_the_rest_stays(
    finished: Path, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    call(capsys, runs.write_sweep(tmp_path / "sweep"), "me/saes")
    own = {"LICENSE": b"mine", "notes/pictures/a.svg": b"mine", "saelens-notes.md": b"mine"}
    other = {f"other/{name}": b"of another push" for name in ("README.md", "flashsae.json", "config.toml")}
    left = {"seed0/saelens/cfg.json": b"old", "pictures/old.svg": b"old"}
    hub.put("me/saes", {**hub.files("me/saes"), **own, **other, **left})
    call(capsys, finished, "me/saes")
    there = hub.files("me/saes")
    assert {name: there[name] for name in (*own, *other)} == own | other
    assert not [name for name in there if name.startswith("seed") or name in left]
    assert flashsae.load("hf://me/saes").config.d_sae == runs.D_SAE


def test_nothing_of_a_repository_that_is_not_ours_goes() -> None:
    there = ["config.toml", "pictures/cat.png", "sae/flashsae.json", "sae/README.md", "saelens/cfg.json"]
    assert outdated(there, ["flashsae.json"], "") == []
    assert outdated(["a/flashsae.json", "a/pictures/x.svg", "b/flashsae.json"], ["a/flashsae.json"], "a") == [
        "a/pictures/x.svg"
    ]


def test_a_push_that_breaks_off_leaves_the_repository_as_it_was(
    finished: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.put("me/saes", {"README.md": "old"})
    before = dict(hub.repos["me/saes"].branches)
    for step in ("PUT /lfs", "POST /api/models/me/saes/commit", "POST /api/models/me/saes/preupload"):
        hub.fail = {step: 418}
        assert "hf://me/saes: " in refused(capsys, finished, "me/saes")
        assert hub.repos["me/saes"].branches == before
    hub.fail = {}
    call(capsys, finished, "me/saes")
    assert flashsae.load("hf://me/saes").config.d_sae == runs.D_SAE


@pytest.mark.slow
def test_a_push_that_is_killed_leaves_the_repository_as_it_was(finished: Path, tmp_path: Path, hub: Hub) -> None:
    hub.put("me/saes", {"README.md": "old"})
    hub.wait["POST /api/models/me/saes/commit"] = 30.0
    told = os.environ | stand_in.environment(hub, tmp_path / "home", WRITER) | {"TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "flashsae", "push", str(finished), "me/saes", "--format", "flashsae"]
    with subprocess.Popen(command, env=told, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while not any("/commit/" in line for line in hub.asked) and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    assert process.returncode == 130
    assert hub.files("me/saes") == {"README.md": b"old"}
    assert not list(tmp_path.glob("flashsae-push-*"))


def test_somebody_else_was_quicker(finished: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.put("me/saes", {"README.md": "old"})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("---\nlibrary_name: flashsae\n---\nnew")
    before = outdated

    def late(*given: object) -> list[str]:
        hub.put("me/saes", {"README.md": "theirs"})
        return before(*given)  # type: ignore[arg-type]

    monkeypatch.setattr("flashsae.publish.push.outdated", late)
    with pytest.raises(
        CheckpointError, match=r"hf://me/saes: it was changed meanwhile, so nothing was pushed. Push again"
    ):
        push(tmp_path / "out", Place("me/saes"), "new")
    assert hub.files("me/saes")["README.md"] == b"theirs"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("me",), "repo: expected USER/NAME on the hub, got 'me'; --path-in-repo names a folder."),
        (("me/a/b",), "repo: expected USER/NAME on the hub, got 'me/a/b'; --path-in-repo names a folder."),
        (("me/a@v1",), "repo: expected USER/NAME on the hub, got 'me/a@v1'; --path-in-repo names a folder."),
        ((), "repo: expected USER/NAME to push to, or --to-folder DIR to look at what would be pushed."),
        (("me/sa es",), "'hf://me/sa es/' is no place on the Hugging Face hub"),
        (("me/saes", "--path-in-repo", "../other"), "its path leads out of the repository"),
        (("me/saes", "--revision", "a..b"), "revision: expected the name of a branch or tag, or a commit, got 'a..b'"),
        (("me/saes", "--revision", "0" * 40), "revision: expected the name of a branch to push to, got '000"),
        (("me/saes", "--revision", "refs/pr/1"), "revision: expected the name of a branch to push to, got 'refs/pr/1'"),
    ],
)
def test_places_to_which_nothing_is_pushed(
    finished: Path, hub: Hub, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], sentence: str
) -> None:
    assert sentence in refused(capsys, finished, *words)
    assert not hub.repos


def test_a_push_without_a_token_that_may(
    finished: Path, hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", READER)
    hub.put("me/saes", {"README.md": "old"})
    said = refused(capsys, finished, "me/saes")
    assert said.startswith("hf://me/saes: it cannot be written with this token")
    assert "Use a token that may, or ask its owner." in said
    assert "hf://me/new: it cannot be written with this token" in refused(capsys, finished, "me/new")
    monkeypatch.delenv("HF_TOKEN")
    said = refused(capsys, finished, "me/saes")
    assert said == (
        "hf://me/saes: to push needs a token of an account that may write there: log in with `hf auth login`, or set "
        "HF_TOKEN."
    )
    assert hub.files("me/saes") == {"README.md": b"old"}
    assert set(hub.repos) == {"me/saes"}


def test_a_repository_of_somebody_else(finished: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.put("me/saes", {"README.md": "theirs"}, hidden=True)
    said = refused(capsys, finished, "me/saes")
    assert said == (
        "hf://me/saes: there is a repository of this name that cannot be seen with this token. Use a token that may, "
        "or another name."
    )


def test_a_push_without_a_network(
    finished: Path, hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.fail["/"] = 0
    assert "hf://me/saes: the hub cannot be reached" in refused(capsys, finished, "me/saes")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set. Unset it to push, or give --to-folder" in refused(capsys, finished, "me/saes")


def test_a_card_that_the_hub_refuses(finished: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, finished, "me/saes", "--license", "no-such-license")
    assert '"license" must be one of' in said
    assert "flashsae.json" not in hub.files("me/saes")


def test_a_folder_to_look_at(finished: Path, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    said = call(capsys, finished, "--to-folder", tmp_path / "look")
    assert f"written: {tmp_path / 'look'}; its README.md is the card" in said
    assert 'flashsae.load("hf://USER/NAME")' in (tmp_path / "look" / "README.md").read_text("utf-8")
    assert not (tmp_path / "look" / "flashsae.safetensors").is_symlink()
    assert not hub.asked
    assert "look exists already and is not overwritten" in refused(capsys, finished, "--to-folder", tmp_path / "look")


def test_what_is_shortened_is_told(tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    run = runs.write_run(tmp_path / "run", dataset="/home/ann/wiki.jsonl")
    said = call(capsys, run, "me/saes")
    assert "note: only the last part of the path is told of config.toml: dataset, flashsae.json: dataset" in said
    assert not any(b"/home/ann" in content for content in hub.files("me/saes").values())
