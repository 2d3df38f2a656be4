"""One run from nothing to a report: what `flashsae train` does. Each stage can be killed anywhere and is gone on with.

RUN/config.toml          the settings, all of them
RUN/metrics.jsonl        the log
RUN/checkpoints/         the newest state of the training
RUN/sae/                 the trained SAE
RUN/evaluation.json      held-out figures; latents.safetensors: a value for each latent
RUN/snippets.json        the texts that activate some latents most
RUN/report.html          all of it to look at
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flashsae import files
from flashsae.architecture import architecture_of
from flashsae.backend import resolve_device
from flashsae.data.acts import Batch, only_site
from flashsae.data.cache import ActivationCache
from flashsae.data.hookpoints import folder_of
from flashsae.data.open import Activations, Prepared, prepare_activations
from flashsae.data.shuffle import shuffled
from flashsae.data.sources import Source
from flashsae.documents import save_tensors_atomic
from flashsae.evaluate import evaluate, held_out_batches, inference, latent_geometry
from flashsae.logs.callback import Warn
from flashsae.logs.jsonl import LOG_FILE, JsonlLog, read_log
from flashsae.logs.progress import ProgressBar, StageBar, filling
from flashsae.logs.trackers import build_logger
from flashsae.metrics import METRICS, LatentActivity, is_dead
from flashsae.report.evaluation_file import RunEvaluation, write_evaluation
from flashsae.report.render import render_report
from flashsae.report.snippets import collect_snippets, write_snippets
from flashsae.report.summary import final_figures
from flashsae.report.tokens import token_text
from flashsae.sae.module import SAE, SparseCode
from flashsae.settings.run import CONFIG_FILE, RunConfig
from flashsae.start import begun, check, check_rows, nothing_held_out, plan_table, table
from flashsae.start import new_run as new_run
from flashsae.train.checkpoint import list_checkpoints, load_checkpoint
from flashsae.train.config import TrainConfig
from flashsae.train.loop import train
from flashsae.train.state import init_state

MEASURE_TOKENS = 8192
EVALUATION_TOKENS = 1 << 18
SNIPPET_TOKENS = 150_000
FEW_TOKENS = 1000
"""Held-out figures of fewer are told with their number."""


def execute(run: Path, console: Console) -> None:
    """Do all of a run that is not done yet.

    Args:
        run: a folder that `new_run` made.
        console: for plan, progress and result.
    Raises:
        FlashSAEError: says what to do; everything written before is intact.
    """
    config = begun(run)
    check(config)
    with files.only_one(run):
        files.clear_leftovers(run)
        _execute(run, config, console)


def _execute(run: Path, config: RunConfig, console: Console) -> None:
    prepared = _prepare(config, run)
    console.print(plan_table(config, prepared, run))
    opened = _open(prepared, config, console)
    for warning in opened.warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}", highlight=False, soft_wrap=True)
    resolved = {hookpoint: _resolved(config, prepared, hookpoint) for hookpoint in opened.sources}
    settled = replace(config, activations=prepared.config)
    del prepared  # with it goes a language model whose activations are cached
    if len(opened.sources) == 1:
        ((hookpoint, source),) = opened.sources.items()
        _execute_one(run, resolved[hookpoint], source, opened, console)
        return
    files.write_atomic(run / CONFIG_FILE, settled.to_toml())
    for hookpoint, source in opened.sources.items():
        part, one = run / folder_of(hookpoint), resolved[hookpoint]
        if not part.exists():
            new_run(one, part)
        console.rule(hookpoint)
        _execute_one(part, one, source, opened, console)


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
    prepared = _prepare(config, run)
    shown = plan_table(config, prepared, run)
    check_rows(config, prepared)
    console.print(shown)


def draw_report(run: Path, console: Console) -> list[Path]:
    """Draw the report of a finished run, or of each part of a run over several hookpoints, again.

    Args:
        run: a folder that `flashsae train` made.
        console: for the progress of what has to be read again, if the run ended without a report.
    Raises:
        CheckpointError: the run is not finished, or something in it is damaged.
    """
    config = begun(run)
    parts = sorted(path.parent for path in run.glob(f"*/{CONFIG_FILE}"))
    if parts:
        return [path for part in parts for path in draw_report(part, console)]
    if (run / "evaluation.json").exists() and not (run / "snippets.json").exists():
        opened = _open(_prepare(config, run), config, console)
        ((hookpoint, _),) = opened.sources.items()
        sae = SAE.load(run / "sae", device=resolve_device(config.train.device))
        _describe_latents(run, sae, hookpoint, opened, console, _dead_at_the_end(run))
    return [render_report(run)]


def _prepare(config: RunConfig, run: Path) -> Prepared:
    has_parts = any(run.glob(f"*/{CONFIG_FILE}"))
    return prepare_activations(
        config.activations,
        tokens=config.train.tokens,
        folder=run.parent / "activations",
        device=str(resolve_device(config.train.device)),
        is_checked=(run / LOG_FILE).exists() or has_parts,
    )


def _open(prepared: Prepared, config: RunConfig, console: Console) -> Activations:
    bar = StageBar(console, "activations", "tokens")

    def on_progress(rows: int) -> None:
        if not bar.is_started:
            bar.start(0, int(config.train.tokens / (1 - config.activations.held_out)))
        bar.update(rows)

    try:
        return prepared.compute(on_progress)
    finally:
        bar.stop()


def _resolved(config: RunConfig, prepared: Prepared, hookpoint: str) -> RunConfig:
    """Return the settings with every value worked out: running them again does the same."""
    settings = config.train.resolve(prepared.widths[hookpoint])
    return replace(config, activations=replace(prepared.config, hookpoint=hookpoint), train=settings)


def _execute_one(run: Path, config: RunConfig, source: Source, opened: Activations, console: Console) -> None:
    """Train, measure and describe one SAE; `config` is resolved."""
    files.write_atomic(run / CONFIG_FILE, config.to_toml())
    settings = config.train.resolve(only_site(source.widths))
    device = resolve_device(settings.device)
    hookpoint = config.activations.hookpoint or ""
    most, tokens = settings.shuffle_tokens, settings.tokens
    batches = shuffled(source, settings.batch_tokens, seed=settings.seed, buffer_tokens=most, tokens=tokens)
    held_out = list(held_out_batches(source, MEASURE_TOKENS))
    if not held_out:
        raise nothing_held_out(source, config)
    with filling(console) as on_fill:
        state = init_state(settings, batches, device, run / "checkpoints", on_fill)
    loggers = [build_logger(name, run, settings.flat()) for name in config.logger]
    sae = train(
        state,
        settings,
        callbacks=[Warn(lambda message: _warn(console, message)), JsonlLog(run), ProgressBar(console), *loggers],
        checkpoints=run / "checkpoints",
        measure=lambda sae: _measure(sae, held_out),
    )
    dead = state.dead.mask()
    del state  # its memory may be needed for the whole weights
    sae = sae.to(device)
    metadata = {"model": config.activations.model, "hookpoint": hookpoint, "train": settings.flat()}
    sae.save(run / "sae", metadata=metadata, overwrite=True)
    with console.status("evaluating on held-out tokens"):
        result = _evaluate(run, sae, source, settings)
    if config.report:
        _describe_latents(run, sae, hookpoint, opened, console, dead)
        with console.status("drawing the report"):
            render_report(run)
    console.print(_result_table(result))
    for name, path in (("SAE", run / "sae"), *([("report", run / "report.html")] if config.report else [])):
        console.print(f"{name}: {path.resolve()}", highlight=False, soft_wrap=True)


def _warn(console: Console, message: str) -> None:
    console.print(f"[bold yellow]Warning:[/] {escape(message)}", highlight=False, soft_wrap=True)


def _measure(sae: SAE, held_out: list[Batch]) -> dict[str, float]:
    """Return held-out figures for a line of the log."""
    evaluation = evaluate(sae, held_out)
    without = {"held_out_fvu_without_outliers": evaluation.fvu_without_outliers} if evaluation.outliers else {}
    return {"held_out_fvu": evaluation.fvu, **without}


def _evaluate(run: Path, sae: SAE, source: Source, settings: TrainConfig) -> dict[str, Any]:
    """Measure on held-out tokens and write evaluation.json."""
    evaluation = evaluate(sae, held_out_batches(source, EVALUATION_TOKENS))
    log = [record for record in read_log(run / LOG_FILE) if "tokens_per_second" in record]
    before = [0.0, *(record["tokens"] for record in log)]
    seconds = sum((r["tokens"] - start) / r["tokens_per_second"] for start, r in zip(before, log))
    result = RunEvaluation(
        fvu=evaluation.fvu,
        fvu_without_outliers=evaluation.fvu_without_outliers,
        outliers=evaluation.outliers,
        l0=evaluation.l0,
        dead_latents=int(log[-1]["dead_latents"]),
        d_in=settings.d_in,
        d_sae=settings.d_sae,
        architecture=architecture_of(settings.arch).name,
        settings=asdict(settings.arch),
        held_out_tokens=evaluation.tokens,
        train_tokens=int(log[-1]["tokens"]),
        steps=log[-1]["step"],
        train_seconds=seconds,
        tokens_per_second=log[-1]["tokens"] / seconds,
    )
    write_evaluation(run / "evaluation.json", result)
    return asdict(result)


@torch.no_grad()
def _describe_latents(
    run: Path, sae: SAE, hookpoint: str, opened: Activations, console: Console, dead: torch.Tensor | None
) -> None:
    """Write what the report says of single latents: latents.safetensors and snippets.json.

    `dead` is [d_sae], bool, at the end of training, None where it is not known any more.
    """
    activity = LatentActivity(sae.config.d_sae, sae.W_dec.device)
    source = opened.sources[hookpoint]
    bar = StageBar(console, "texts of each latent", "tokens")
    bar.start(0, min(SNIPPET_TOKENS, source.n_rows) if isinstance(source, ActivationCache) else SNIPPET_TOKENS)

    def encode(batch: Batch) -> SparseCode:
        code = sae.encode(only_site(batch).to(sae.W_dec.device, sae.W_dec.dtype))
        activity.update(code)
        bar.update(activity.tokens)
        return code

    try:
        with inference(sae):
            snippets = collect_snippets(
                encode,
                opened.text_chunks(hookpoint, "held_out"),
                token_text(opened.tokenizer()),
                training=opened.text_chunks(hookpoint, "train"),
                max_tokens=SNIPPET_TOKENS,
            )
        bar.finish()
    finally:
        bar.stop()
    counted = {"latent_density": activity.latent_density().float().cpu()}
    if dead is not None:
        counted["is_dead"] = dead.cpu()
    save_tensors_atomic(run / "latents.safetensors", counted | latent_geometry(sae))
    write_snippets(run / "snippets.json", snippets)


def _dead_at_the_end(run: Path) -> torch.Tensor | None:
    """Return which latents the newest checkpoint of a finished run calls dead: [d_sae], bool; None without one."""
    found = list_checkpoints(run / "checkpoints")
    if not found:
        return None
    checkpoint = load_checkpoint(found[-1])
    return is_dead(checkpoint.tensors["dead.tokens_since_fired"], checkpoint.state["config"]["dead_after_tokens"])


def _result_table(result: dict[str, Any]) -> Table:
    figures = final_figures(result)
    lines = {figure.name: figure.line() for figure in figures}
    if result["held_out_tokens"] < FEW_TOKENS:
        row = METRICS["held_out_tokens"]
        lines[figures[0].name] += f", on {row.show(result[row.name])} {row.label}"
    return table("Result", lines)
