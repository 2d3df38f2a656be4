"""What is fetched from the hub, and each sentence on what is not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import flashsae
from flashsae.errors import CheckpointError, ConfigError, MissingExtraError, StorageError
from flashsae.places.hub import Place, fetched, place_of
from helpers import hub as stand_in
from helpers.hub import READER, WRITER, Hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with stand_in.running() as running:
        stand_in.use(running, tmp_path / "home", monkeypatch)
        yield running


SAE = {"flashsae.json": "{}", "flashsae.safetensors": b"weights"}
SEVERAL = {"config.json": "of all", **{f"h.{i}/{name}": content for i in (3, 11) for name, content in SAE.items()}}


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_only_what_is_of_the_sae_is_fetched(hub: Hub) -> None:
    hub.put("me/sae", {**SAE, "saelens/sae_weights.safetensors": b"other", "pictures/a.png": b"png"})
    folder = fetched("hf://me/sae")
    assert content_of(folder) == {
        name: content.encode() if isinstance(content, str) else content for name, content in SAE.items()
    }
    assert sorted(hub.downloaded()) == sorted(SAE)
    hub.asked.clear()
    assert fetched("hf://me/sae/") == folder
    assert hub.downloaded() == []


def test_a_path_and_the_config_above_it(hub: Hub) -> None:
    hub.put("me/saes", {**SEVERAL, "h.3/sub/more.txt": "no"})
    folder = fetched("hf://me/saes/h.3")
    assert folder.name == "h.3"
    assert sorted(hub.downloaded()) == ["config.json", "h.3/flashsae.json", "h.3/flashsae.safetensors"]
    assert fetched("hf://me/saes/h.3/flashsae.safetensors").read_bytes() == b"weights"


def test_all_that_lies_under_a_path(hub: Hub) -> None:
    hub.put("me/saes", {f"set/{name}": content for name, content in SEVERAL.items()} | {"big.bin": b"no"})
    assert sorted(content_of(fetched("hf://me/saes/set", several=True))) == sorted(SEVERAL)
    assert "big.bin" not in hub.downloaded()


def test_of_a_set_what_lies_beside_its_files_comes_along(hub: Hub) -> None:
    own = {"config.yaml": "c", "layer_0.safetensors": b"0", "layer_1.safetensors": b"1", "lm_config.json": "lm"}
    hub.put("me/set", {**own, "features/index.json": "large", "saelens/cfg.json": "other"})
    assert sorted(content_of(fetched("hf://me/set", several=True))) == sorted(own)
    hub.put("me/both", {f"{k}/{form}w.safetensors": f"{k}{form}" for k in "ab" for form in ("", "saelens/")})
    assert sorted(content_of(fetched("hf://me/both", several=True))) == ["a/w.safetensors", "b/w.safetensors"]
    with pytest.raises(CheckpointError, match="it holds no weights of an SAE"):
        fetched("hf://me/set/features", several=True)


def test_one_of_a_set_without_its_ending(hub: Hub) -> None:
    hub.put("me/set", {"config.yaml": "c", "layer_0.safetensors": b"0", "layer_1.safetensors": b"1"})
    assert fetched("hf://me/set/layer_1").read_bytes() == b"1"
    assert sorted(hub.downloaded()) == ["config.yaml", "layer_1.safetensors"]


def test_signs_in_names_are_no_patterns(hub: Hub) -> None:
    hub.put("me/saes", {"a[b]*/w.safetensors": b"1", "ab/w.safetensors": b"2", "a[b]*/cfg.json": "{}"})
    assert (fetched("hf://me/saes/a[b]*") / "w.safetensors").read_bytes() == b"1"
    assert not any(name.startswith("ab/") for name in hub.downloaded())


def test_revisions(hub: Hub) -> None:
    first = hub.put("me/sae", {"w.safetensors": b"1"})
    hub.put("me/sae", {"w.safetensors": b"2"}, branch="try/wider")
    hub.put("me/sae", {"w.safetensors": b"3"})

    def read(uri: str, revision: str | None = None) -> bytes:
        return (fetched(uri, revision=revision) / "w.safetensors").read_bytes()

    assert read("hf://me/sae") == b"3"
    assert read("hf://me/sae@try%2Fwider") == b"2"
    assert read("hf://me/sae", "try/wider") == b"2"
    assert read(f"hf://me/sae@{first}") == b"1"
    with pytest.raises(CheckpointError, match=r"there is no revision 'v9'. Name a branch, tag or commit of it"):
        fetched("hf://me/sae@v9")


def test_private_repositories_by_the_tokens_of_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.put("me/sae", SAE, private=True)
    with pytest.raises(
        CheckpointError,
        match=r"seen without a token\. .*if it is private, log in with `hf auth login`, or set HF_TOKEN",
    ):
        fetched("hf://me/sae")
    with pytest.raises(CheckpointError, match="the hub does not know the token"):
        fetched("hf://me/sae", token="hf_" + "unknown")
    assert (fetched("hf://me/sae", token=READER) / "flashsae.json").is_file()
    monkeypatch.setenv("HF_TOKEN", READER)
    assert (fetched("hf://me/sae") / "flashsae.json").is_file()
    with pytest.raises(
        CheckpointError, match="hf://me/none: there is no such repository that can be seen with this token"
    ):
        fetched("hf://me/none")


def test_a_gated_repository(hub: Hub) -> None:
    hub.put("me/sae", SAE, gated=True)
    with pytest.raises(CheckpointError, match=f"its owner grants access on {hub.url}/me/sae: ask there, then log in"):
        fetched("hf://me/sae", token=READER)
    assert fetched("hf://me/sae", token=WRITER).is_dir()


def test_several_saes_are_named(hub: Hub) -> None:
    hub.put("me/saes", {f"layer_{i}/params.npz": b"" for i in range(30)} | {"README.md": ""})
    with pytest.raises(CheckpointError) as refused:
        fetched("hf://me/saes")
    assert "hf://me/saes: it holds 30 SAEs: layer_0, layer_1, layer_2" in str(refused.value)
    assert "and 10 more. Name one of them." in str(refused.value)
    assert hub.downloaded() == []
    hub.put("me/formats", {f"k{k}/{form}w.safetensors": b"" for k in (8, 16) for form in ("", "saelens/")})
    with pytest.raises(CheckpointError, match=r"it holds 2 SAEs: k8, k16\. Name one of them"):
        fetched("hf://me/formats")
    with pytest.raises(
        CheckpointError, match="hf://me/saes/x: there is no such path; the repository holds 30 SAEs: lay"
    ):
        fetched("hf://me/saes/x")


def test_a_repository_without_weights(hub: Hub) -> None:
    hub.put("me/text", {"README.md": ""})
    with pytest.raises(CheckpointError, match=r"it holds no weights of an SAE. Check the name and the path"):
        fetched("hf://me/text")


def test_work_without_a_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.put("me/saes", SEVERAL)
    folder = fetched("hf://me/saes/h.3")
    hub.fail["/"] = 0
    with pytest.raises(
        CheckpointError, match=r"the hub cannot be reached .*Check the connection, or set HF_HUB_OFFLINE=1 to"
    ):
        fetched("hf://me/saes/h.3")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert fetched("hf://me/saes/h.3") == folder
    with pytest.raises(
        CheckpointError, match=r"h\.11: there is no such path; .*HF_HUB_OFFLINE is set, so only what was"
    ):
        fetched("hf://me/saes/h.11")
    with pytest.raises(CheckpointError, match="hf://me/other: HF_HUB_OFFLINE is set, and it was not fetched before"):
        fetched("hf://me/other")


def test_a_hub_in_trouble(hub: Hub) -> None:
    hub.put("me/sae", SAE)
    hub.fail["/api/models"] = 418
    with pytest.raises(CheckpointError, match=r"the hub answers with status 418 .*Try again later."):
        fetched("hf://me/sae")
    hub.fail["/api/models"] = 403
    with pytest.raises(CheckpointError, match=r"it cannot be read without a token .*Use a token that may, or ask its"):
        fetched("hf://me/sae")


def test_a_download_that_broke_off_is_no_sae(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.put("me/sae", SAE)
    hub.fail["GET /me/sae/resolve"] = 418
    with pytest.raises(CheckpointError, match="status 418"):
        fetched("hf://me/sae")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set"):
        fetched("hf://me/sae")


@pytest.mark.parametrize("name", ["../../escaped.safetensors", "/tmp/x.safetensors", "a\\..\\b.safetensors"])
def test_no_name_of_the_hub_decides_where_a_byte_is_written(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.put("me/sae", {**SAE, name: b"hostile"})
    with pytest.raises(CheckpointError, match="the hub names files outside of the repository, so nothing was fetched"):
        fetched("hf://me/sae")
    assert not list(tmp_path.rglob("*escaped*"))


def test_without_the_library_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        MissingExtraError, match=r"needs the package 'huggingface_hub', .* pip install 'flashsae\[hf\]'"
    ):
        fetched("hf://me/sae")


def test_a_full_disk_is_told(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.put("me/sae", SAE)

    def full(*args: object, **named: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    with pytest.raises(StorageError, match=r"No space left on device. Free some space, or set HF_HOME"):
        fetched("hf://me/sae")


@pytest.mark.parametrize(
    ("uri", "place"),
    [
        ("hf://me/saes", Place("me/saes")),
        ("hf://models/me/saes/", Place("me/saes")),
        ("hf://me/saes@v1/h.3/a@b", Place("me/saes", "v1", "h.3/a@b")),
        ("hf://me/saes/h.3@x", Place("me/saes", None, "h.3@x")),
        ("hf://me/saes@a%2Fb/c", Place("me/saes", "a/b", "c")),
        ("hf://me/saes@refs/pr/3/c", Place("me/saes", "refs/pr/3", "c")),
    ],
)
def test_places(uri: str, place: Place) -> None:
    assert place_of(uri) == place
    assert place_of(str(place)) == place


@pytest.mark.parametrize(
    ("uri", "sentence"),
    [
        ("hf://", "is no place on the Hugging Face hub: expected hf://USER/NAME, then @REVISION and /PATH"),
        ("hf://gpt2", "is no place on the Hugging Face hub"),
        ("hf://me", "is no place on the Hugging Face hub"),
        ("hf:///x", "is no place on the Hugging Face hub"),
        ("me/saes", "is no place on the Hugging Face hub"),
        ("hf://me/sa es", "is no place on the Hugging Face hub"),
        ("hf://me/a..b", "is no place on the Hugging Face hub"),
        ("hf://../saes", "is no place on the Hugging Face hub"),
        ("hf://datasets/me/text", "SAEs are read from repositories of models, got one of datasets. Download it with"),
        ("hf://me/saes/../../etc", "its path leads out of the repository. Name a folder or file inside."),
        ("hf://me/saes//h.3", "its path leads out of the repository"),
        ("hf://me/saes/a\\b", "its path leads out of the repository"),
        ("hf://me/saes@../../x", "revision: expected the name of a branch or tag, or a commit, got '..'"),
        ("hf://me/saes@a%2F..%2Fb", "revision: expected the name of a branch or tag, or a commit, got 'a/../b'"),
        ("hf://me/saes@/h.3", "revision: expected the name of a branch or tag, or a commit, got ''"),
    ],
)
def test_what_is_no_place(uri: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        place_of(uri)
    assert sentence in str(refused.value)


@pytest.mark.parametrize("place", [Path("hf://me/saes"), "https://host/me/saes", "hf:me/saes"])
def test_what_is_nearly_a_place_is_no_folder(place: str | Path) -> None:
    with pytest.raises(ConfigError, match=r"place: expected hf://USER/NAME, as text, of what lies on the hub, got "):
        flashsae.load(place)


def test_a_hub_that_tells_of_its_files_apart(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi

    hub.put("me/sae", SAE)
    whole = HfApi.model_info

    def without(api: HfApi, *given: Any, **named: Any) -> Any:
        info = whole(api, *given, **named)
        info.siblings = None
        return info

    monkeypatch.setattr(HfApi, "model_info", without)
    assert (fetched("hf://me/sae") / "flashsae.json").is_file()


def test_two_revisions_contradict_each_other() -> None:
    with pytest.raises(
        ConfigError, match="revision: expected that of hf://me/saes@v1, or none in one of both, got 'v2'"
    ):
        place_of("hf://me/saes@v1", "v2")
    assert place_of("hf://me/saes@v1", "v1").revision == "v1"


def test_a_process_of_its_own_takes_the_hub_from_its_environment(hub: Hub, tmp_path: Path) -> None:
    hub.put("me/sae", SAE, private=True)
    told = os.environ | stand_in.environment(hub, tmp_path / "elsewhere", READER)
    code = "from flashsae.places.hub import fetched; print(fetched('hf://me/sae'))"
    done = subprocess.run([sys.executable, "-c", code], env=told, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(tmp_path / "elsewhere" / "hub")
