"""The commands: what each takes, and which function does it. Torch is imported by those that need it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Group, Parameter
from rich.console import Console

from flashsae import __version__
from flashsae.cli.arguments import Given, architectures_asked, joined, one_by_one, with_mixtures
from flashsae.cli.asked import AskedTraining, check_starts
from flashsae.cli.options import taking_settings_of
from flashsae.cli.several import kinds_of, several_in
from flashsae.cli.sharing import COMMANDS
from flashsae.errors import ConfigError, DataError, FlashSAEError
from flashsae.precision import Precision
from flashsae.settings.kinds import PositiveFloat, PositiveInt, expand
from flashsae.settings.reading import ActivationsConfig, ReadingConfig
from flashsae.settings.run import RunConfig
from flashsae.settings.training import TrainConfig


def _examples(*lines: str) -> str:
    return "\n".join(("Examples:", "", *(f"    {line}" for line in lines)))


app = App(
    name="flashsae",
    help="Train sparse autoencoders: exact, sparse-aware, on any machine.",
    version=__version__,
    suppress_keyboard_interrupt=False,
    default_parameter=Parameter(negative_iterable=()),
    help_epilogue=_examples(
        "flashsae train                    a first SAE in minutes, with the extra demo",
        "flashsae train --help             every setting, its meaning and its default",
        "flashsae train --config my.toml   settings from a file",
    ),
)
app.meta.group_parameters = Group("Everywhere")
app.meta.suppress_keyboard_interrupt = False
bench = App(
    name="bench",
    help="Measure speed and memory on this machine.",
    help_epilogue=_examples("flashsae bench step --d-sae 65536"),
)
app.command(bench)

Activations = Annotated[ActivationsConfig, Parameter(name="*", group="Activations")]
Reading = Annotated[ReadingConfig, Parameter(name="*", group="Activations")]


@app.command(
    help_epilogue=_examples(
        "flashsae train --plan",
        "flashsae train gpt2 my-text.jsonl --hookpoint h.6 --d-sae 16384",
        "flashsae train --activations acts --hookpoint h.6 --run runs/wider",
        "flashsae train --d-sae 2048 4096 --lr 1e-3 3e-4   four SAEs from one reading",
        "flashsae train --sweep sweep.toml                 the same from a file",
        "flashsae train --export saelens,sparsify          for other libraries, too",
        "flashsae train --resume runs/wider",
        "flashsae train --resume runs/wider --extend 1_000_000",
    )
)
def train(
    activations: Activations = ActivationsConfig(),  # noqa: B008 - frozen
    *,
    training: Any = None,
    run: Path | None = None,
    sweep: Path | None = None,
    at_once: PositiveInt | None = None,
    resume: Path | None = None,
    extend: PositiveInt | None = None,
    logger: Annotated[tuple[str, ...], Parameter(show_default=False)] = (),
    report: bool = True,
    export: Annotated[tuple[str, ...], Parameter(show_default=False)] = (),
    plan: bool = False,
    lists: Annotated[dict[str, Any] | None, Parameter(parse=False)] = None,
) -> None:
    """Train a sparse autoencoder on the activations of a language model, measure it and draw a report.

    Without arguments: an SAE on a small transformer that reads the documentation of Python, in a few minutes; on a
    slow CPU with fewer tokens, by a measurement of a second.

    Most settings of the training and of the architecture may have several values, as in --lr 1e-4 3e-4 or --seed
    0,1,2, --arch among them, and --hookpoint may name several: each combination makes an SAE. All train side by
    side on one reading of their activations, each to the bytes that it would have alone; comparison.html compares
    them.

    Args:
        run: Folder of the run; must not exist. Default: a new one under runs/.
        sweep: TOML file with settings by their names here, where a list makes an SAE of each value, and each table
            [[sae]] one with settings of its own, or several.
        at_once: SAEs that train side by side at most, the others after them; needs a cache. Default: all.
        resume: Resume the run in this folder, exactly where its newest checkpoint left it, with its settings.
        extend: With --resume, of a run that has ended: train on so many tokens more. The learning rate rises again over
            warmup_steps and falls to 0 in the last decay_fraction of the new steps.
        logger: tensorboard or wandb, beside metrics.jsonl. May be repeated. Default: neither.
        report: End with report.html.
        export: Formats of other libraries that the trained SAE is written in too, each to a folder of its name in that
            of the run: saelens, sparsify, dictionary_learning, circuit_tracer or llamascopium, with commas between
            several. Default: none.
        plan: Check all that can be known before the text is read, and print what the run will do, how much memory it
            needs and for what; then stop.
    """
    from flashsae.run import start
    from flashsae.run.execute import show_plan

    console = Console()
    if resume is None:
        if extend is not None:
            raise ConfigError("extend: expected --resume RUN beside it, a run that has ended.")
        asked = AskedTraining(vars(training) if training else {}, _given(), lists or {}, sweep)
        config = asked.config(RunConfig(activations, TrainConfig(), logger, report, (), at_once, export))
    else:
        if lists:
            raise ConfigError(f"resume: expected no other setting beside it, got {next(iter(lists))}.")
        start.check_whole(resume)
        config = start.saved_config(resume)
        config = config if extend is None else start.extended(config, resume, extend)
    start.check(config)
    if resume is None:
        check_starts(config)
    folder = start.place_of(config, run) if resume is None else resume
    if resume is None and _is_demo(config):
        from flashsae.cli.pace import paced

        config, why = paced(config)
        if why:
            console.print(why, highlight=False)
    if plan:
        show_plan(config, folder, console)
        return
    if resume is None:
        folder = start.new_run(config, run)
    elif extend is not None:
        start.write_extended(config, folder)
    _execute(folder, console, is_new=resume is None)


def _execute(folder: Path, console: Console, *, is_new: bool) -> None:
    """Do a run, and say how to go on with it if it stops."""
    from flashsae.run import start
    from flashsae.run.execute import execute

    try:
        failed = execute(folder, console)
    except BaseException as error:
        is_gone = is_new and start.discard_if_empty(folder)
        how = f"flashsae train --resume {folder}"
        if isinstance(error, KeyboardInterrupt):
            way = "The training had not begun; the same command goes on." if is_gone else f"Go on with: {how}"
            console.print(f"\nStopped. {way}", highlight=False, soft_wrap=True)
            raise SystemExit(130) from None
        if is_gone:
            raise
        if isinstance(error, FlashSAEError):
            raise type(error)(f"{error}\nThe run is in {folder}; go on with: {how}") from error
        console.print(f"\nThe run is in {folder}; go on with: {how}", highlight=False, soft_wrap=True)
        raise
    if failed:
        why = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        raise DataError(f"{len(failed)} of the SAEs of {folder} failed, and the others are done: {why}")


_BESIDE_THE_DEMO = {"run", "logger", "report", "export", "plan"}
"""Settings of `train` beside which it still is the demo, which chooses its tokens by the speed of the machine."""


def _given() -> set[str]:
    """Return the names of the settings that the command was given; a default that was asked for is given too."""
    return {name for each in app.config if isinstance(each, Given) for name in each.names}


def _is_demo(config: RunConfig) -> bool:
    """Tell whether nothing was given that says what to train."""
    work = config.activations, config.train
    return _given() <= _BESIDE_THE_DEMO and not config.sae and work == (ActivationsConfig(), TrainConfig())


@app.command(
    help_epilogue=_examples(
        "flashsae cache gpt2 my-text.jsonl --hookpoint 'h.*' --out acts",
        "flashsae train --activations acts --hookpoint h.6",
        "flashsae cache --describe acts",
    )
)
def cache(
    reading: Reading = ReadingConfig(),  # noqa: B008 - frozen
    *,
    out: Path | None = None,
    max_tokens: PositiveInt | None = None,
    device: str = "auto",
    merge: Annotated[tuple[Path, ...], Parameter(consume_multiple=True, show_default=False)] = (),
    verify: Path | None = None,
    describe: Path | None = None,
    json: Path | None = None,
) -> None:
    """Write the activations of a language model to disk, to train on them with flashsae train --activations.

    An interrupted cache is continued, and one that ended at its --max-tokens extended by a larger number; one of other
    settings is refused.

    Args:
        out: Folder of the cache.
        max_tokens: Stop after so many tokens. Default: all of the data set.
        device: auto, cpu, cuda, cuda:1 ...
        merge: Run no model; put complete caches of one model, of other texts, together in --out. --merge A B --out C
        verify: Write nothing; read every byte of the cache in this folder and compare it with its checksums.
        describe: Write nothing; tell what is in the cache in this folder, and what its activations look like.
        json: File for what --describe tells. Default: none is written.
    """
    from flashsae.cli.caching import CacheTask, work_on_cache

    task = CacheTask(out, max_tokens, device, merge, verify, describe, json)
    task.check()
    work_on_cache(task, reading, Console())


@app.command(help_epilogue=_examples("flashsae report runs/minilm-encoder.layer.2"))
def report(run: Path) -> None:
    """Draw the report of a finished run again.

    Args:
        run: Folder of the run.
    """
    from flashsae.run.execute import draw_report

    console = Console()
    for path in draw_report(run, console):
        console.print(str(path.resolve()), highlight=False, soft_wrap=True)


for _command, _lines in COMMANDS.items():
    app.command(_command, help_epilogue=_examples(*_lines))


@app.command(help_epilogue=_examples("flashsae doctor"))
def doctor() -> None:
    """Print versions, devices, and which backends work here and why not."""
    from rich.table import Table

    from flashsae import backend

    console = Console()
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in backend.describe().items():
        table.add_row(name, value)
    console.print(table)
    console.print()
    for each in backend.backends():
        mark = "[green]works[/]" if each.works else "[yellow]does not work[/]"
        console.print(f"backend {each.name}: {mark}: {each.reason}", highlight=False)


@bench.command(
    help_epilogue=_examples(
        "flashsae bench step",
        "flashsae bench step --d-in 2048 --d-sae 65536 --k 64 --json step.json",
        "flashsae bench step --no-peers --precision float32",
    )
)
def step(
    *,
    d_in: PositiveInt = 768,
    d_sae: PositiveInt = 24576,
    k: PositiveInt = 32,
    batch_tokens: PositiveInt = 4096,
    precision: Precision = "bf16",
    peers: bool = True,
    seconds: PositiveFloat = 1.0,
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
        precision: Of our products, as of flashsae train; with an 8-bit screen our step without it is measured too.
            Others keep that of their own recipe, mostly bf16.
        peers: Measure the libraries that are installed, beside dense PyTorch.
        seconds: Budget of each measurement, without building and warm-up.
        json: File for the results. Default: none is written.
        tiny: Toy sizes on any device, to try the command.
    """
    from flashsae.bench.setups import Shape
    from flashsae.bench.step import bench_step

    shape = Shape("", batch_tokens, d_in, d_sae, k)
    bench_step(shape, precision, peers=peers, seconds=seconds, is_tiny=tiny, path=json, console=Console())


@app.meta.default
def _with_config(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Annotated[
        Path | None, Parameter(help="TOML file with settings by their names here, such as k = 64.")
    ] = None,
) -> None:
    app.config = (Given(tokens, None if config is None else expand(config, "config")),)
    app(tokens, exit_on_error=False, print_error=False)


def run(words: Sequence[str]) -> None:
    """Do what the words of a command line ask for.

    Raises:
        CycloptsError: they are no command.
        FlashSAEError: the command cannot be done.
        SystemExit: it is done, or was stopped.
    """
    app.config = ()
    words = joined(joined(with_mixtures(words), "hookpoint"), "dataset")
    if "train" in words:
        first, *others = architectures_asked(words)
        words, lists = several_in(words, kinds_of([first.name, *(each.name for each in others)]))
        taking = taking_settings_of(first, train, "training", also=others, lists=lists)
        app["train"].default_command, words = taking, one_by_one(words, taking)
    if words and not words[0].startswith("-") and words[0] not in app:
        words = words[:1]  # no command, which a --help behind it would hide
    app.meta(list(words), exit_on_error=False, print_error=False)
