"""The command line: parses and calls."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from cyclopts import App, Group, Parameter
from cyclopts.config import Toml
from rich.console import Console
from rich.table import Table

from flashsae import __version__, backend
from flashsae.bench.problem import Shape
from flashsae.bench.step import bench_step
from flashsae.data.open import cache_activations
from flashsae.errors import ConfigError, FlashSAEError
from flashsae.ops.validate import Precision
from flashsae.run import discard_if_empty, draw_report, execute, new_run, show_plan
from flashsae.settings.reading import ActivationsConfig, ReadingConfig
from flashsae.settings.run import CONFIG_FILE, RunConfig, check_toml
from flashsae.train.callbacks import StageBar
from flashsae.train.config import TrainConfig

app = App(
    name="flashsae",
    help="Train sparse autoencoders: exact, sparse-aware, on any machine. Every option also comes from a TOML file.",
    version=__version__,
    default_parameter=Parameter(negative_iterable=()),
)
app.meta.group_parameters = Group("Everywhere")
bench = App(name="bench", help="Measure speed and memory on this machine.")
app.command(bench)

Activations = Annotated[ActivationsConfig, Parameter(name="*", group="Activations")]
Reading = Annotated[ReadingConfig, Parameter(name="*", group="Activations")]
Training = Annotated[TrainConfig, Parameter(name="*", group=Group("Training", sort_key=2))]


@app.command
def train(
    activations: Activations = ActivationsConfig(),  # noqa: B008 - frozen
    *,
    training: Training = TrainConfig(),  # noqa: B008 - frozen
    run: Path | None = None,
    resume: Path | None = None,
    logger: tuple[str, ...] = (),
    report: bool = True,
    plan: bool = False,
) -> None:
    """Train a sparse autoencoder on the activations of a language model, measure it and draw a report.

    Without arguments: a TopK SAE on a small transformer that reads the documentation of Python, in a few minutes.

    Args:
        run: Folder of the run; must not exist. Default: a new one under runs/.
        resume: Go on with the run in this folder, exactly where its newest checkpoint left it. Takes its settings
            from there.
        logger: tensorboard or wandb, beside metrics.jsonl. May be repeated.
        report: End with report.html.
        plan: Print what the run will do, how much memory it needs and for what, and stop.
    """
    console = Console()
    config = RunConfig(activations, training, logger, report)
    if resume is not None and (run is not None or config != RunConfig()):
        raise ConfigError("resume: expected no other setting beside it; a run is gone on with as it was begun.")
    if plan:
        show_plan(config if resume is None else RunConfig.from_toml(resume / CONFIG_FILE), console)
        return
    folder = new_run(config, run) if resume is None else resume
    RunConfig.from_toml(folder / CONFIG_FILE)  # so that what follows is a run indeed
    try:
        execute(folder, console)
    except KeyboardInterrupt:
        console.print(f"\nStopped. Go on with: flashsae train --resume {folder}", highlight=False, soft_wrap=True)
        raise SystemExit(130) from None
    except FlashSAEError as error:
        if resume is None and discard_if_empty(folder):
            raise
        raise type(error)(f"{error}\nThe run is in {folder}; go on with: flashsae train --resume {folder}") from error


@app.command
def cache(
    reading: Reading = ReadingConfig(),  # noqa: B008 - frozen
    *,
    out: Path,
    max_tokens: int | None = None,
    device: str = "auto",
) -> None:
    """Write the activations of a language model to disk, to train on them with flashsae train --activations.

    A cache that was interrupted is gone on with; one of other settings is refused.

    Args:
        out: Folder of the cache.
        max_tokens: Stop after so many tokens. Default: all of the data set.
        device: auto, cpu, cuda, cuda:1 ...
    """
    console = Console()
    bar = StageBar(console, "activations", "tokens")
    bar.start(0, max_tokens)
    try:
        cache_activations(
            reading,
            out,
            max_tokens=max_tokens,
            device=str(backend.resolve_device(device)),
            on_progress=bar.update,
        )
    except KeyboardInterrupt:
        console.print("\nStopped. The same command goes on where it was.", highlight=False)
        raise SystemExit(130) from None
    finally:
        bar.stop()
    console.print(f"Train on them: flashsae train --activations {out}", highlight=False, soft_wrap=True)


@app.command
def report(run: Path) -> None:
    """Draw the report of a finished run again.

    Args:
        run: Folder of the run.
    """
    console = Console()
    for path in draw_report(run, console):
        console.print(str(path.resolve()), highlight=False, soft_wrap=True)


@app.command
def doctor() -> None:
    """Print versions, devices, and which backends work here and why not."""
    console = Console()
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in backend.describe().items():
        table.add_row(name, value)
    console.print(table)
    console.print()
    for each in backend.backends():
        mark = "[green]works[/]" if each.works else "[yellow]does not work[/]"
        console.print(f"backend {each.name}: {mark}: {each.reason}", highlight=False)


@bench.command
def step(
    *,
    d_in: int = 768,
    d_sae: int = 24576,
    k: int = 32,
    batch_tokens: int = 4096,
    precision: Precision = "bf16",
    peers: bool = True,
    seconds: float = 1.0,
    json: Path | None = None,
    tiny: Annotated[bool, Parameter(show=False)] = False,
) -> None:
    """Measure a whole training step: ours by stage, then beside dense PyTorch and other libraries.

    Needs a GPU. An implementation is timed only if its result is that of the dense float32 code. Other libraries come
    with pip install 'flashsae[peers]'.

    Args:
        d_in: Width of the activations.
        d_sae: Number of latents.
        k: Latents active for each token.
        batch_tokens: Tokens in a step.
        precision: Of our products; others keep that of their own recipe, mostly bf16.
        peers: Measure the libraries that are installed, beside dense PyTorch.
        seconds: Budget of each measurement, without building and warm-up.
        json: File for the results.
        tiny: Toy sizes on any device, to try the command.
    """
    shape = Shape("", batch_tokens, d_in, d_sae, k)
    bench_step(shape, precision, peers=peers, seconds=seconds, is_tiny=tiny, path=json, console=Console())


@app.meta.default
def _with_config(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Annotated[
        Path | None, Parameter(help="TOML file with settings by their names here, such as k = 64.")
    ] = None,
) -> None:
    if config is not None:
        check_toml(config)
        app.config = (Toml(config, use_commands_as_keys=False),)
    app(tokens)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; an expected error is one message on standard error and exit code 1.

    Args:
        arguments: behind the name of the program; None takes those of the process.
    """
    app.config = ()
    with suppress(ValueError):  # outside the main thread there are no signals to catch
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # the end of a cluster's patience: stop as for Ctrl-C
    try:
        app.meta(sys.argv[1:] if arguments is None else arguments)
    except FlashSAEError as error:
        print(f"flashsae: {error}", file=sys.stderr)
        raise SystemExit(1) from None
