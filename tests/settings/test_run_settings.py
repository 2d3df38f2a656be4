"""The settings of a run on disk."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest

from flashsae.errors import CheckpointError
from flashsae.settings import ActivationsConfig, RunConfig, TrainConfig, reading
from flashsae.settings.run import CONFIG_FILE
from flashsae.settings.toml import SEAL

CONFIG = RunConfig(
    ActivationsConfig().filled(),
    TrainConfig(64, k=4, lr=1e-3, warmup_steps=2, k_aux=8, dead_after_tokens=100, evaluate_every_steps=5),
)


def test_settings_that_were_cut_anywhere_are_refused(tmp_path: Path) -> None:
    path = tmp_path / CONFIG_FILE
    whole = CONFIG.to_toml().encode()
    for size in range(len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"lacks the setting|checksum does not fit|cannot read the settings"):
            RunConfig.from_toml(path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"has no checksum and lacks the setting held_out, .* Put a copy back"):
        RunConfig.from_toml(path)


def test_settings_without_their_checksum_are_read_if_none_is_missing(tmp_path: Path) -> None:
    path = tmp_path / CONFIG_FILE
    for config in (RunConfig(), CONFIG):
        lines = config.to_toml().splitlines(keepends=True)[1:]
        path.write_text("# by hand\n" + "".join(lines))
        assert RunConfig.from_toml(path) == config
    (tmp_path / "metrics.jsonl").touch()  # training has begun: nothing is left to be worked out
    assert RunConfig.from_toml(path) == CONFIG
    optional = {"arch", "dataset", "mask_special", "skip_first", "exclude_ids", "shuffle_documents", "document_seed"}
    for number, line in enumerate(lines):
        path.write_text("".join(lines[:number] + lines[number + 1 :]))
        name = line.split(" = ")[0]
        if name in {
            *optional,
            "average_tokens",
            "extended",
            *reading._ADDED_LATER,
            "cache_dtype",
            "forward_tokens",
            "model_dtype",
        }:
            RunConfig.from_toml(path)
        else:
            with pytest.raises(CheckpointError, match=r"lacks the setting|cannot read"):
                RunConfig.from_toml(path)


def test_the_settings_of_version_0_1_are_those_of_a_topk_sae(tmp_path: Path) -> None:
    path = tmp_path / CONFIG_FILE
    lines = CONFIG.to_toml().splitlines(keepends=True)[1:]
    older = "".join(line for line in lines if not line.startswith(("arch = ", "d_in = ")))
    path.write_text(f"{SEAL}{zlib.crc32(older.encode())}\n{older}")
    assert "k = 4" in older
    assert RunConfig.from_toml(path) == CONFIG


def test_a_run_of_an_architecture_that_is_not_there_is_told_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / CONFIG_FILE
    path.write_text(RunConfig(train=TrainConfig(arch="batch_topk", k=7)).to_toml())
    assert RunConfig.from_toml(path).train.arch.k == 7
    path.write_text("\n".join(path.read_text().splitlines()[1:]).replace('"batch_topk"', '"mine"'))
    with pytest.raises(CheckpointError, match=r"cannot resume .*: arch: expected one of .*, got 'mine'"):
        RunConfig.from_toml(path)
