from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import flashsae
from flashsae import SAE, TrainConfig
from flashsae.data.synthetic import SuperpositionModel
from flashsae.errors import ConfigError, DataError, DtypeError, StorageError
from flashsae.metrics import direction_recovery

SMALL = TrainConfig(batch_tokens=64, tokens=64 * 30, checkpoint_every_steps=7, shuffle_tokens=256)
X = SuperpositionModel(8, 16, active=2.0).sample(640, seed=1)


def _same(a: SAE, b: SAE) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


def test_known_directions_are_found() -> None:
    model = SuperpositionModel(32, 96, active=3.0, seed=1)
    x = model.sample(20_000, seed=2)
    sae = flashsae.fit(x, d_sae=96, k=3, progress=False)
    assert sae.config.d_in == 32
    assert direction_recovery(sae.W_dec, model.directions) >= 0.95


def test_every_kind_of_array_gives_the_same_sae(tmp_path: Path) -> None:
    array = X.numpy()
    np.save(tmp_path / "x.npy", array)
    saes = [
        flashsae.fit(x, d_sae=16, k=3, config=SMALL, progress=False)
        for x in (X, array, np.load(tmp_path / "x.npy", mmap_mode="r"))
    ]
    assert _same(saes[0], saes[1])
    assert _same(saes[0], saes[2])


@pytest.mark.parametrize("kind", ["list", "generator", "bfloat16"])
def test_iterables_are_trained_on(kind: str) -> None:
    parts = list(X.split(50))
    x = {"list": parts, "generator": (p for p in parts * 4), "bfloat16": [p.bfloat16() for p in parts]}[kind]
    sae = flashsae.fit(x, d_sae=16, k=3, config=SMALL, progress=False)
    assert flashsae.evaluate(sae, X).fvu < 0.6


def test_a_run_folder_holds_log_and_checkpoint_and_is_gone_on_with(tmp_path: Path) -> None:
    whole = flashsae.fit(X, d_sae=16, k=3, config=SMALL, run=tmp_path / "a", progress=False)
    records = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == 30
    assert {"fvu", "l0", "loss", "lr", "dead_latents", "tokens", "tokens_per_second"} <= records[-1].keys()
    with pytest.raises(StorageError, match="exists already and is not overwritten"):
        flashsae.fit(X, d_sae=16, k=3, config=SMALL, run=tmp_path / "a", progress=False)

    def cut_short() -> object:
        for number, part in enumerate(X.split(64)):
            if number == 9:
                raise KeyboardInterrupt
            yield part

    iterable = list(X.split(64))
    expected = flashsae.fit(iterable, d_sae=16, k=3, config=SMALL, progress=False)
    with pytest.raises(KeyboardInterrupt):
        flashsae.fit(cut_short(), d_sae=16, k=3, config=SMALL, run=tmp_path / "b", progress=False)  # type: ignore[arg-type]
    resumed = flashsae.fit(iterable, d_sae=16, k=3, config=SMALL, run=tmp_path / "b", resume=True, progress=False)
    assert _same(resumed, expected)
    again = flashsae.fit(X, d_sae=16, k=3, config=SMALL, run=tmp_path / "a", resume=True, progress=False)
    assert _same(again, whole)


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tokens: expected a number, because the length of an iterable is not known"):
        flashsae.fit([X], d_sae=16, k=3)
    with pytest.raises(ConfigError, match="k: expected k <= d_sae = 16, got 17"):
        flashsae.fit(X, d_sae=16, k=17)
    with pytest.raises(ConfigError, match="resume: expected run=FOLDER"):
        flashsae.fit(X, d_sae=16, k=3, resume=True)
    with pytest.raises(DtypeError, match=r"x: expected float32, .* got torch\.int64"):
        flashsae.fit(X.long(), d_sae=16, k=3)
    with pytest.raises(DataError, match="x has 640 rows for training, fewer than a batch of 1024"):
        flashsae.fit(X, d_sae=16, k=3)
    with pytest.raises(DataError, match=r"the iterable x ended: .* rows are left, fewer than a batch"):
        flashsae.fit(iter([X]), d_sae=16, k=3, config=SMALL, progress=False)
    with pytest.raises(ConfigError, match="device: expected auto, cpu or a CUDA device that exists, got 'tpu'"):
        flashsae.fit(X, d_sae=16, k=3, config=TrainConfig(batch_tokens=64, device="tpu"))
