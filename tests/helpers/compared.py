"""The folder of one SAE of several, with what the page that compares them reads of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_compared(run: Path, name: str, fvu: float | None = 0.2, **settings: Any) -> Path:
    """Make the folder of an SAE, with what the page reads of it."""
    folder = run / name
    folder.mkdir(parents=True)
    given = {"model": "org/tiny", "hookpoint": "h.1", "arch": "topk", "k": 4, "d_sae": 64, "lr": 1e-3, **settings}
    lines = [f"{key} = {json.dumps(value)}\n" for key, value in given.items()]
    (folder / "config.toml").write_text("".join(lines), "utf-8")
    evaluation = {"fvu": fvu, "l0": given["k"] * 1.0, "dead_latents": 3, "d_in": 16, "d_sae": given["d_sae"]}
    evaluation |= {"held_out_tokens": 2048, "train_tokens": 51200, "steps": 50, "tokens_per_second": 65432.1}
    evaluation |= {"architecture": given["arch"], "settings": {"k": given["k"]}}
    if fvu is not None:
        (folder / "evaluation.json").write_text(json.dumps(evaluation), "utf-8")
    return folder
