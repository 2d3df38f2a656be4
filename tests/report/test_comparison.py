"""The page that compares the SAEs of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from flashsae.errors import CheckpointError
from flashsae.report import comparison
from flashsae.report.comparison import comparison_table, render_comparison
from flashsae.report.drawing import pareto
from flashsae.train.failure import write_failure
from helpers.compared import write_compared

PAYLOAD = "<script>window.pwned=1</script>"


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[list[Path]], str]:
    """Render without figures, and read."""
    pytest.importorskip("jinja2")
    monkeypatch.setattr(comparison, "pareto", lambda name, lines, labels: f"<svg>{name} {sorted(lines)}</svg>")
    return lambda folders: render_comparison(tmp_path, folders).read_text("utf-8")


def test_a_row_for_each_with_what_differs_and_a_link_to_its_report(page: Any, tmp_path: Path) -> None:
    folders = [write_compared(tmp_path, f"topk-k{k}", fvu, k=k) for k, fvu in ((4, 0.25), (8, 0.125))]
    folders.append(write_compared(tmp_path, "batch_topk", 0.2, arch="batch_topk", k=8, lr=3e-3))
    (folders[0] / "report.html").touch()
    text = page(folders)
    assert '<a href="topk-k4/report.html">topk-k4</a>' in text
    assert "topk-k8/report.html" not in text
    heads = text.partition("<thead>")[2].partition("</thead>")[0]
    assert [head for head in ("arch", "k", "lr", "held-out FVU", "L0") if f">{head}</th>" in heads] == [
        "arch", "k", "lr", "held-out FVU", "L0",
    ]  # fmt: skip
    assert '<th scope="col">arch</th><th scope="col" class="number">k</th>' in heads  # as the cells below stand
    assert ">d_sae</th>" not in heads
    assert "<td>64</td>" in text.partition('id="settings"')[2]
    assert 'data-key="0.125">0.1250</td>' in text
    assert "3 (4.7%)" in text
    assert "['BatchTopK, lr 0.003', 'TopK, lr 0.001']" in text
    assert "pareto-1" not in text


def test_a_rate_that_follows_from_the_size_is_no_column(page: Any, tmp_path: Path) -> None:
    folders = [write_compared(tmp_path, f"d{size}", 0.2, d_sae=size, lr=1 / size) for size in (32, 64)]
    heads = page(folders).partition("<thead>")[2].partition("</thead>")[0]
    assert ">d_sae</th>" in heads
    assert ">lr</th>" not in heads


def test_hookpoints_have_figures_of_their_own(page: Any, tmp_path: Path) -> None:
    text = page([write_compared(tmp_path, name, 0.2, hookpoint=name) for name in ("h.1", "h.2")])
    assert "pareto-0" in text
    assert "pareto-1" in text
    assert ">hookpoint</th>" in text


def test_one_that_failed_is_named_with_the_reason(page: Any, tmp_path: Path) -> None:
    folders = [write_compared(tmp_path, "good"), write_compared(tmp_path, "bad", None, k=8)]
    write_failure(folders[1], f"step 3: the loss is nan {PAYLOAD}")
    text = page(folders)
    assert "<strong>bad</strong> failed: step 3: the loss is nan &lt;script&gt;" in text
    assert "bad (failed)" in text
    console = Console(width=120)
    with console.capture() as shown:
        console.print(comparison_table(folders))
    assert "failed" in shown.get()
    write_failure(folders[0], "too")
    assert "No SAE of this run has figures." in page(folders)


def test_what_stands_in_files_is_text(page: Any, tmp_path: Path) -> None:
    folders = [
        write_compared(
            tmp_path, f"k{k}", 0.2, k=k, model=PAYLOAD, hookpoint=PAYLOAD, dataset="/home/me/secret/texts.txt"
        )
        for k in (1, 2)
    ]
    text = page(folders)
    assert PAYLOAD not in text
    assert "/home/me" not in text


def test_a_file_that_is_missing_or_damaged_is_told(page: Any, tmp_path: Path) -> None:
    folders = [write_compared(tmp_path, "a"), write_compared(tmp_path, "b", None)]
    with pytest.raises(CheckpointError, match=r"b/evaluation\.json"):
        page(folders)
    (folders[1] / "failed.json").write_text('{"error": "x"}')
    with pytest.raises(CheckpointError, match=r"failed\.json is damaged .* Put a copy of it back"):
        page(folders)


def test_figures_that_are_no_numbers_have_no_dot(page: Any, tmp_path: Path) -> None:
    folders = [write_compared(tmp_path, "a"), write_compared(tmp_path, "b", float("nan"), k=8)]
    text = page(folders)
    assert "not finite" in text
    assert "FVU 0.2000 at L0 4.0" in text


@pytest.mark.parametrize("ends", [(0.11, 0.16), (0.01, 0.9), (0.2, 0.2)])
def test_the_plot_has_the_colours_of_the_page_and_ticks(ends: tuple[float, float]) -> None:
    np = pytest.importorskip("numpy")
    pytest.importorskip("matplotlib")
    lines = {f"<{n}>": (np.array([8.0, 64.0]), np.array(ends)) for n in range(8)}
    svg = pareto("plot", lines, ("active latents", "FVU"))
    assert all(f"var(--series-{n})" in svg for n in range(1, 7))
    assert "#0a0a" not in svg
    assert "&lt;7&gt;" in svg
    assert svg.count("<text") >= 8 + 2 + 3
    assert svg == pareto("plot", lines, ("active latents", "FVU"))
