"""The files of a run, moved to another place or changed by hand."""

from __future__ import annotations

import copy
import json
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import fields, replace
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from rich.console import Console

from flashsae import TopKSettings
from flashsae.architecture import architecture_named, architecture_names
from flashsae.data.cache import ActivationCache
from flashsae.data.shuffle import shuffled
from flashsae.errors import FlashSAEError
from flashsae.files.documents import SEAL, load_tensors, sealed
from flashsae.files.reading import sha256
from flashsae.logs.callback import Callback
from flashsae.logs.jsonl import make_line, read_log
from flashsae.metrics import METRICS, table
from flashsae.report import plots
from flashsae.report.evaluation_file import read_evaluation
from flashsae.report.render import render_report
from flashsae.report.snippet_file import read_snippets, write_snippets
from flashsae.run.execute import execute, new_run, show_plan
from flashsae.run.start import saved_config
from flashsae.sae.module import SAE
from flashsae.settings import ActivationsConfig, RunConfig
from flashsae.settings.run import load_settings
from flashsae.settings.toml import SEAL as TOML_SEAL
from flashsae.train import TrainConfig, train
from flashsae.train.state import init_state

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("files of a run")]
QUIET = Console(quiet=True)


class StopAt20(Callback):
    def on_step(self, step: int) -> None:
        if step == 20:
            raise KeyboardInterrupt


@pytest.fixture(autouse=True, scope="module")
def without_figures() -> Iterator[None]:
    """Draw nothing: figures are slow and have tests of their own."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("curve", "histogram", "dots"):
            patch.setattr(plots, name, lambda *_, **__: "<svg></svg>")
        yield


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, its cache, and a run that was stopped at step 20 of 32, 4 steps behind a checkpoint."""
    home = tmp_path_factory.mktemp("stopped") / "home"
    home.mkdir()
    (home / "text.txt").write_text("\n\n".join(f"the cat {i} sat on the mat and saw {i * i} mice" for i in range(40)))
    reading = {"dataset": str(home / "text.txt"), "hookpoint": "encoder.layer.0", "context_length": 16}
    settings: dict[str, Any] = {"d_sae": 48, "k": 4, "tokens": 1024, "batch_tokens": 32, "checkpoint_every_steps": 8}
    settings |= {"log_every_steps": 6, "evaluate_every_steps": 16, "device": "cpu"}
    config = RunConfig(ActivationsConfig(**reading, held_out=0.2), TrainConfig(**settings))
    run = new_run(config, home / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "flashsae.run.rounds.train",
            lambda *args, callbacks, **others: train(*args, callbacks=[*callbacks, StopAt20()], **others),
        )
        with pytest.raises(KeyboardInterrupt):
            execute(run, QUIET)
    return home


@pytest.fixture(scope="module")
def homes(stopped: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same, resumed where it was, and after all of it was moved."""
    place = tmp_path_factory.mktemp("moved") / "elsewhere" / "renamed"
    shutil.copytree(stopped, place)
    execute(stopped / "run", QUIET)
    there = stopped.rename(stopped.with_name("put away"))
    execute(place / "run", QUIET)
    return there, place


def test_a_run_that_was_moved_with_its_activations_ends_with_the_same_bytes(homes: tuple[Path, Path]) -> None:
    for path in ("sae/flashsae.json", "sae/flashsae.safetensors", "latents.safetensors", "snippets.json"):
        there, moved = ((home / "run" / path).read_bytes() for home in homes)
        assert there == moved, path
    (*_, newest) = sorted((homes[0] / "run" / "checkpoints").iterdir())
    for name in ("tensors.safetensors", "state.json"):
        there, moved = ((home / "run" / "checkpoints" / newest.name / name).read_bytes() for home in homes)
        assert there == moved, name
    figures = [json.loads((home / "run" / "evaluation.json").read_text()) for home in homes]
    of_time = {"train_seconds", "tokens_per_second", SEAL}
    assert [{name: value for name, value in each.items() if name not in of_time} for each in figures][1:] == [
        {name: value for name, value in figures[0].items() if name not in of_time}
    ]
    assert [path.name for path in (homes[1] / "activations").iterdir()] == [
        path.name for path in (homes[0] / "activations").iterdir()
    ]
    assert str(homes[1]) in (homes[1] / "run" / "config.toml").read_text()


def test_every_key_that_a_run_writes_is_a_metric_or_a_term_of_its_loss(homes: tuple[Path, Path]) -> None:
    run = homes[0] / "run"
    rows = table(term for name in architecture_names() for term in architecture_named(name).terms)
    logged = {name for record in read_log(run / "metrics.jsonl") for name in record}
    assert "held_out_fvu" in logged
    assert logged <= rows.keys()
    evaluation = read_evaluation(run / "evaluation.json")
    assert evaluation.keys() - {"architecture", "settings"} <= METRICS.keys()
    assert evaluation["architecture"] == "topk"
    assert evaluation["settings"]["k"] == 4
    assert evaluation["settings"].keys() == {each.name for each in fields(TopKSettings)}
    assert load_tensors(run / "latents.safetensors").keys() <= METRICS.keys()


def test_a_run_over_several_hookpoints_goes_on_with_its_cache_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its text and its model are not needed any more, wherever it and its cache lie now."""
    trained: list[list[str]] = []

    def stop(trainings: Any, *args: Any, **others: Any) -> None:
        trained.append([training.checkpoints.parent.name for training in trainings])
        raise KeyboardInterrupt

    monkeypatch.setattr("flashsae.run.rounds.train_together", stop)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    Path("text.txt").write_text("\n\n".join(f"the cat {i} sat on the mat" for i in range(40)))
    reading = ActivationsConfig(
        dataset="text.txt", hookpoint="encoder.layer.[01]", context_length=16, held_out=0.2, max_norm_ratio=100.0
    )
    new_run(RunConfig(reading, TrainConfig(48, k=4, tokens=128, batch_tokens=32, device="cpu")), Path("run"))
    with pytest.raises(KeyboardInterrupt):
        execute(Path("run"), QUIET)
    assert saved_config(Path("run")).activations.activations is not None
    Path("text.txt").unlink()
    moved = home.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("flashsae.data.open.LanguageModelSource", lambda *_, **__: pytest.fail("loaded"))
    show_plan(saved_config(moved / "run"), moved / "run", QUIET)
    with pytest.raises(KeyboardInterrupt):
        execute(moved / "run", QUIET)
    assert trained == [["encoder.layer.0", "encoder.layer.1"]] * 2
    assert len(list((moved / "activations").iterdir())) == 1


MISSING = object()
WRONG = (MISSING, None, "x", 7, -1, 0.5, 10**400, [1], {"a": 1}, True)


def edits(content: Any, wrongs: tuple[object, ...]) -> Iterator[tuple[str, Any]]:
    """Yield content with one place of it changed, in each way; of a list only its first item."""

    def places(value: Any, above: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
        keys: Any = value if isinstance(value, dict) else range(min(1, len(value))) if isinstance(value, list) else ()
        for key in keys:
            yield (*above, key)
            yield from places(value[key], (*above, key))

    for *above, last in places(content, ()):
        for wrong in wrongs:
            edited = copy.deepcopy(content)
            parent = reduce(lambda value, key: value[key], above, edited)
            if repr(parent[last]) == repr(wrong):
                continue
            if wrong is MISSING:
                del parent[last]
            else:
                parent[last] = wrong
            yield f"{[*above, last]} = {'nothing' if wrong is MISSING else str(wrong)[:20]}", edited


def check_edits(
    path: Path,
    content: Any,
    write: Callable[[Any, bool], None],
    read: Callable[[], object],
    *,
    may_pass: str = "",
    wrongs: tuple[object, ...] = WRONG,
    settle: Callable[[], object] = lambda: None,
) -> None:
    """Change each field of a file, with its checksum made anew and without, and see that reading works or is refused.

    Args:
        path: the file, put back in the end.
        content: of it.
        write: called with a changed content and whether to make the checksum anew.
        read: reads the file and all that depends on it.
        wrongs: what to put in the place of each field.
        settle: puts back what else was written.
        may_pass: name of a field that may be changed without notice: a checksum that is taken out.
    """
    before = path.read_bytes()
    faults, told = [], 0
    for what, edited in edits(content, wrongs):
        for is_sealed in (True, False):  # without the checksum only what is not refused anyway, to be quick
            write(edited, is_sealed)
            try:
                read()
            except FlashSAEError as error:
                told += 1
                if "\n" in str(error):
                    faults.append(f"{what}: told in several lines: {error}")
                break
            except Exception as error:
                faults.append(f"{what}: {error!r}")
            else:
                if not is_sealed and not (may_pass and may_pass in what):
                    faults.append(f"{what}: not noticed")
    path.write_bytes(before)
    settle()
    assert not faults, f"{len(faults)} of {path.name}:\n" + "\n".join(map(str, faults[:40]))
    assert told > 20
    read()


@pytest.fixture(scope="module")
def run(homes: tuple[Path, Path]) -> Path:
    """A finished run, with the texts of two latents only, to be quick."""
    run = homes[1] / "run"
    snippets = read_snippets(run / "snippets.json")
    write_snippets(run / "snippets.json", replace(snippets, latents=snippets.latents[:2]))
    return run


def as_json(path: Path) -> tuple[Any, Callable[[Any, bool], None]]:
    """Return the content of a file with a checksum in it, and what writes another."""
    content = json.loads(path.read_text())

    def write(edited: Any, is_sealed: bool) -> None:
        path.write_text(json.dumps(sealed(edited) if is_sealed else edited))

    return content, write


@pytest.mark.parametrize("name", ["evaluation.json", "snippets.json"])
def test_any_change_of_what_the_report_reads_is_drawn_or_refused(name: str, run: Path) -> None:
    path = run / name
    check_edits(path, *as_json(path), lambda: render_report(run), may_pass=f"['{SEAL}'] = nothing")


def test_any_change_of_a_saved_sae_is_loaded_or_refused(run: Path) -> None:
    path = run / "sae" / "flashsae.json"
    check_edits(path, *as_json(path), lambda: SAE.load(run / "sae"), may_pass=f"['{SEAL}'] = nothing")


@pytest.mark.parametrize("number", [0, -1])
def test_any_change_of_the_log_is_drawn_or_refused(number: int, run: Path) -> None:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines()
    record = json.loads(lines[number])

    def write(edited: Any, is_sealed: bool) -> None:
        records = [json.loads(line) for line in lines]
        records[number] = edited
        if not is_sealed:
            path.write_text("".join(json.dumps(each) + "\n" for each in records))
            return
        checksum, text = 0, ""
        for each in records:
            line, checksum = make_line({name: value for name, value in each.items() if name != SEAL}, checksum)
            text += line + "\n"
        path.write_text(text)

    check_edits(path, record, write, lambda: render_report(run))


@pytest.mark.parametrize("kept", [0, 1, -1])
def test_lines_that_are_missing_at_the_end_of_the_log_are_noticed(kept: int, run: Path) -> None:
    path = run / "metrics.jsonl"
    before = path.read_text()
    path.write_text("".join(before.splitlines(keepends=True)[:kept]))
    try:
        with pytest.raises(FlashSAEError, match="does not end with step 32, the last one of the training"):
            render_report(run)
    finally:
        path.write_text(before)


def test_any_change_of_a_checkpoint_is_resumed_or_refused(run: Path) -> None:
    config = saved_config(run)
    assert config.activations.activations is not None
    source = ActivationCache(config.activations.activations, "encoder.layer.0", config.activations.held_out)
    settings = config.train.resolve(source.d_in)
    (*_, folder) = sorted((run / "checkpoints").iterdir())

    batches = shuffled(source, settings.batch_tokens, seed=settings.seed, buffer_tokens=settings.shuffle_tokens)

    def resume() -> None:
        init_state(settings, batches, torch.device("cpu"), run / "checkpoints").batches.next_batch()

    manifest, write_manifest = as_json(folder / "manifest.json")
    check_edits(folder / "manifest.json", manifest, write_manifest, resume)

    def write_state(edited: Any, is_sealed: bool) -> None:
        (folder / "state.json").write_text(json.dumps(edited))
        sums = {**manifest["sha256"], "state.json": sha256(folder / "state.json")}
        write_manifest({**manifest, "sha256": sums} if is_sealed else manifest, is_sealed)

    before = (folder / "manifest.json").read_bytes()
    state = json.loads((folder / "state.json").read_text())
    try:
        check_edits(folder / "state.json", state, write_state, resume, settle=lambda: write_manifest(manifest, True))
    finally:
        (folder / "manifest.json").write_bytes(before)


def test_any_change_of_the_settings_is_resumed_with_or_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: object) -> None:
        raise InterruptedError

    monkeypatch.setattr(
        "flashsae.run.execute._evaluate", stop
    )  # what comes then reads few of the settings, and takes long
    path = run / "config.toml"
    first_line = path.read_text().partition("\n")[0]

    def write(edited: Any, is_sealed: bool) -> None:
        text = tomli_w.dumps(edited)
        path.write_text((f"{TOML_SEAL}{zlib.crc32(text.encode())}" if is_sealed else first_line) + "\n" + text)

    def resume() -> None:
        with suppress(InterruptedError):
            execute(run, QUIET)

    check_edits(path, load_settings(path), write, resume, wrongs=tuple(wrong for wrong in WRONG if wrong is not None))
