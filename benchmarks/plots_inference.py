"""The table of encoding with trained SAEs beside SAELens."""

from __future__ import annotations

import json
from collections.abc import Sequence

from benchmarks.drawing import number, size_text, table
from benchmarks.inference import SAELENS
from flashsae.bench.measure import OURS, Record

INFERENCE_TEXT = """`SAE.encode` beside SAELens's `encode` of the same weights and tokens, in turn in one process
(`python -m benchmarks.inference`). Ours gives a sparse code, theirs a dense one; "to dense" is ours made dense. Memory
is what is allocated beyond weights and tokens. In bf16 weights and tokens are bf16, else float32; "float32" is
certified for ours and IEEE arithmetic for SAELens. The last columns say how many times ours SAELens takes. BatchTopK
selects by its threshold, as in inference."""


def inference_text(records: Sequence[Record]) -> str:
    """Return a table of the last result of every architecture and batch; "" without results."""
    last = {json.dumps([record["name"], record["shape"]]): record for record in records}
    if not last:
        return ""
    about = "; ".join(dict.fromkeys(f"{r['gpu']}, torch {r['torch']}, commit {r['commit']}" for r in last.values()))
    heads = ["", "architecture", "tokens", "ms", "p10 – p90", "peak GB", "tokens/s", "time of ours", "memory of ours"]
    rows = [row for record in last.values() for row in inference_rows(record)]
    sizes = size_text([record["shape"] for record in last.values()], "B")
    return f"### Inference\n\n{INFERENCE_TEXT} {sizes}. {about}.\n\n{table(heads, rows)}"


def inference_rows(record: Record) -> list[list[str]]:
    """Return a row of the table for each way to encode; beside SAELens, how many times ours it takes."""
    rows, runs = [], record["runs"]
    for name, run in runs.items():
        head = [name, record["name"], str(record["shape"]["batch_tokens"])]
        if "median_ms" not in run:
            rows.append([*head, run["status"], *[""] * 5])
            continue
        spread = f"{number(run['p10_ms'])} – {number(run['p90_ms'])}"
        rate = f"{1e3 * record['shape']['batch_tokens'] / run['median_ms']:,.0f}"
        ours = runs.get(f"{OURS}, {run['precision']}", {})
        compared = ("median_ms", "peak_bytes") if name.startswith(SAELENS.name) and "median_ms" in ours else ()
        times = [number(run[key] / ours[key], "×") if ours[key] else "" for key in compared] or ["", ""]
        peak = run["peak_bytes"]
        rows.append([*head, number(run["median_ms"]), spread, number(peak / 1e9) if peak else "", rate, *times])
    return rows
