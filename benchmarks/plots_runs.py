"""Tables and pictures of whole trainings: held-out FVU beside dense ones, and what a trace shows of fetching data."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev

from matplotlib.figure import Figure

from benchmarks.drawing import BLUE, GREY, ORANGE, RED, WIDTH, table
from benchmarks.trainer import ARMS, AUTOGRAD, NUDGED, REVERSED
from flashsae.bench.measure import OURS, Record

Arms = dict[tuple[str, str], dict[int, Record]]  # by precision and arm, then by seed
LOOKS = {AUTOGRAD: (RED, "-"), REVERSED: (GREY, "-"), NUDGED: (ORANGE, "-"), OURS: (BLUE, "--")}


def _settings(records: Sequence[Record]) -> list[int]:
    """Return the different numbers of tokens after which a latent counts as dead, the largest first."""
    return sorted({record["dead_after_tokens"] for record in records}, reverse=True)


def _by_arm(records: Sequence[Record], dead_after: int) -> Arms:
    """Return the records of each arm by seed; of several of one seed the last."""
    found: Arms = {}
    for record in records:
        if record["dead_after_tokens"] == dead_after:
            found.setdefault((record["precision"], record["arm"]), {})[record["seed"]] = record
    return {arm: found[arm] for arm in ARMS if arm in found}


def _apart(arms: Arms, arm: tuple[str, str]) -> dict[int, float]:
    """Return for each seed how far the FVU is from that of the dense one of the same precision."""
    dense = arms[arm[0], AUTOGRAD]
    return {seed: run["held_out_fvu"] / dense[seed]["held_out_fvu"] - 1 for seed, run in arms[arm].items()}


def _cell(arms: Arms, arm: tuple[str, str], seed: int) -> str:
    if seed not in arms[arm]:
        return ""
    return f"{arms[arm][seed]['held_out_fvu']:.5f}" + (
        "" if arm[1] == AUTOGRAD else f" ({_apart(arms, arm)[seed]:+.2%})"
    )


def _spread(arms: Arms, arm: tuple[str, str]) -> str:
    apart = list(_apart(arms, arm).values())
    return f"{mean(apart):+.2%} ± {stdev(apart) / len(apart) ** 0.5:.2%}"


def trainer_text(records: Sequence[Record]) -> str:
    """Return what whole trainings reached, one table for each setting."""
    if not records:
        return ""
    one = records[0]
    parts = [
        f"d_in {one['d_in']}, d_sae {one['d_sae']}, k {one['k']}, {one['batch_tokens']} tokens a step, "
        f"{10 * len(one['fvu'])} steps on {one['train_tokens']:,} tokens, {one['held_out_tokens']:,} held out; "
        f"{one['gpu']}, torch {one['torch']}. In brackets: the difference to the dense one of the same precision and "
        "seed.",
    ]
    for dead_after in _settings(records):
        arms = _by_arm(records, dead_after)
        seeds = sorted({seed for runs in arms.values() for seed in runs})
        rows = [[f"seed {seed}", *(_cell(arms, arm, seed) for arm in arms)] for seed in seeds]
        rows.append(["mean ± standard error", *("" if arm[1] == AUTOGRAD else _spread(arms, arm) for arm in arms)])
        has_auxk = dead_after < 10 * len(one["fvu"]) * one["batch_tokens"]
        title = f"Dead after {dead_after:,} tokens, so {'with' if has_auxk else 'no'} AuxK:"
        parts += [title, table(["", *(f"{arm}, {precision}" for precision, arm in arms)], rows)]
    return "\n\n".join(parts)


def trainer_figure(records: Sequence[Record]) -> Figure | None:
    """Draw FVU against steps, the first seed of each setting, a column for each precision."""
    if not records:
        return None
    settings, precisions = _settings(records), dict.fromkeys(precision for precision, _ in ARMS)
    figure = Figure(figsize=(WIDTH, 2.6 * len(settings)), layout="constrained")
    grid = figure.subplots(len(settings), len(precisions), squeeze=False, sharey=True, sharex=True)
    for line, dead_after in zip(grid, settings):
        arms = _by_arm(records, dead_after)
        for axes, precision in zip(line, precisions):
            for (of, arm), runs in arms.items():
                if of == precision:
                    colour, style = LOOKS[arm]
                    curve = runs[min(runs)]["fvu"]
                    axes.plot([10 * i + 5 for i in range(len(curve))], curve, style, color=colour, label=arm, lw=1.2)
            axes.set(yscale="log", ylabel="FVU, mean of ten steps", xlabel="step")
            axes.set_title(f"{precision}, dead after {dead_after:,} tokens", loc="left")
            axes.legend(frameon=False, fontsize=7)
    return figure


def _last_pipelines(records: Sequence[Record]) -> dict[str, Record]:
    """Return the last record of each arm by where its activations come from."""
    sources = {"cache": "a cache", "auxk": "a cache, AuxK", "model": "a language model"}
    return {sources[record["name"]]: record for record in records}


def pipeline_text(records: Sequence[Record]) -> str:
    """Return how near training from data comes to steps on batches that are there already."""
    last = _last_pipelines(records)
    if not last:
        return ""
    heads = ["activations from", "B", "d_in", "d_sae", "k", "tokens/s", "batches on the device", "source alone"]
    heads += ["of the slower", "training stream busy", "fetching, ms a step", "of it hidden"]
    rows = []
    for name, r in last.items():
        alone = r["source_tokens_per_second"]
        rows.append([
            name, *(f"{r['shape'][size]}" for size in ("batch_tokens", "d_in", "d_sae", "k")),
            f"{r['tokens_per_second']:,.0f}", f"{r['resident_tokens_per_second']:,.0f}",
            "" if alone is None else f"{alone:,.0f}", f"{r['share']:.1%}",
            f"{r['busy_share']:.1%}", f"{r['fetch_ms']:.2f}", f"{r['fetch_hidden_share'] or 0:.0%}",
        ])  # fmt: skip
    text = "`python -m benchmarks.pipeline`: `flashsae train` beside steps on batches that stay on the device. "
    commits = ", ".join(dict.fromkeys(r["commit"] for r in last.values()))
    return (
        f"### Training from data\n\n{text}The last three columns are from a trace. Commit {commits}.\n\n"
        f"{table(heads, rows)}"
    )


def reading_text(records: Sequence[Record]) -> str:
    """Return how near a cache of activations comes to the speed of the model alone."""
    last = {record["name"]: record for record in records}
    if not last:
        return ""
    models = {"small": "3 layers of width 384 (MiniLM)", "large": "8 layers of width 4096, random weights"}
    rows = []
    for name, r in last.items():
        alone, source, cache = (max(r["rates"][arm]) for arm in ("bare", "source", "cache"))
        rows.append([models[name], f"{alone:,.0f}", f"{source:,.0f}", f"{cache:,.0f}", f"{cache / alone:.1%}"])
    heads = ["model", "alone, tokens/s", "read", "written to a cache", "of alone"]
    gpus, commits = (", ".join(dict.fromkeys(r[name] for r in last.values())) for name in ("gpu", "commit"))
    return (
        "### Reading text\n\n`python -m benchmarks.reading`: the model alone on batches that were made before, the "
        "source that cuts text meanwhile, and writing a cache to memory-backed disk, the best of two rounds. One "
        f"{gpus} with 16 cores; commits {commits}.\n\n{table(heads, rows)}"
    )


def pipeline_figure(records: Sequence[Record]) -> Figure | None:
    """Draw when the stream that trains and the one that fetches are busy."""
    last = _last_pipelines(records)
    if not last:
        return None
    figure = Figure(figsize=(WIDTH, 1.5 * len(last)), layout="constrained")
    for axes, (name, record) in zip(figure.subplots(len(last), 1, squeeze=False)[:, 0], last.items()):
        for row, (stream, colour) in enumerate({"training": BLUE, "fetching": ORANGE}.items()):
            spans = [(start, end - start) for start, end in record["timeline"][stream]]
            axes.broken_barh(spans, (row - 0.3, 0.6), color=colour)
        axes.set(yticks=[0, 1], yticklabels=["training", "fetching"], xlabel="ms", ylim=(1.6, -0.6))
        axes.set_title(f"from {name}: when each stream of the device is busy", loc="left")
    return figure
