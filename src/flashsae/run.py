"""One run from nothing to a report: what `flashsae train` does. Each stage can be killed anywhere and resumed.

RUN/config.toml          the settings, all of them
RUN/metrics.jsonl        the log
RUN/checkpoints/         the newest state of the training
RUN/sae/                 the trained SAE
RUN/evaluation.json      held-out figures; latents.safetensors: a value for each latent
RUN/snippets.json        the texts that activate some latents most
RUN/report.html          all of it to look at
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from flashsae import files
from flashsae.architecture import architecture_of
from flashsae.backend import resolve_device
from flashsae.data.acts import Batch
from flashsae.data.cache import ActivationCache
from flashsae.data.open import Activations, Prepared
from flashsae.data.shuffle import shuffled
from flashsae.data.sources import Source
from flashsae.evaluate import evaluate, held_out_batches
from flashsae.lm.hookpoints import folder_of
from flashsae.logs.callback import Warn
from flashsae.logs.jsonl import LOG_FILE, JsonlLog, read_log
from flashsae.logs.progress import ProgressBar, StageBar, filling
from flashsae.logs.trackers import build_logger
from flashsae.metrics import is_dead as dead_mask
from flashsae.report.evaluation_file import RunEvaluation, write_evaluation
from flashsae.report.latents import describe_latents
from flashsae.report.render import render_report
from flashsae.report.summary import result_lines
from flashsae.report.tokens import token_text
from flashsae.sae.module import SAE
from flashsae.settings.kinds import as_json
from flashsae.settings.run import CONFIG_FILE, RunConfig, load_settings
from flashsae.start import check, check_rows, nothing_held_out, plan_table, prepare, saved_config, table
from flashsae.start import new_run as new_run
from flashsae.train.checkpoint import list_checkpoints, load_checkpoint
from flashsae.train.loop import train
from flashsae.train.state import init_state

MEASURE_TOKENS = 8192
EVALUATION_TOKENS = 1 << 18
SNIPPET_TOKENS = 150_000


@dataclass(frozen=True)
class _Part:
    """One SAE of a run.

    Args:
        folder: where it goes: the folder of the run, or one in it where the run has several.
        config: its settings, every value worked out: running them again does the same.
        activations: those of all SAEs of the run.
    """

    folder: Path
    config: RunConfig
    activations: Activations

    @property
    def hookpoint(self) -> str:
        """Where its activations are taken: one hookpoint, or several with commas between them."""
        return self.config.activations.hookpoint

    @property
    def source(self) -> Source:
        """Its activations."""
        return self.activations.sources[self.hookpoint]


def execute(run: Path, console: Console) -> None:
    """Do all of a run that is not done yet.

    Args:
        run: a folder that `new_run` made.
        console: for plan, progress and result.
    Raises:
        FlashSAEError: says what to do; everything written before is intact.
    """
    config = saved_config(run)
    check(config)
    with files.only_one(run):
        files.clear_leftovers(run)
        for part in _parts(run, config, console):
            sae, is_dead = _train(part, console)
            result = _evaluate(part, sae, console)
            if config.report:
                _describe_latents(part, sae, is_dead, console)
                with console.status("drawing the report"):
                    render_report(part.folder)
            _print_result(part, result, console)


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
    console.print(shown)


def draw_report(run: Path, console: Console) -> list[Path]:
    """Draw the report of a finished run, or of each part of a run over several hookpoints, again.

    Args:
        run: a folder that `flashsae train` made.
        console: for the progress of what has to be read again, if the run ended without a report.
    Raises:
        CheckpointError: the run is not finished, or something in it is damaged.
    """
    load_settings(run / CONFIG_FILE)
    parts = sorted(path.parent for path in run.glob(f"*/{CONFIG_FILE}"))
    if parts:
        return [path for part in parts for path in draw_report(part, console)]
    if (run / "evaluation.json").exists() and not (run / "snippets.json").exists():
        config = saved_config(run)
        activations = _compute(prepare(config, run), config, console)
        sae = SAE.load(run / "sae", device=resolve_device(config.train.device))
        _describe_latents(_Part(run, config, activations), sae, _dead_at_the_end(run), console)
    return [render_report(run)]


def _parts(run: Path, config: RunConfig, console: Console) -> Iterator[_Part]:
    """Print the plan, get the activations, and yield the SAEs of a run, each with its folder and settings written."""
    prepared = prepare(config, run)
    console.print(plan_table(config, prepared, run))
    activations = _compute(prepared, config, console)
    for warning in activations.warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}", highlight=False, soft_wrap=True)
    reading, widths = prepared.config, prepared.widths
    del prepared  # with it goes a language model whose activations are cached
    is_alone = len(activations.sources) == 1
    if not is_alone:
        files.write_atomic(run / CONFIG_FILE, replace(config, activations=reading).to_toml())
    for hookpoint in activations.sources:
        train_config = config.train.resolve(widths[hookpoint])
        if train_config.init_from is not None and not is_alone:
            train_config = replace(train_config, init_from=train_config.init_from / folder_of(hookpoint))
        resolved = replace(config, activations=replace(reading, hookpoint=hookpoint), train=train_config)
        folder = run if is_alone else run / folder_of(hookpoint)
        if folder.exists():
            files.write_atomic(folder / CONFIG_FILE, resolved.to_toml())
        else:
            new_run(resolved, folder)
        if not is_alone:
            console.rule(hookpoint)
        yield _Part(folder, resolved, activations)


def _compute(prepared: Prepared, config: RunConfig, console: Console) -> Activations:
    """Do the long work of caching, if there is any."""
    bar = StageBar(console, "activations", "tokens")

    def on_progress(rows: int) -> None:
        if not bar.is_started:
            bar.start(0, int(config.train.tokens / (1 - config.activations.held_out)))
        bar.update(rows)

    try:
        return prepared.compute(on_progress)
    finally:
        bar.stop()


def _train(part: _Part, console: Console) -> tuple[SAE, torch.Tensor]:
    """Train an SAE from its newest checkpoint on and save it; return it and which latents are dead: [d_sae], bool."""
    config, source = part.config.train, part.source
    device, checkpoints = resolve_device(config.device), part.folder / "checkpoints"
    most, tokens = config.shuffle_tokens, config.tokens
    batches = shuffled(source, config.batch_tokens, seed=config.seed, buffer_tokens=most, tokens=tokens)
    held_out = list(held_out_batches(source, MEASURE_TOKENS))
    if not held_out:
        raise nothing_held_out(source, part.config)
    with filling(console) as on_fill:
        state = init_state(config, batches, device, checkpoints, on_fill)
    loggers = [build_logger(name, part.folder, config.flat()) for name in part.config.logger]
    sae = train(
        state,
        config,
        callbacks=[
            Warn(lambda message: _warn(console, message)),
            JsonlLog(part.folder),
            ProgressBar(console),
            *loggers,
        ],
        checkpoints=checkpoints,
        measure=lambda sae: _measure(sae, held_out),
    )
    is_dead = state.dead.mask()
    del state  # its memory may be needed for the whole weights
    sae = sae.to(device)
    metadata = {"model": part.config.activations.model, "hookpoint": part.hookpoint, "train": config.flat()}
    sae.save(part.folder / "sae", metadata=metadata, overwrite=True)
    return sae, is_dead


def _warn(console: Console, message: str) -> None:
    console.print(f"[bold yellow]Warning:[/] {escape(message)}", highlight=False, soft_wrap=True)


def _measure(sae: SAE, held_out: list[Batch]) -> dict[str, float]:
    """Return held-out figures for a line of the log."""
    evaluation = evaluate(sae, held_out)
    without = {"held_out_fvu_without_outliers": evaluation.fvu_without_outliers} if evaluation.outliers else {}
    return {"held_out_fvu": evaluation.fvu, **without}


def _evaluate(part: _Part, sae: SAE, console: Console) -> dict[str, Any]:
    """Measure on held-out tokens and write evaluation.json."""
    config = part.config.train
    with console.status("evaluating on held-out tokens"):
        evaluation = evaluate(sae, held_out_batches(part.source, EVALUATION_TOKENS))
    log = [record for record in read_log(part.folder / LOG_FILE) if "tokens_per_second" in record]
    before = [0.0, *(record["tokens"] for record in log)]
    seconds = sum((r["tokens"] - start) / r["tokens_per_second"] for start, r in zip(before, log))
    result = RunEvaluation(
        fvu=evaluation.fvu,
        fvu_without_outliers=evaluation.fvu_without_outliers,
        outliers=evaluation.outliers,
        l0=evaluation.l0,
        dead_latents=int(log[-1]["dead_latents"]),
        d_in=config.d_in,
        d_sae=config.d_sae,
        architecture=architecture_of(config.arch).name,
        settings=as_json(asdict(config.arch)),
        site_fvu=dict(evaluation.site_fvu) or None,
        held_out_tokens=evaluation.tokens,
        train_tokens=int(log[-1]["tokens"]),
        steps=log[-1]["step"],
        train_seconds=seconds,
        tokens_per_second=log[-1]["tokens"] / seconds,
    )
    write_evaluation(part.folder / "evaluation.json", result)
    return asdict(result)


def _describe_latents(part: _Part, sae: SAE, is_dead: torch.Tensor | None, console: Console) -> None:
    """Write what the report says of single latents.

    `is_dead` is [d_sae], bool, at the end of training, None where it is not known any more.
    """
    source = part.source
    bar = StageBar(console, "texts of each latent", "tokens")
    bar.start(0, min(SNIPPET_TOKENS, source.n_rows) if isinstance(source, ActivationCache) else SNIPPET_TOKENS)
    try:
        describe_latents(
            part.folder,
            sae,
            {split: part.activations.text_chunks(part.hookpoint, split) for split in ("held_out", "train")},
            token_text(part.activations.tokenizer()),
            is_dead=is_dead,
            max_tokens=SNIPPET_TOKENS,
            on_progress=bar.update,
        )
        bar.finish()
    finally:
        bar.stop()


def _dead_at_the_end(run: Path) -> torch.Tensor | None:
    """Return which latents the newest checkpoint of a finished run calls dead: [d_sae], bool; None without one."""
    found = list_checkpoints(run / "checkpoints")
    if not found:
        return None
    checkpoint = load_checkpoint(found[-1])
    return dead_mask(checkpoint.tensors["dead.tokens_since_fired"], checkpoint.state["config"]["dead_after_tokens"])


def _print_result(part: _Part, result: dict[str, Any], console: Console) -> None:
    console.print(table("Result", result_lines(result)))
    made = {"SAE": part.folder / "sae"} | ({"report": part.folder / "report.html"} if part.config.report else {})
    for name, path in made.items():
        console.print(f"{name}: {path.resolve()}", highlight=False, soft_wrap=True)
