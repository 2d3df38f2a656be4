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

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import chain, count
from pathlib import Path
from typing import Any

import tomli_w
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from flashsae import files
from flashsae.backend import resolve_device
from flashsae.data.open import ActivationsConfig, Opened, open_activations, run_name
from flashsae.data.shuffle import shuffled
from flashsae.data.sources import Source
from flashsae.errors import CheckpointError, ConfigError, DataError, StorageError, require
from flashsae.evaluate import evaluate, held_out_batches, latent_geometry
from flashsae.metrics import LatentActivity
from flashsae.nn.sae import SAE
from flashsae.report.render import render_report
from flashsae.report.snippets import collect_snippets, token_strings, write_snippets
from flashsae.train.callbacks import LOG_FILE, JsonlLog, ProgressBar, build_logger, progress_bar, read_log
from flashsae.train.config import ResolvedConfig, TrainConfig
from flashsae.train.loop import init_state, train
from flashsae.train.plan import make_plan

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CONFIG_FILE = "config.toml"
MEASURE_TOKENS = 8192
EVALUATION_TOKENS = 1 << 18
SNIPPET_TOKENS = 150_000


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run.

    Args:
        activations: what to train on.
        train: the SAE and its training.
        logger: opt-in loggers beside metrics.jsonl: tensorboard, wandb.
        report: whether to end with snippets and report.html.
    """

    activations: ActivationsConfig = field(default_factory=ActivationsConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    logger: tuple[str, ...] = ()
    report: bool = True

    def to_toml(self) -> str:
        """Return the settings as TOML, one flat table; what is None is left out."""
        flat = {**asdict(self.activations), **asdict(self.train), "logger": list(self.logger), "report": self.report}
        return tomli_w.dumps(
            {
                name: str(value) if isinstance(value, Path) else value
                for name, value in flat.items()
                if value is not None
            }
        )

    @classmethod
    def from_toml(cls, path: Path) -> RunConfig:
        """Read what `to_toml` wrote.

        Raises:
            CheckpointError: the file is missing or damaged.
        """
        try:
            flat: dict[str, Any] = tomllib.loads(path.read_text("utf-8"))
            if "activations" in flat:
                flat["activations"] = Path(flat["activations"])
            activations = {f.name: flat.pop(f.name) for f in fields(ActivationsConfig) if f.name in flat}
            settings = {f.name: flat.pop(f.name) for f in fields(TrainConfig) if f.name in flat}
            logger = tuple(flat.pop("logger", ()))
            return cls(ActivationsConfig(**activations), TrainConfig(**settings), logger, **flat)
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"cannot read the settings of the run from {path}: {error}. Name a folder that flashsae train made."
            ) from error


def check_toml(path: Path) -> None:
    """Raise ConfigError if a file of settings is missing or is not TOML."""
    try:
        tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"config: cannot read {path} as TOML: {error}.") from error


def new_run(config: RunConfig, run: Path | None = None) -> Path:
    """Make the folder of a run with its settings in it; a kill leaves no folder or a whole one.

    Args:
        config: the settings.
        run: folder, must not exist. None: a new one under runs/, named after model and hookpoint.
    Raises:
        StorageError: the folder exists or cannot be made.
    """
    if run is None:
        names = (run_name(config.activations) + suffix for suffix in chain([""], (f"-{n}" for n in count(2))))
        run = next(path for path in map(Path("runs").joinpath, names) if not path.exists())
    if run.exists():
        raise StorageError(
            f"{run} exists already and is not overwritten. Go on with it: flashsae train --resume {run}, or give "
            "another folder."
        )
    with files.atomic_directory(run) as folder:
        (folder / CONFIG_FILE).write_text(config.to_toml(), "utf-8")
    return run


def execute(run: Path, console: Console) -> None:
    """Do all of a run that is not done yet.

    Args:
        run: a folder that `new_run` made.
        console: for plan, progress and result.
    Raises:
        FlashSAEError: says what to do; everything written before is intact.
    """
    config = RunConfig.from_toml(run / CONFIG_FILE)
    if config.report:
        for package in ("jinja2", "matplotlib"):
            require(package, "report")  # now, not after hours of training
    opened = _open(config, run, console)
    if len(opened.sources) == 1:
        ((hookpoint, source),) = opened.sources.items()
        _execute_one(run, config, hookpoint, source, opened, console)
        return
    for hookpoint, source in opened.sources.items():
        part = run / hookpoint
        one = replace(config, activations=replace(config.activations, hookpoint=hookpoint))
        if not part.exists():
            new_run(one, part)
        console.rule(hookpoint)
        _execute_one(part, one, hookpoint, source, opened, console)


def draw_report(run: Path, console: Console) -> list[Path]:
    """Draw the report of a finished run, or of each part of a run over several hookpoints, again.

    Args:
        run: a folder that `flashsae train` made.
        console: for the progress of what has to be read again, if the run ended without a report.
    Raises:
        CheckpointError: the run is not finished, or something in it is damaged.
    """
    config = RunConfig.from_toml(run / CONFIG_FILE)
    parts = sorted(path.parent for path in run.glob(f"*/{CONFIG_FILE}"))
    if parts:
        return [path for part in parts for path in draw_report(part, console)]
    if (run / "evaluation.json").exists() and not (run / "snippets.json").exists():
        opened = _open(config, run, console)
        ((hookpoint, _),) = opened.sources.items()
        _describe_latents(run, SAE.load(run / "sae", device=resolve_device(config.train.device)), hookpoint, opened)
    return [render_report(run)]


def _open(config: RunConfig, run: Path, console: Console) -> Opened:
    with progress_bar(console, "tokens") as bar:
        task = bar.add_task("activations", total=None, note="", visible=False)
        return open_activations(
            config.activations,
            tokens=config.train.tokens,
            folder=run.parent / "activations",
            device=str(resolve_device(config.train.device)),
            is_checked=(run / LOG_FILE).exists(),
            on_progress=lambda rows: bar.update(task, completed=rows, visible=True),
        )


def _execute_one(
    run: Path, config: RunConfig, hookpoint: str, source: Source, opened: Opened, console: Console
) -> None:
    settings = config.train.resolve(source.d_in)
    resolved = TrainConfig(**{f.name: getattr(settings, f.name) for f in fields(TrainConfig)})
    config = replace(config, activations=replace(opened.config, hookpoint=hookpoint), train=resolved)
    files.write_atomic(run / CONFIG_FILE, config.to_toml())
    device = resolve_device(settings.device)
    console.print(_plan_table(config, settings, device, opened.how, run))
    batches = shuffled(source, settings.batch_tokens, seed=settings.seed, buffer_tokens=settings.shuffle_tokens)
    held_out = list(held_out_batches(source, MEASURE_TOKENS))
    if not held_out:
        raise DataError(
            f"{source.name} is too small: no document fell to the held-out part, {config.activations.held_out:.3g} of "
            "all. Give more text or a larger held_out."
        )
    state = init_state(settings, batches, device, run / "checkpoints")
    loggers = [build_logger(name, run, asdict(settings)) for name in config.logger]
    sae = train(
        state,
        settings,
        callbacks=[JsonlLog(run), ProgressBar(console), *loggers],
        checkpoints=run / "checkpoints",
        measure=lambda sae: {"held_out_fvu": evaluate(sae, held_out).fvu},
    )
    metadata = {"model": config.activations.model, "hookpoint": hookpoint, "train": asdict(settings)}
    sae.save(run / "sae", metadata=metadata, overwrite=True)
    with console.status("evaluating on held-out tokens"):
        result = _evaluate(run, sae, source, settings)
    if config.report:
        with console.status("collecting the texts that activate each latent"):
            _describe_latents(run, sae, hookpoint, opened)
        with console.status("drawing the report"):
            render_report(run)
    console.print(_result_table(result, run, config.report))


def _evaluate(run: Path, sae: SAE, source: Source, settings: ResolvedConfig) -> dict[str, float]:
    """Measure on held-out tokens and write evaluation.json."""
    evaluation = evaluate(sae, held_out_batches(source, EVALUATION_TOKENS))
    log = [record for record in read_log(run / LOG_FILE) if "tokens_per_second" in record]
    before = [0.0, *(record["tokens"] for record in log)]
    seconds = sum((r["tokens"] - start) / r["tokens_per_second"] for start, r in zip(before, log))
    result = {
        "fvu": evaluation.fvu,
        "l0": evaluation.l0,
        "dead_latents": log[-1]["dead_latents"],
        "d_in": settings.d_in,
        "d_sae": settings.d_sae,
        "k": settings.k,
        "held_out_tokens": evaluation.tokens,
        "train_tokens": settings.steps * settings.batch_tokens,
        "steps": settings.steps,
        "train_seconds": seconds,
        "tokens_per_second": settings.steps * settings.batch_tokens / seconds,
    }
    files.write_atomic(run / "evaluation.json", json.dumps(result, indent=2) + "\n")
    return result


@torch.no_grad()
def _describe_latents(run: Path, sae: SAE, hookpoint: str, opened: Opened) -> None:
    """Write what the report says of single latents: latents.safetensors and snippets.json."""
    activity = LatentActivity(sae.config.d_sae, sae.W_dec.device)

    def encode(acts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        code = sae.encode(acts.to(sae.W_dec.device, sae.W_dec.dtype))
        activity.update(code.top_acts, code.top_indices)
        return code.top_acts, code.top_indices

    tokenizer = opened.tokenizer()
    snippets = collect_snippets(
        encode,
        opened.text_chunks(hookpoint),
        lambda ids: token_strings(tokenizer, ids),
        max_tokens=SNIPPET_TOKENS,
    )
    density = {"latent_density": activity.latent_density().float().cpu()}
    files.save_tensors_atomic(run / "latents.safetensors", density | latent_geometry(sae))
    write_snippets(run / "snippets.json", snippets)


def _plan_table(config: RunConfig, settings: ResolvedConfig, device: torch.device, how: str, run: Path) -> Table:
    plan = make_plan(settings, device)
    rows = {
        "activations": f"{config.activations.model} at {config.activations.hookpoint}, d_in {settings.d_in}",
        "": how,
        "SAE": f"TopK, d_sae {settings.d_sae:,}, k {settings.k}: {plan.parameters:,} parameters",
        "training": f"{settings.tokens:,} tokens in {plan.steps:,} steps of {settings.batch_tokens:,}, "
        f"learning rate {settings.lr:.2g}",
        "auxiliary loss": f"weight {settings.auxk_alpha:.3g} on latents dead for {settings.dead_after_tokens:,} tokens",
        "peak memory": f"about {plan.peak_bytes / 1e9:.1f} GB on {device}",
        "run folder": str(run),
    }
    return _table("Plan", rows)


def _result_table(result: dict[str, float], run: Path, report: bool) -> Table:
    rows = {
        "held-out FVU": f"{result['fvu']:.4f}   ({1 - result['fvu']:.1%} of the variance explained)",
        "L0": f"{result['l0']:.1f}",
        "dead latents": f"{result['dead_latents']:.0f} of {result['d_sae']:,} "
        f"({result['dead_latents'] / result['d_sae']:.1%})",
        "speed": f"{result['tokens_per_second']:,.0f} tokens/s",
        "SAE": str(run / "sae"),
        "report": str((run / "report.html").resolve()) if report else "none; draw it with flashsae report",
    }
    return _table("Result", rows)


def _table(title: str, rows: Mapping[str, str]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=box.SIMPLE, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    return table
