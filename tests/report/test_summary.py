import json
from pathlib import Path

import pytest

from flashsae.report.render import render_report
from flashsae.report.summary import final_figures, result_lines


def test_figures_are_those_of_the_evaluation() -> None:
    evaluation = {"fvu": 0.08956, "l0": 32.0, "dead_latents": 29.0, "d_sae": 4096, "tokens_per_second": 16244.6}
    assert [f"{figure.name}: {figure.line()}" for figure in final_figures(evaluation)] == [
        "held-out FVU: 0.0896 (91.0% of the variance explained)",
        "L0: 32.0",
        "dead latents: 29 of 4,096 (0.7%)",
        "tokens/s: 16,245",
    ]


def test_outliers_are_named_where_there_are_any() -> None:
    evaluation = {"fvu": 0.037, "fvu_without_outliers": 0.32, "outliers": 16, "l0": 8.0, "dead_latents": 0}
    evaluation |= {"d_sae": 512, "held_out_tokens": 4096}
    names = {figure.name: figure.line() for figure in final_figures(evaluation)}
    assert names["without outliers"] == "0.3200 (less 16 of 4,096 tokens, of norms above 10 times the median)"
    assert "without outliers" not in {figure.name for figure in final_figures(evaluation | {"outliers": 0})}


def test_sites_have_figures_of_their_own(run: Path) -> None:
    evaluation = json.loads((run / "evaluation.json").read_text("utf-8"))
    of_sites = {"h.1": 0.25, "h.2": None, "h.3": 1.5}
    lines = result_lines({**evaluation, "site_fvu": of_sites})
    assert lines["held-out FVU at h.1"] == "0.2500 (75.0% of the variance explained)"
    assert lines["held-out FVU at h.3"] == "1.5000 (worse than the mean)"
    assert len(lines) == len(result_lines(evaluation)) + 2
    assert result_lines({**evaluation, "site_fvu": "h.1"}) == result_lines(evaluation)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 10**400])
def test_what_is_not_finite_is_called_so(value: float) -> None:
    evaluation = dict.fromkeys(("fvu", "l0", "dead_latents", "d_sae", "tokens_per_second"), value)
    assert [figure.line() for figure in final_figures(evaluation)] == [
        "not finite",
        "not finite",
        "not finite of not finite",
    ]


@pytest.mark.parametrize(
    ("evaluation", "expected"),
    [
        ({"fvu": 2e-6}, "2.00e-06 (100.0% of the variance explained)"),
        ({"fvu": 1.5}, "1.5000 (worse than the mean)"),
        ({"fvu": 1e12}, "1.00e+12 (worse than the mean)"),
        ({"fvu": 0.0}, "0.0000 (100.0% of the variance explained)"),
    ],
)
def test_small_and_large_unexplained_variance_can_be_read(evaluation: dict[str, float], expected: str) -> None:
    figures = final_figures(evaluation | {"l0": 1.0, "dead_latents": 0, "d_sae": 0})
    assert figures[0].line() == expected
    assert figures[2].line() == "0 of 0"


@pytest.mark.usefixtures("without_figures")
def test_the_terminal_and_the_report_say_the_same(run: Path) -> None:
    evaluation = json.loads((run / "evaluation.json").read_text("utf-8"))
    printed = result_lines(evaluation)
    assert "tokens, on" not in " ".join(printed.values())
    few = result_lines({**evaluation, "held_out_tokens": 999})
    assert [line for name, line in few.items() if line != printed[name]] == [
        printed["held-out FVU"] + ", on 999 held-out tokens"
    ]
    page = render_report(run).read_text("utf-8")
    for figure in final_figures(evaluation):
        assert printed[figure.name] == figure.line()
        assert f">{figure.value}<" in page
        assert figure.note in page
