"""One run from nothing to reports: what `flashsae train` does. Each stage can be killed anywhere and resumed.

RUN/config.toml          the settings, all of them
RUN/metrics.jsonl        the log
RUN/checkpoints/         the newest state of the training
RUN/sae/                 the trained SAE
RUN/evaluation.json      held-out figures; latents.safetensors: a value for each latent
RUN/snippets.json        the texts that activate some latents most
RUN/report.html          all of it to look at
RUN/saelens/ ...         the trained SAE for other libraries, as --export names them

A run of several SAEs has such a folder for each, RUN/<what differs>, and beside them its settings, the place in the
data that they share in RUN/checkpoints, and RUN/comparison.html.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from flashsae.backend import resolve_device
from flashsae.data.cache import ActivationCache
from flashsae.data.images import Pictures
from flashsae.data.prepared import Activations, Prepared
from flashsae.data.sources import Chunk, RowSource
from flashsae.data.split import Split
from flashsae.errors import ConfigError, DivergedError
from flashsae.evaluate import evaluate_together, held_out_batches
from flashsae.files import atomic
from flashsae.formats.registry import format_named
from flashsae.logs.progress import StageBar
from flashsae.metrics import is_dead as dead_mask
from flashsae.report.comparison import comparison_table, render_comparison
from flashsae.report.evaluation_file import RunEvaluation, write_evaluation
from flashsae.report.latents import Described, describe_latents
from flashsae.report.render import render_report
from flashsae.report.summary import result_lines
from flashsae.report.tokens import token_text
from flashsae.run.ending import SAE_FOLDER, add_metrics, figures_of, is_done, metadata_of
from flashsae.run.exporting import check_held, export_one, export_set, is_exported_alone
from flashsae.run.parts import (
    CHECKPOINTS,
    Part,
    begun_apart,
    most_tokens,
    part_folders,
    planned_saes,
    rounds_of,
    settled,
    write_parts,
)
from flashsae.run.planning import plan_table, table
from flashsae.run.rounds import Trained, train_alone, train_side_by_side
from flashsae.run.start import check, check_rows, check_whole, has_ended, prepare, saved_config
from flashsae.run.start import new_run as new_run
from flashsae.sae.module import SAE
from flashsae.settings.run import CONFIG_FILE, RunConfig, load_settings
from flashsae.train.checkpoint import list_checkpoints, load_checkpoint
from flashsae.train.failure import failure_in

EVALUATION_TOKENS = 1 << 18
SNIPPET_TOKENS = 150_000


def execute(run: Path, console: Console) -> dict[str, str]:
    """Do all of a run that is not done yet.

    Args:
        run: a folder that `new_run` made.
        console: for plan, progress and result.
    Returns:
        why SAEs of several failed, by their names; an SAE that is the only one raises.
    Raises:
        FlashSAEError: says what to do; everything written before is intact.
    """
    config = saved_config(run)
    check_whole(run)
    check(config)
    with atomic.only_one(run):
        atomic.clear_leftovers(run)
        is_over = has_ended(config, run)
        rounds = _rounds(run, config, console)
        if is_over:
            console.print(
                "Nothing is left to train: --extend TOKENS goes on from the end of this run.", highlight=False
            )
        several = sum(map(len, rounds)) > 1
        for number, parts in enumerate(rounds, 1):
            if len(rounds) > 1:
                console.rule(f"round {number} of {len(rounds)}")
            place = run / CHECKPOINTS / (f"round-{number}" if len(rounds) > 1 else "")
            _finish(parts, _trained(parts, place, console), console)
        parts = [part for each in rounds for part in each]
        _export_sets(run, parts, console)
        if several:
            _compare(run, parts, console, has_page=config.report)
        return _failures(parts)


def show_plan(config: RunConfig, run: Path, console: Console) -> None:
    """Print what a run with these settings will do and need; make nothing.

    Args:
        config: the settings.
        run: its folder, which need not exist.
        console: to print on.
    Raises:
        FlashSAEError: as `execute`, as far as it can be told before the long work.
    """
    check(config)
    prepared = prepare(config, run)
    shown = plan_table(config, prepared, run)
    check_rows(config, prepared)
    check_held(config.export, {one.name: (one.train, metadata_of(one)) for one in planned_saes(config, prepared)})
    console.print(shown)


def draw_report(run: Path, console: Console) -> list[Path]:
    """Draw the report of a finished run, or of each SAE of several and the page that compares them, again.

    Args:
        run: a folder that `flashsae train` made.
        console: for the progress of what has to be read again, if the run ended without a report.
    Raises:
        CheckpointError: the run is not finished, or something in it is damaged.
    """
    load_settings(run / CONFIG_FILE)
    folders = part_folders(run)
    if folders:
        drawn = [path for folder in folders if failure_in(folder) is None for path in draw_report(folder, console)]
        return [*drawn, render_comparison(run, folders)]
    if (run / "evaluation.json").exists() and not (run / "snippets.json").exists():
        config = saved_config(run)
        prepared = prepare(config, run)
        (planned,) = planned_saes(config, prepared)
        part = Part(planned, run, _compute(prepared, config, console))
        sae = SAE.load(run / "sae", device=resolve_device(config.train.device))
        _describe([(part, sae, _dead_at_the_end(run))], console)
    return [render_report(run)]


def _rounds(run: Path, config: RunConfig, console: Console) -> list[list[Part]]:
    """Print the plan, get the activations, and return the SAEs of a run, each with its folder and settings written."""
    prepared = prepare(config, run)
    console.print(plan_table(config, prepared, run))
    planned = planned_saes(config, prepared)
    at_once = 1 if begun_apart(run, planned) else config.at_once
    rounds = rounds_of(planned, at_once, is_streamed=prepared.is_streamed and at_once == config.at_once)
    check_held(config.export, {one.name: (one.train, metadata_of(one)) for one in planned})
    activations = _compute(prepared, config, console)
    if len(planned) > 1:
        atomic.write_atomic(run / CONFIG_FILE, settled(config, prepared).to_toml())
    for warning in activations.warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}", highlight=False, soft_wrap=True)
    del prepared  # with it goes a language model whose activations are cached
    return [write_parts(run, each, activations) for each in rounds]


def _compute(prepared: Prepared, config: RunConfig, console: Console) -> Activations:
    """Do the long work of caching, if there is any."""
    bar = StageBar(console, "activations", "tokens")

    def on_progress(rows: int) -> None:
        if not bar.is_started:
            bar.start(0, int(most_tokens(config) / (1 - config.activations.held_out)))
        bar.update(rows)

    try:
        return prepared.compute(on_progress)
    finally:
        bar.stop()


def _trained(parts: Sequence[Part], place: Path, console: Console) -> list[Trained]:
    """Train the SAEs of a round and save them, but for those that fail among several of the run."""
    (first, *others) = parts
    if others:
        return train_side_by_side(parts, place, console)
    if first.failure() is not None:
        return []
    try:
        return [train_alone(first, console)]
    except DivergedError as error:
        if not first.planned.name:
            raise
        first.fail(error)
        console.print(f"[bold yellow]Warning:[/] {escape(f'{first.planned.name} failed: {error}')}", soft_wrap=True)
        return []


def _finish(parts: Sequence[Part], trained: Sequence[Trained], console: Console) -> None:
    """Measure and describe the SAEs of a round, those of a stream in one reading, and print what came out."""
    to_do = [each for each in trained if each.is_new or not each.part.planned.name or not is_done(each.part)]
    if not to_do:
        return
    for each in to_do:
        with atomic.storage_errors(each.part.folder):
            (each.part.folder / "report.html").unlink(missing_ok=True)  # of fewer tokens, where the run was extended
    found, config = _evaluate(to_do, console), parts[0].config
    if config.report:
        is_stream = not isinstance(parts[0].source, RowSource)
        for some in [to_do] if is_stream else [[each] for each in to_do]:
            _describe([(each.part, each.sae, each.is_dead) for each in some], console)
    for each, evaluation in zip(to_do, found):
        add_metrics(each.part, evaluation)
        _export(each.part, console)
        write_evaluation(each.part.folder / "evaluation.json", evaluation)  # behind all that it says to be done
    if config.report:
        with console.status("drawing the reports"):
            for each in to_do:
                render_report(each.part.folder)
    for each, evaluation in zip(to_do, found):
        _print_result(each.part, asdict(evaluation), console)


def _export(part: Part, console: Console) -> None:
    """Write an SAE for other libraries; what only its numbers stand against is told, and the run goes on."""
    for name in part.config.export:
        try:
            export_one(part.folder, [name])
        except ConfigError as error:
            console.print(f"[bold yellow]Warning:[/] {escape(f'{name}: not written: {error}')}", soft_wrap=True)


def _failures(parts: Sequence[Part]) -> dict[str, str]:
    """Return why SAEs failed, by their names."""
    return {part.planned.name: error for part in parts if (error := part.failure()) is not None}


def _export_sets(run: Path, parts: Sequence[Part], console: Console) -> None:
    """Write what other libraries have in one folder of all SAEs of a model; not if one of them is missing."""
    names = parts[0].config.export
    failed = _failures(parts)
    if failed and not is_exported_alone(names):
        told = f"no set was exported, since {', '.join(failed)} failed."
        console.print(f"[bold yellow]Warning:[/] {escape(told)}", soft_wrap=True)
        return
    for place in export_set(run, [part.folder for part in parts], names):
        console.print(f"{place.name}: {place.resolve()}", highlight=False, soft_wrap=True)


def _evaluate(trained: Sequence[Trained], console: Console) -> list[RunEvaluation]:
    """Measure on held-out tokens."""
    parts = [each.part for each in trained]
    source = parts[0].activations.of([part.planned.reads for part in parts])
    with console.status("evaluating on held-out tokens"):
        found = evaluate_together(
            [each.sae for each in trained],
            [part.sites for part in parts],
            held_out_batches(source, EVALUATION_TOKENS),
        )
    return [figures_of(part, evaluation) for part, evaluation in zip(parts, found)]


def _describe(saes: Sequence[tuple[Part, SAE, torch.Tensor | None]], console: Console) -> None:
    """Write what the reports say of single latents, of SAEs and which of their latents are dead, in one reading."""
    activations = saes[0][0].activations
    source = activations.of([part.planned.reads for part, _, _ in saes])
    tokenizer = activations.tokenizer()
    shown, unit = ("images", "patches") if isinstance(tokenizer, Pictures) else ("texts", "tokens")
    bar = StageBar(console, f"{shown} of each latent", unit)
    bar.start(0, min(SNIPPET_TOKENS, source.n_rows) if isinstance(source, ActivationCache) else SNIPPET_TOKENS)

    def chunks(split: Split) -> Iterator[Chunk]:
        return (chunk for chunk, _ in source.chunks(split))

    try:
        describe_latents(
            [Described(part.folder, sae, part.sites, is_dead) for part, sae, is_dead in saes],
            {split: chunks(split) for split in ("held_out", "train")},
            tokenizer if isinstance(tokenizer, Pictures) else token_text(tokenizer),
            max_tokens=SNIPPET_TOKENS,
            on_progress=bar.update,
        )
        bar.finish()
    finally:
        bar.stop()


def _dead_at_the_end(run: Path) -> torch.Tensor | None:
    """Return which latents the newest checkpoint of a finished run calls dead: [d_sae], bool; None without one."""
    found = list_checkpoints(run / CHECKPOINTS)
    if not found:
        return None
    checkpoint = load_checkpoint(found[-1])
    return dead_mask(checkpoint.tensors["dead.tokens_since_fired"], checkpoint.state["config"]["dead_after_tokens"])


def _print_result(part: Part, result: dict[str, Any], console: Console) -> None:
    if part.planned.name:
        console.rule(part.planned.name)
    console.print(table("Result", result_lines(result)))
    made = {"SAE": part.folder / SAE_FOLDER}
    made |= {name: part.folder / name for name in part.config.export if not format_named(name).is_whole}
    made |= {"report": part.folder / "report.html"} if part.config.report else {}
    for name, path in made.items():
        console.print(f"{name}: {path.resolve()}", highlight=False, soft_wrap=True)


def _compare(run: Path, parts: Sequence[Part], console: Console, *, has_page: bool) -> None:
    """Print the SAEs of a run beside each other, and draw the page that compares them."""
    folders = [part.folder for part in parts]
    console.rule(f"{len(parts)} SAEs")
    console.print(comparison_table(folders))
    if has_page:
        page = render_comparison(run, folders)
        console.print(f"comparison: {page.resolve()}", highlight=False, soft_wrap=True)
