import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file

from flashsae.architecture import architecture_named
from flashsae.errors import CheckpointError, MissingExtraError
from flashsae.metrics import METRICS
from flashsae.report.render import _own, render_report
from flashsae.report.snippets import LatentSnippets, Snippet, Snippets, write_snippets
from flashsae.run.execute import draw_report
from helpers.page import Page


def test_report_shows_what_the_run_holds(run: Path) -> None:
    path = render_report(run)
    assert path == run / "report.html"
    page = Page(path.read_text("utf-8"))
    for expected in (
        "org/tiny-model", "layers.3", "org/<b>texts</b>", "0.1234", "87.7% of the variance explained", "4.0",
        "of 96 (3.1%)", "512k", "65,432",
        "not active on the last 51,200 training tokens", "on 20,480 held-out tokens",
        "12,345 of them are held out, too few for all examples: 8 of the 12 texts", "6 of 96 were not active",
        "3 of these were dead at the end of training",
        "16 → 96 latents, k = 4", "500 steps in 1 min 23 s", "4 latents, spread",
        "512,000", "true", "violin",
    ):  # fmt: skip
        assert expected in page.text, expected
    assert len(page.classed("card")) == 4
    assert [attrs["id"] for tag, attrs in page.elements if tag == "figure"] == [
        f"figure-{name}"
        for name in ("fvu", "l0", "dead_latents", "lr", "density", "norm", "alignment", "nearest", "map")
    ]
    assert page.text.count("2 more") == 1


def test_tokens_are_shaded_by_their_share_of_the_largest_value(run: Path, render: Callable[[Path], Page]) -> None:
    snippet = Snippet(["a", " b", " c", "d"], [0.0, 4.0, 1.0, 0.0], 1)
    write_snippets(run / "snippets.json", Snippets(4, [LatentSnippets(3, 0.5, 8.0, 2.5, [], [2], [snippet])]))
    page = render(run)
    assert [(act["style"], act["title"], act["class"]) for act in page.classed("act")] == [
        ("--a:0.5", "4", "act peak"),
        ("--a:0.12", "1", "act"),
    ]
    assert "a b cd" in page.text


def test_ids_are_unique(run: Path, render: Callable[[Path], Page]) -> None:
    ids = [attrs["id"] for _, attrs in render(run).elements if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_rendering_twice_gives_the_same_bytes(run: Path) -> None:
    first = render_report(run).read_bytes()
    assert render_report(run).read_bytes() == first
    assert sorted(file.name for file in run.iterdir()) == [
        "config.toml", "evaluation.json", "latents.safetensors", "metrics.jsonl", "report.html", "snippets.json",
    ]  # fmt: skip


def test_run_on_plain_arrays_says_so(run: Path, render: Callable[[Path], Page]) -> None:
    (run / "snippets.json").unlink()
    (run / "config.toml").write_text("d_sae = 96\n", "utf-8")
    page = render(run)
    assert "trained on plain arrays" in page.text
    assert "Sparse autoencoder" in page.text
    assert not page.classed("card")
    assert not [1 for _, attrs in page.elements if attrs.get("id") == "query"]


def test_run_without_logged_metrics_or_active_latents_says_so(run: Path, render: Callable[[Path], Page]) -> None:
    (run / "metrics.jsonl").write_text("", "utf-8")
    write_snippets(run / "snippets.json", Snippets(2000, []))
    page = render(run)
    assert "No metrics were logged" in page.text
    assert "No latent was active on the 2k" in page.text


@pytest.mark.usefixtures("without_figures")
def test_last_line_of_the_log_may_be_cut_short(run: Path) -> None:
    whole = render_report(run).read_bytes()
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 510, "fv')
    assert render_report(run).read_bytes() == whole


def test_damage_within_the_log_is_named_with_its_line(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text("utf-8").splitlines()
    lines[3] = lines[3][:-5]
    (run / "metrics.jsonl").write_text("\n".join(lines), "utf-8")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl, line 4 is damaged"):
        render_report(run)


@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluation.json", "latents.safetensors", "snippets.json"])
def test_unfinished_run_says_how_to_finish_it(run: Path, name: str) -> None:
    (run / name).unlink()
    with pytest.raises(CheckpointError, match=f"has no {name}.*flashsae train --resume") as error:
        render_report(run)
    assert str(run) in str(error.value)
    assert not (run / "report.html").exists()


def test_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not the folder of a training run.*config\.toml"):
        render_report(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["config.toml", "evaluation.json", "latents.safetensors", "snippets.json"])
def test_damaged_file_is_named(run: Path, name: str) -> None:
    (run / name).write_bytes(b"\xff{not this")
    with pytest.raises(CheckpointError, match=re.escape(name)):
        render_report(run)


@pytest.mark.parametrize("value", [None, "0.1", [0.1], True])
def test_evaluation_without_a_number_is_named(run: Path, value: object) -> None:
    stored = json.loads((run / "evaluation.json").read_text("utf-8"))
    (run / "evaluation.json").write_text(json.dumps(stored | {"fvu": value}), "utf-8")
    with pytest.raises(CheckpointError, match="fvu: expected a number, got"):
        render_report(run)


def test_array_that_is_missing_or_of_another_shape_is_named(run: Path) -> None:
    path = run / "latents.safetensors"
    arrays = load_file(path)
    save_file(arrays | {"decoder_norm": arrays["decoder_norm"][:5]}, path)
    with pytest.raises(CheckpointError, match=r"'decoder_norm' of shape \[d_sae\], got \[5\]"):
        render_report(run)
    del arrays["latent_density"]
    save_file(arrays, path)
    with pytest.raises(CheckpointError, match=r"'latent_density' .* got nothing"):
        render_report(run)


def test_optional_numbers_may_be_absent_or_not_finite(run: Path, render: Callable[[Path], Page]) -> None:
    stored = json.loads((run / "evaluation.json").read_text("utf-8"))
    for name in ("k", "tokens_per_second", "train_seconds"):
        del stored[name]
    (run / "evaluation.json").write_text(json.dumps(stored | {"fvu": float("nan")}), "utf-8")
    page = render(run)
    assert "not finite" in page.text
    assert "tokens/s" not in page.text
    assert "latents, k =" not in page.text
    for value in (float("nan"), float("inf"), None, "x", True, 10**400):
        odd = dict.fromkeys(("k", "tokens_per_second", "train_seconds"), value)
        (run / "evaluation.json").write_text(json.dumps(stored | odd), "utf-8")
        assert "tokens/s" not in render(run).text


def of_architecture(run: Path, name: str, settings: dict[str, object], term: str) -> None:
    """Let a run be one of another architecture, whose loss has a term of its own."""
    stored = json.loads((run / "evaluation.json").read_text("utf-8"))
    del stored["k"]
    (run / "evaluation.json").write_text(json.dumps(stored | {"architecture": name, "settings": settings}), "utf-8")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line | {term: 0.5}) + "\n" for line in lines), "utf-8")


def test_a_term_of_the_loss_comes_with_its_caption_and_formula(run: Path, render: Callable[[Path], Page]) -> None:
    of_architecture(run, "batch_topk", {"k": 7}, "auxk_loss")
    page = render(run)
    term = next(term for term in architecture_named("batch_topk").terms if term.name == "auxk_loss")
    assert "BatchTopK, 16 → 96 latents, k = 7" in page.text
    assert term.caption in page.text
    assert term.formula in page.text
    assert METRICS["dead_latents"].formula in page.text
    assert [attrs for _, attrs in page.elements if attrs.get("id") == "figure-auxk_loss"]


@pytest.mark.parametrize("name", ["sparse_soup", "<img src=x>", "os"])
def test_a_run_of_an_architecture_that_is_not_registered_here_is_drawn(
    run: Path, render: Callable[[Path], Page], name: str
) -> None:
    of_architecture(run, name, {"threshold": 0.25, "kind": "soft", "levels": [1, 2]}, "<b>soup</b> loss")
    page = render(run)
    assert f"{name}, 16 → 96 latents, threshold = 0.25, kind = soft" in page.text
    assert "<b>soup</b> loss" in page.text
    assert page.count("b") == page.count("img") == 0
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert all(re.fullmatch(r"[\w-]+", str(each)) for each in ids)


@pytest.mark.parametrize("module", ["jinja2", "matplotlib"])
def test_missing_extra_is_named(run: Path, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"'{module}'.*flashsae\[report\]"):
        render_report(run)


def test_latents_without_a_card_are_packed_in(run: Path, render: Callable[[Path], Page]) -> None:
    (section,) = [attrs for tag, attrs in render(run).elements if attrs.get("id") == "latents"]
    assert section["data-d-sae"] == "96"
    assert len(str(section["data-density"])) == 128
    assert len(str(section["data-dead"])) == 16


def test_a_run_that_does_not_know_its_dead_latents_can_be_drawn(run: Path, render: Callable[[Path], Page]) -> None:
    path = run / "latents.safetensors"
    arrays = load_file(path)
    del arrays["is_dead"]
    save_file(arrays, path)
    page = render(run)
    (section,) = [attrs for tag, attrs in page.elements if attrs.get("id") == "latents"]
    assert section["data-dead"] == ""
    assert "which is less than dead: that is counted in training" in page.text


@pytest.mark.parametrize("d_sae", [1, 2])
def test_tiny_dictionaries_can_be_drawn(run: Path, render: Callable[[Path], Page], d_sae: int) -> None:
    arrays = {name: values[50 : 50 + d_sae].clone() for name, values in load_file(run / "latents.safetensors").items()}
    save_file(arrays, run / "latents.safetensors")
    stored = json.loads((run / "evaluation.json").read_text("utf-8"))
    (run / "evaluation.json").write_text(json.dumps(stored | {"d_sae": d_sae, "k": 1, "dead_latents": 0}), "utf-8")
    page = render(run)
    assert f"of {d_sae} (0.0%)" in page.text


@pytest.mark.usefixtures("without_figures")
def test_a_run_whose_architecture_is_not_there_is_drawn_again(run: Path) -> None:
    path = run / "config.toml"
    path.write_text(path.read_text().replace("k = 4", 'arch = "mine"\nwidth = 4'))
    (run / "report.html").unlink(missing_ok=True)
    assert draw_report(run, Console(quiet=True)) == [run / "report.html"]
    assert "mine" in (run / "report.html").read_text("utf-8")


def test_settings_at_their_default_are_not_told_but_for_the_first() -> None:
    settings = {"k": 32, "multi_topk": 0.125, "k_start": None, "k_anneal": "linear", "of_later_versions": 2}
    told = _own(settings, architecture_named("topk"))
    assert told == {"k": 32, "multi_topk": 0.125, "of_later_versions": 2}
    assert _own(settings, None) == settings
