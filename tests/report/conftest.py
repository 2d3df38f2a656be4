"""A small run directory that looks like one that training wrote."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flashsae.report import plots
from flashsae.report.render import render_report
from flashsae.report.snippets import LatentSnippets, Snippet, Snippets, write_snippets
from helpers.page import Page

D_SAE = 96
PAYLOADS = [
    "<script>window.pwned=1</script>",
    "\"><img src=x onerror='window.pwned=2'>",
    "</script><!--<script>window.pwned=3//\u2028",
]


def latent(index: int, density: float, max_act: float, words: list[str]) -> LatentSnippets:
    """A latent that is active on the middle one of three words, in as many texts as there are words."""
    texts = [
        Snippet(
            ["the", f" {word}", f" of {word}s"],
            [0.0, max_act * (1 - i / 10), 0.2 * max_act],
            1,
            "held_out" if i else "train",
        )
        for i, word in enumerate(words)
    ]
    return LatentSnippets(index, density, max_act, max_act / 2, [words[0]], [4, 0, 2, 1], texts)


def write_run(run: Path) -> Path:
    run.mkdir()
    (run / "config.toml").write_text(
        'model = "org/tiny-model"\ndataset = "org/<b>texts</b>"\nhookpoint = "layers.3"\n'
        f"d_sae = {D_SAE}\nk = 4\nlr = 2e-4\ntokens = 512000\nnormalise = true\n"
        "dead_after_tokens = 51200\nauxk_alpha = 0.03125\n",
        "utf-8",
    )
    lines = [
        {
            "step": step,
            "tokens": step * 1024,
            "fvu": 0.1 + math.exp(-step / 100),
            "auxk_loss": None,
            "l0": 4.0,
            "dead_latents": min(step // 50, 3),
            "lr": 2e-4,
        }
        for step in range(0, 501, 10)
    ]
    lines += [{"step": step, "held_out_fvu": 0.12 + math.exp(-step / 100)} for step in (0, 250)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    evaluation = {"fvu": 0.1234, "l0": 3.97, "dead_latents": 3, "d_in": 16, "d_sae": D_SAE, "k": 4}
    evaluation |= {"held_out_tokens": 20480, "train_tokens": 512000, "steps": 500}
    evaluation |= {"tokens_per_second": 65432.1, "train_seconds": 83.0}
    (run / "evaluation.json").write_text(json.dumps(evaluation), "utf-8")
    generator = torch.Generator().manual_seed(0)
    density = 10 ** (torch.randn(D_SAE, generator=generator) * 0.5 - 2)
    density[:6] = 0
    is_dead = torch.arange(D_SAE) < 3
    arrays = {
        "latent_density": density,
        "is_dead": is_dead,
        "decoder_norm": torch.ones(D_SAE),
        "encoder_decoder_cosine": torch.rand(D_SAE, generator=generator),
        "nearest_decoder_cosine": torch.rand(D_SAE, generator=generator),
    }
    save_file(arrays, run / "latents.safetensors")
    latents = [
        latent(7, 0.01, 3.0, ["river", "stream", "brook", "lake", "delta", "estuary"]),
        latent(20, 0.2, 9.5, ["violin", "cello"]),
        latent(21, 0.001, 5.0, ["lake"]),
        latent(70, 0.05, 1.0, PAYLOADS),
    ]
    write_snippets(run / "snippets.json", Snippets(20480, latents, 12345))
    return run


@pytest.fixture(scope="session")
def make_run() -> Callable[[Path], Path]:
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    return write_run


@pytest.fixture(scope="session")
def payloads() -> list[str]:
    """Hostile texts in the snippets of latent 70, as a reader should see them."""
    return [payload.removesuffix("\u2028") for payload in PAYLOADS]


@pytest.fixture
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw nothing, for tests of the rest of the page: figures are slow and have tests of their own."""
    for name in ("curve", "histogram", "dots"):
        monkeypatch.setattr(plots, name, lambda *_, **__: "<svg></svg>")


@pytest.fixture
def run(tmp_path: Path, make_run: Callable[[Path], Path]) -> Path:
    return make_run(tmp_path / "run")


@pytest.fixture
def render(without_figures: None) -> Callable[[Path], Page]:
    """Render without the figures, and read."""
    return lambda run: Page(render_report(run).read_text("utf-8"))
