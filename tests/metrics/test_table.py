from __future__ import annotations

import ast
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

import flashsae
from flashsae.architecture import Term, architecture_named, architecture_names
from flashsae.errors import ConfigError
from flashsae.logs.jsonl import read_log
from flashsae.metrics import METRICS, table
from flashsae.metrics.table import bare, of_evaluation
from flashsae.report.evaluation_file import RunEvaluation

SRC = Path(flashsae.__file__).parent
TERMS = [term for name in architecture_names() for term in architecture_named(name).terms]


def test_everything_that_training_logs_is_a_row_or_a_term(tmp_path: Path, generator: torch.Generator) -> None:
    x = torch.randn(1024, 6, generator=generator)
    config = flashsae.TrainConfig(tokens=256, batch_tokens=32, dead_after_tokens=32, clip_norm=1.0, log_every_steps=4)
    sae = flashsae.fit(x, d_sae=24, k=2, config=config, run=tmp_path / "run", progress=False)
    logged = {name for record in read_log(tmp_path / "run" / "metrics.jsonl") for name in record}
    assert {"grad_norm", "auxk_loss"} < logged  # of a term, and of a setting, both of which this training has
    assert logged <= table(TERMS).keys()
    assert "auxk_loss" not in METRICS
    assert flashsae.evaluate(sae, x).__dict__.keys() - {"tokens"} <= METRICS.keys()


def test_every_figure_of_an_evaluation_is_a_row() -> None:
    names = {field.name for field in fields(RunEvaluation)} - {"architecture", "settings"}
    for name in names:
        row = of_evaluation(name)
        assert row.name in (name, f"held_out_{name}")
    assert names <= METRICS.keys()
    assert of_evaluation("fvu") is METRICS["held_out_fvu"]
    assert of_evaluation("l0") is METRICS["l0"]


def test_rows_say_what_they_are() -> None:
    assert [name for name, row in METRICS.items() if row.name != name] == []
    for row in table(TERMS).values():
        assert row.label
        assert row.title
        assert re.fullmatch(r".*[^.]\.", row.caption), row
        assert row.show(0.5)
        assert row.show(float("nan")) == "not finite"


def strings(path: Path) -> set[str]:
    """Return the string literals of a file, and the parts of those that are put together."""
    return {
        node.value
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def test_no_title_label_or_caption_is_spelt_a_second_time() -> None:
    assert METRICS["fvu"].caption in strings(SRC / "metrics" / "table.py")
    texts = {text for row in METRICS.values() for text in (row.label, row.title, row.caption) if text != row.name}
    spelt = {text for text in texts if not re.fullmatch("[A-Za-z][a-z]+", text)}  # plain words may stand anywhere
    assert {"FVU", "tokens/s", "Dead latents"} < spelt
    found = {
        (path.name, text)
        for path in SRC.rglob("*.py")
        if path.name != "__init__.py" and path != SRC / "metrics" / "table.py"
        for text in spelt & strings(path)
    }
    assert not found
    page = (SRC / "report" / "template.html.j2").read_text("utf-8")
    assert not [text for text in spelt if f">{text}<" in page]


def test_a_term_says_itself_what_it_is() -> None:
    penalty = Term("penalty", "λ Σ|acts|", "How large activations are.", lambda step: None, weight=0.25)
    row = table([penalty])["penalty"]
    assert (row.label, row.title, row.formula, row.axis) == ("penalty", "Penalty", "λ Σ|acts|", "linear")
    assert row.caption == "How large activations are. Its weight in the loss is 0.25."
    assert "penalty" not in METRICS
    titles = [row.title for row in table(architecture_named("jump_relu").terms).values() if row.name not in METRICS]
    assert {"Quadratic penalty", "L0 penalty", "AuxK loss"} < set(titles)


@pytest.mark.parametrize("name", ["step", "tokens", "loss", "l0", "held_out_fvu"])
def test_a_term_cannot_take_the_place_of_a_metric(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^term {name}: expected a name that no metric has"):
        table([Term(name, "", "", lambda step: None)])


def test_the_reconstruction_keeps_the_row_of_the_fvu_and_says_its_formula() -> None:
    error = Term("fvu", "Σ‖y − y_hat‖² / Σ‖y‖²", "Something.", lambda step: None)
    assert table([error])["fvu"].formula == error.formula
    assert table([error])["fvu"].caption == METRICS["fvu"].caption


def test_what_nobody_knows_has_its_name() -> None:
    assert (bare("x").label, bare("x").title, bare("x").caption, bare("x").show(2.5)) == ("x", "x", "", "2.5")


def test_rows_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        METRICS["fvu"].label = "loss"  # type: ignore[misc]


def test_the_documentation_of_the_files_names_every_key() -> None:
    docs = (Path(__file__).parents[2] / "docs" / "formats.md").read_text("utf-8")
    assert [name for name in METRICS if f"`{name}`" not in docs] == []


def test_a_training_with_such_a_term_is_refused_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    topk = architecture_named("topk")
    wrong = replace(topk, terms=(*topk.terms, Term("step", "", "", lambda step: None)))
    monkeypatch.setitem(flashsae.architecture.description._REGISTERED, "topk", wrong)
    with pytest.raises(ConfigError, match="term step: expected a name"):
        flashsae.fit(torch.randn(64, 6), d_sae=24, k=2, config=flashsae.TrainConfig(batch_tokens=32), progress=False)
