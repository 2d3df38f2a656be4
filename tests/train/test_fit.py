from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import flashsae
from flashsae import SAE, BatchTopKSettings, TopKSettings, TrainConfig
from flashsae.backend import check_single_process
from flashsae.data.synthetic import SuperpositionModel
from flashsae.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DtypeError,
    FlashSAEWarning,
    StorageError,
)
from flashsae.files.atomic import only_one
from flashsae.metrics import direction_recovery
from flashsae.train import plan
from flashsae.train.plan import repeats_warning

SMALL = TrainConfig(batch_tokens=64, tokens=64 * 30, checkpoint_every_steps=7, shuffle_tokens=256)
X = SuperpositionModel(8, 16, active=2.0).sample(640, seed=1)


def _same(a: SAE, b: SAE) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


@pytest.mark.slow
def test_known_directions_are_found() -> None:
    model = SuperpositionModel(32, 96, active=3.0, seed=1)
    x = model.sample(20_000, seed=2)
    sae = flashsae.fit(x, d_sae=128, k=4, progress=False)
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


def test_settings_by_keyword_are_those_of_a_config() -> None:
    given = {"lr": 2e-3, "seed": 4, "betas": (0.8, 0.9), "batch_tokens": 64, "tokens": 64 * 9, "shuffle_tokens": 256}
    by_config = flashsae.fit(X, d_sae=16, config=TrainConfig(k=3, **given), progress=False)  # type: ignore[arg-type]
    by_keyword = flashsae.fit(X, d_sae=16, k=3, progress=False, **given)  # type: ignore[arg-type, call-overload]
    assert _same(by_keyword, by_config)
    config = replace(SMALL, lr=2e-3, seed=4, betas=(0.5, 0.5), tokens=64 * 9, arch=BatchTopKSettings(k=7))
    assert _same(
        flashsae.fit(X, d_sae=16, arch="topk", k=3, betas=(0.8, 0.9), config=config, progress=False), by_config
    )


def test_the_number_of_latents_may_be_left_open() -> None:
    sae = flashsae.fit(X, k=3, config=replace(SMALL, tokens=64), progress=False)
    assert sae.config.d_sae == 64


@pytest.mark.parametrize("kind", ["list", "generator", "bfloat16", "loader"])
def test_iterables_are_trained_on(kind: str) -> None:
    parts = list(X.split(50))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X), batch_size=50)
    x = {
        "loader": loader,
        "list": parts,
        "generator": (p for p in parts * 4),
        "bfloat16": [p.bfloat16() for p in parts],
    }[kind]
    sae = flashsae.fit(x, d_sae=16, k=3, config=SMALL, progress=False)
    assert flashsae.evaluate(sae, X).fvu < 0.6


@pytest.mark.parametrize("exponent", [-60, -10, 13, 80])
def test_the_unit_of_the_activations_does_not_matter(exponent: int) -> None:
    scale = 2.0**exponent
    plain = flashsae.fit(X, d_sae=16, k=3, config=SMALL, progress=False)
    sae = flashsae.fit(X.double() * scale, d_sae=16, k=3, config=SMALL, progress=False)
    assert torch.equal(sae.W_dec, plain.W_dec)
    assert torch.equal(sae.W_enc_T, plain.W_enc_T)
    assert torch.equal(sae.b_dec / scale, plain.b_dec)
    if exponent < 60:  # beyond, the squares of the evaluation overflow
        assert flashsae.evaluate(sae, X * scale).fvu == flashsae.evaluate(plain, X).fvu


def test_training_inside_no_grad_and_inference_mode() -> None:
    with torch.no_grad():
        first = flashsae.fit(X, d_sae=16, k=3, config=SMALL, progress=False)
    with torch.inference_mode():
        second = flashsae.fit(X, d_sae=16, k=3, config=SMALL, progress=False)
    assert _same(first, second)


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


@pytest.mark.parametrize(
    ("arch", "k", "config", "expected"),
    [
        ("batch_topk", None, {"k": 5}, BatchTopKSettings(k=5)),
        ("topk", None, {"k": 5}, TopKSettings(k=5)),
        ("topk", None, {"arch": "batch_topk", "k": 5}, TopKSettings(k=5)),
        ("batch_topk", 6, {"k": 5}, BatchTopKSettings(k=6)),
        (BatchTopKSettings(k=7), None, {"k": 5}, BatchTopKSettings(k=7)),
        (None, 6, {"arch": "batch_topk", "k": 5}, BatchTopKSettings(k=6)),
    ],
)
def test_settings_of_an_architecture_are_kept_beside_the_name_of_another(
    arch: object, k: int | None, config: dict[str, Any], expected: object
) -> None:
    settings = flashsae.TrainConfig(tokens=16, batch_tokens=8, **config)
    sae = flashsae.fit(X, d_sae=16, k=k, arch=arch, config=settings, progress=False)
    assert sae.config.arch == expected


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tokens: expected a number, because the length of an iterable is not known"):
        flashsae.fit([X], d_sae=16, k=3)
    with pytest.raises(DtypeError, match="x: expected a tensor, a numpy array or an iterable of such, got NoneType"):
        flashsae.fit(None, d_sae=16, k=3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"tokens: expected a whole number .*, got 1000000\.5"):
        flashsae.fit(X, d_sae=16, k=3, tokens=1_000_000.5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="k: expected k <= d_sae = 16, got 17"):
        flashsae.fit(X, d_sae=16, k=17)
    with pytest.raises(CheckpointError, match="none does not exist, so there is nothing to resume"):
        flashsae.fit(X, d_sae=16, k=3, config=SMALL, run=tmp_path / "none", resume=True)
    flashsae.fit(X, d_sae=16, k=3, config=SMALL, run=tmp_path / "run", progress=False)
    with pytest.raises(CheckpointError, match=r"does not fit these settings: k was 3 and is 2 now\. Resume with"):
        flashsae.fit(X, d_sae=16, k=2, config=SMALL, run=tmp_path / "run", resume=True, progress=False)
    with only_one(tmp_path / "run"), pytest.raises(StorageError, match="another process works in"):
        flashsae.fit(X, d_sae=16, k=3, config=SMALL, run=tmp_path / "run", resume=True, progress=False)
    with pytest.raises(ConfigError, match="resume: expected run=FOLDER"):
        flashsae.fit(X, d_sae=16, k=3, resume=True)
    with pytest.raises(DtypeError, match=r"x: expected float32, .* got torch\.int64"):
        flashsae.fit(X.long(), d_sae=16, k=3)
    with pytest.raises(DataError, match="x has 640 rows for training, fewer than a batch of 1024"):
        flashsae.fit(X, d_sae=16, k=3)
    with pytest.raises(DataError, match=r"the iterable x ended: 63 rows are left, fewer than a batch of 64"):
        flashsae.fit(iter([X[:63]]), d_sae=16, k=3, config=SMALL, progress=False)
    with pytest.raises(ConfigError, match="device: expected auto, cpu or a CUDA device that exists, got 'tpu'"):
        flashsae.fit(X, d_sae=16, k=3, config=TrainConfig(batch_tokens=64, device="tpu"))


def test_a_generator_that_runs_out_ends_the_training_and_loses_nothing(tmp_path: Path) -> None:
    with pytest.warns(FlashSAEWarning, match=r"the iterable x ended: 0 rows are left.* 640 tokens, not 1,920: step 10"):
        sae = flashsae.fit(iter(X.split(50)), d_sae=16, k=3, config=SMALL, run=tmp_path / "run", progress=False)
    assert flashsae.evaluate(sae, X).fvu < 0.9
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert (records[-1]["step"], records[-1]["tokens"]) == (10, 640)
    with pytest.warns(FlashSAEWarning, match="the iterable x ended"):  # as it is, without another step
        again = flashsae.fit(
            iter(X.split(50)), d_sae=16, k=3, config=SMALL, run=tmp_path / "run", resume=True, progress=False
        )
    assert _same(again, sae)


def test_a_run_is_not_gone_on_with_on_other_data(tmp_path: Path) -> None:
    other, nudged = X.flip(0), X.clone()
    nudged[321, 3] += 1e-3
    parts = list(X.split(64))
    flashsae.fit(X, d_sae=16, k=3, config=SMALL, run=tmp_path / "array", progress=False)
    flashsae.fit(parts, d_sae=16, k=3, config=SMALL, run=tmp_path / "list", progress=False)
    for run, data in [
        ("array", other),
        ("array", nudged),
        ("array", X.half()),
        ("array", parts),
        ("array", X[:-1]),
        ("list", X),
        ("list", parts[::-1]),
        ("list", list(X.split(60))),
    ]:
        with pytest.raises(CheckpointError, match=r"Resume with the same data"):
            flashsae.fit(data, d_sae=16, k=3, config=SMALL, run=tmp_path / run, resume=True, progress=False)


def test_data_that_comes_too_often_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    assert repeats_warning(100 * 24, 24) == ""
    assert "each comes about 101 times in 2,424" in repeats_warning(101 * 24, 24)
    monkeypatch.setattr(plan, "MOST_REPEATS", 3)
    config = TrainConfig(batch_tokens=8, tokens=80, shuffle_tokens=16)
    for x in (X[:24], [X[:24]]):  # of a list this is known at the end of its first epoch
        with pytest.warns(FlashSAEWarning, match=r"there are 24 tokens to train on, so each comes about 3 times in 80"):
            flashsae.fit(x, d_sae=16, k=3, config=config, progress=False)
    flashsae.fit(X[:27], d_sae=16, k=3, config=config, progress=False)


def test_repeats_that_fit_chose_are_no_surprise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["flashsae.train.arrays"], "LEAST_TOKENS", 1)
    monkeypatch.setattr(plan, "MOST_REPEATS", 3)
    x = torch.cat([X, X.flip(0)])
    flashsae.fit(x, d_sae=16, k=3, progress=False)  # each ten times; a warning would be an error
    with pytest.warns(FlashSAEWarning, match="each comes about 10 times") as told:
        flashsae.fit(x, d_sae=16, k=3, tokens=10 * len(x), progress=False)
    assert [warning.filename for warning in told] == [__file__]  # the line that called, not one of ours


def test_arguments_of_another_kind_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^config: expected a flashsae\.TrainConfig, got dict\.$"):
        flashsae.fit(X, d_sae=16, k=3, config={"lr": 1e-3})  # type: ignore[arg-type]
    for path in ("acts.npy", tmp_path):
        with pytest.raises(DtypeError, match=r"got the path .* np\.load\(path, mmap_mode='r'\)"):
            flashsae.fit(path, d_sae=16, k=3, tokens=64)  # type: ignore[arg-type]


class Breaks:
    """Gives some batches and breaks."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        yield from X.split(64)[:3]
        raise RuntimeError("the source broke")


@pytest.mark.parametrize(
    "x",
    [X * float("nan"), X[:5], torch.ones(300, 8), X * 1e38, Breaks()],
    ids=["nan", "few", "equal", "large", "breaks"],
)
def test_a_run_that_fails_before_its_first_checkpoint_leaves_no_folder(x: torch.Tensor, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "run"
    with pytest.raises((DataError, ConfigError, RuntimeError)):
        flashsae.fit(x, d_sae=16, k=3, config=SMALL, run=run, progress=False)
    assert not run.exists()
    flashsae.fit(X, d_sae=16, k=3, config=replace(SMALL, tokens=128), run=run, progress=False)
    with pytest.raises(StorageError, match="exists already"):
        flashsae.fit(X, d_sae=16, k=3, config=SMALL, run=run, progress=False)
    assert (run / "metrics.jsonl").exists()


def test_a_folder_that_was_there_before_stays(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        flashsae.fit(X * float("nan"), d_sae=16, k=3, config=SMALL, run=tmp_path, resume=True, progress=False)
    assert tmp_path.exists()


@pytest.mark.parametrize("path", [3, b"x", "", "a\0b", "\ud800", "n" * 300, object()])
def test_what_is_no_path_is_told_in_a_sentence(path: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^run: (expected a path, got|File name too long)"):
        flashsae.fit(X, d_sae=16, k=3, config=SMALL, run=path, progress=False)
    sae = SAE(flashsae.SAEConfig(8, 16, 3))
    for use in (sae.save, SAE.load):
        with pytest.raises(ConfigError, match=r"^directory: (expected a path, got|File name too long)"):
            use(path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (X.to("meta"), DtypeError, "expected a tensor with data, got one on the device meta"),
        ([X.to("meta")], DtypeError, "expected a tensor with data, got one on the device meta"),
        (np.ma.masked_less(X.numpy(), 0), DataError, "got masked ones"),
        ([np.ma.masked_less(X.numpy(), 0)], DataError, "got masked ones"),
    ],
)
def test_arrays_that_hold_no_numbers_or_not_all_of_them_are_refused(
    x: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        flashsae.fit(x, d_sae=16, k=3, config=SMALL, progress=False)
    with pytest.raises(error, match=message):
        flashsae.evaluate(SAE(flashsae.SAEConfig(8, 16, 3)), x)


@pytest.mark.parametrize("name", ["progress", "resume"])
def test_yes_and_no_are_booleans(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: expected true or false, got 'no'"):
        flashsae.fit(X, d_sae=16, k=3, config=SMALL, **{name: "no"})  # type: ignore[arg-type]


def test_the_home_folder_has_its_short_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    sae = flashsae.fit(X, d_sae=16, k=3, config=SMALL, run="~/run", progress=False)
    sae.save("~/sae")
    assert _same(SAE.load("~/sae"), sae)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "sae"}


def test_what_no_machine_holds_is_refused_before_it_is_made() -> None:
    for changes, words in (({"d_sae": 10**11}, "d_sae: a training"), ({"shuffle_tokens": 10**12}, "shuffle_tokens: a")):
        settings = {"d_sae": 16, **changes}
        config = replace(SMALL, tokens=10**12, shuffle_tokens=settings.pop("shuffle_tokens", 256))
        with pytest.raises(ConfigError, match=rf"{words}.* GB"):
            flashsae.fit(list(X.split(64)), k=3, config=config, progress=False, **settings)


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        for value in ("1", "", "none"):
            monkeypatch.setenv(name, value)
            check_single_process()
        monkeypatch.setenv(name, "2")
        with pytest.raises(ConfigError, match=f"{name} is 2: a training is one process"):
            flashsae.fit(X, d_sae=16, k=3, config=SMALL, progress=False)
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    with pytest.raises(ConfigError, match="the size of the process group is 3"):
        check_single_process()


def test_batches_of_one_token_train() -> None:
    def fvu(tokens: int) -> float:
        config = TrainConfig(batch_tokens=1, tokens=tokens, lr=1e-2)
        return flashsae.evaluate(flashsae.fit(X, d_sae=16, k=3, config=config, progress=False), X).fvu

    assert fvu(200) < 0.8 * fvu(1)


def test_progress_begins_with_what_will_be_done(capsys: pytest.CaptureFixture[str]) -> None:
    flashsae.fit(X, d_sae=16, k=3, config=SMALL)
    said = capsys.readouterr().err
    assert "TopK, d_sae 16, k 3, d_in 8, on cpu: 1,920 tokens (each of the 640 in x about 3 times) in 30 steps" in said
    assert "shuffle buffer" not in said


@pytest.mark.parametrize(("tokens", "held"), [(150, 192), (64, 128), (1920, 256)])
def test_progress_begins_with_the_buffer_of_an_iterable(
    tokens: int, held: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(SMALL, tokens=tokens)
    shown = flashsae.fit(X.split(16), d_sae=16, k=3, config=config, run=tmp_path / "run")
    said = capsys.readouterr().err
    assert f"steps of 64. A shuffle buffer of {held} tokens is filled first. tokens= changes" in said
    assert said.index(f"shuffle buffer: 32 of {held} tokens\n") < said.index(f"shuffle buffer: {held} of {held} tokens")
    assert said.index(f"shuffle buffer: {held} of") < said.index("training: ")
    assert _same(shown, flashsae.fit(X.split(16), d_sae=16, k=3, config=config, progress=False))
    assert capsys.readouterr().err == ""
    flashsae.fit(X.split(16), d_sae=16, k=3, config=config, run=tmp_path / "run", resume=True)
    assert "shuffle buffer: " not in capsys.readouterr().err  # it is put back, not filled


def test_a_short_training_over_an_iterable_reads_no_more_than_it_trains_on_and_resumes(tmp_path: Path) -> None:
    config = replace(SMALL, tokens=190, shuffle_tokens=1 << 18, checkpoint_every_steps=1)
    read: list[int] = []

    class Data:
        def __iter__(self) -> Iterator[torch.Tensor]:
            for part in X[:80].split(16):
                read.append(len(part))
                yield part

    whole = flashsae.fit(Data(), d_sae=16, k=3, config=config, run=tmp_path / "run", progress=False)
    assert sum(read) == 192
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    assert sum(1 for _ in (tmp_path / "run" / "checkpoints").iterdir()) > 1
    shutil.rmtree(newest)
    resumed = flashsae.fit(Data(), d_sae=16, k=3, config=config, run=tmp_path / "run", resume=True, progress=False)
    assert _same(resumed, whole)
