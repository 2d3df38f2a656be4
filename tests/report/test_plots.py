import re
import sys
import xml.etree.ElementTree as ElementTree
from typing import Any

import numpy as np
import pytest

from flashsae.architecture import Term
from flashsae.errors import MissingExtraError
from flashsae.metrics import METRICS, table
from flashsae.report.drawing import number
from flashsae.report.plots import Plot, latent_map, latent_plots, training_plots

pytest.importorskip("matplotlib")

EVALUATION = {"steps": 100, "fvu": 0.2}


def metrics() -> list[dict[str, Any]]:
    return [
        {"step": step, "fvu": 1 / (1 + step), "l0": 8.0, "dead_latents": 3, "lr": 1e-4} for step in range(0, 100, 5)
    ]


def arrays(d_sae: int = 300) -> dict[str, Any]:
    random = np.random.default_rng(0)
    return {
        "latent_density": np.where(np.arange(d_sae) < 20, 0.0, 10 ** random.normal(-3, 0.5, d_sae)),
        "decoder_norm": np.ones(d_sae),
        "encoder_decoder_cosine": random.uniform(-0.2, 0.9, d_sae),
        "nearest_decoder_cosine": np.where(np.arange(d_sae) < 7, 0.95, 0.3),
    }


def every_plot() -> list[Plot]:
    return [*training_plots(metrics(), EVALUATION), *latent_plots(arrays()), latent_map(arrays(), [30, 41])]


def texts(svg: str) -> list[str]:
    return [
        "".join(node.itertext()).strip() for node in ElementTree.fromstring(svg).iter() if node.tag.endswith("text")
    ]


def by_name(plots: list[Plot], name: str) -> Plot:
    return next(plot for plot in plots if plot.name == name)


def path(svg: str, colour: str) -> list[tuple[float, float]]:
    """The vertices of the curve drawn in a colour; only curves are clipped, samples in the legend are not."""
    (line,) = re.findall(rf'<path d="([^"]*)" clip-path=[^>]*style="fill: none; stroke: var\({colour}\)', svg)
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] ([\d.]+) ([\d.]+)", line)]


def test_drawing_twice_gives_the_same_bytes() -> None:
    assert every_plot() == every_plot()


def test_ids_are_unique_and_references_resolve_across_figures() -> None:
    ids: list[str] = []
    for plot in every_plot():
        own = re.findall(r'\bid="([^"]+)"', plot.svg)
        ids += own
        references = re.findall(r'(?:url\(#|xlink:href="#)([^")]+)', plot.svg)
        assert set(references) <= set(own)
    assert len(ids) == len(set(ids)) > 100


def test_figures_stand_alone_and_follow_the_page_colours() -> None:
    for plot in every_plot():
        assert plot.svg.startswith("<svg")
        assert "<style" not in plot.svg
        assert "<metadata" not in plot.svg
        assert "var(--accent)" in plot.svg
        assert not re.findall(r"#[0-9a-f]{6}\b", plot.svg)
        assert "width=" not in plot.svg.split(">")[0]


def test_user_settings_of_matplotlib_neither_matter_nor_change() -> None:
    import matplotlib

    expected = every_plot()
    with matplotlib.rc_context({"font.size": 20, "axes.labelsize": 30, "xtick.major.width": 9}):
        assert every_plot() == expected
        assert matplotlib.rcParams["font.size"] == 20


def test_a_quantity_that_was_not_logged_has_no_figure() -> None:
    logged = [{"step": 0, "fvu": 1.0, "l0": None, "lr": float("nan")}, {"step": 5, "fvu": 0.5, "dead_latents": "x"}]
    assert [plot.name for plot in training_plots(logged, EVALUATION)] == ["fvu"]
    assert training_plots([], EVALUATION) == []


def test_records_of_another_kind_are_left_out() -> None:
    odd = [{"step": value, "l0": 8.0} for value in (True, "3", None, float("nan"), 10**400)]
    odd += [{"step": 1, "l0": value} for value in (True, "8", [8], float("inf"), 10**400)]
    assert training_plots(odd, EVALUATION) == []


def test_held_out_curve_ends_at_the_final_evaluation() -> None:
    logged = [*metrics(), {"step": 50, "held_out_fvu": 0.4}]
    svg = by_name(training_plots(logged, EVALUATION), "fvu").svg
    assert {"training", "held out"} <= set(texts(svg))
    held_out = path(svg, "--accent")
    training = path(svg, "--muted")
    assert len(held_out) == 2
    assert held_out[1][0] > training[-1][0]
    again = [*logged, {"step": 100, "held_out_fvu": 0.3}]
    plot = by_name(training_plots(again, EVALUATION), "fvu")
    assert path(plot.svg, "--accent") == held_out
    assert "Held-out tokens: 0.4000 at step 50, 0.2000 at step 100." in plot.caption


def test_the_later_record_of_a_step_counts() -> None:
    logged = [{"step": 0, "l0": 5.0}, {"step": 1, "l0": 9.0}, {"step": 1, "l0": 5.0}]
    (start, end) = path(by_name(training_plots(logged, EVALUATION), "l0").svg, "--accent")
    assert start[1] == end[1]


def test_long_runs_are_thinned_but_keep_both_ends() -> None:
    noise = np.random.default_rng(0).uniform(7, 9, 20_000)
    logged = [{"step": step, "l0": float(value)} for step, value in enumerate(noise)]
    curve = path(by_name(training_plots(logged, EVALUATION), "l0").svg, "--accent")
    short = path(by_name(training_plots([logged[0], logged[-1]], EVALUATION), "l0").svg, "--accent")
    assert 500 < len(curve) <= 1200
    assert [curve[0][0], curve[-1][0]] == pytest.approx([short[0][0], short[1][0]])


@pytest.mark.usefixtures("without_figures")
def test_captions_count_the_dead_and_the_twins() -> None:
    plots = latent_plots(arrays())
    assert "20 of 300 were not active on this sample and are not drawn" in by_name(plots, "density").caption
    assert "7 of 300 latents have a neighbour above 0.9" in by_name(plots, "nearest").caption


def test_histograms_name_their_median() -> None:
    assert "median 0.3" in texts(by_name(latent_plots(arrays()), "nearest").svg)


def test_ticks_of_a_narrow_histogram_are_told_apart() -> None:
    narrow = arrays() | {"decoder_norm": np.linspace(1.266, 1.294, 300)}
    ticks = texts(by_name(latent_plots(narrow), "norm").svg)
    norms = [each for each in ticks if each.startswith("1.2")]
    assert len(norms) > 2
    assert len(set(norms)) == len(norms)


SETTINGS = {"dead_after_tokens": 6000}
RUN = EVALUATION | {"train_tokens": 60_000}


def captions(metrics: list[dict[str, Any]], run: dict[str, Any] = RUN, **settings: Any) -> dict[str, str]:
    return {plot.name: plot.caption for plot in training_plots(metrics, run, SETTINGS | settings)}


@pytest.mark.usefixtures("without_figures")
def test_captions_say_what_the_curves_show() -> None:
    found = captions(metrics())
    assert found["fvu"].endswith(
        "Batches of training: 1.0000 at step 0, 0.0104 at step 95. Held-out tokens: 0.2000 at step 100."
    )
    for name, course in (("l0", "8.0 throughout."), ("dead_latents", "3 throughout."), ("lr", "0.0001 throughout.")):
        window = " dead_after_tokens is 6,000." if name == "dead_latents" else ""
        assert found[name] == f"{METRICS[name].caption} {course}{window}"


@pytest.mark.usefixtures("without_figures")
def test_captions_of_a_run_that_went_badly_do_not_say_otherwise() -> None:
    bad = [
        {"step": step, "fvu": fvu, "l0": l0, "dead_latents": dead, "lr": lr}
        for step, fvu, l0, dead, lr in [(0, 0.9, 7.0, 0, 1e-3), (1, 0.2, 5.0, 90, 2e-3), (2, 40.0, 0.5, 80, 0.0)]
    ]
    found = captions(bad, EVALUATION | {"fvu": 35.0, "train_tokens": 300})
    assert "0.9000 at step 0, 40.0000 at step 2, lowest 0.2000 at step 1. Held-out tokens: 35.0000" in found["fvu"]
    assert found["l0"].endswith("7.0 at step 0, 0.5 at step 2.")
    assert "0 at step 0, 80 at step 2, highest 90 at step 1." in found["dead_latents"]
    assert "None can be dead after the 300 tokens of this run." in found["dead_latents"]
    assert found["lr"].endswith("0.001 at step 0, 0 at step 2, highest 0.002 at step 1.")
    for words in ("should", "healthy", "normal", "bring"):
        assert words not in " ".join(found.values())


def test_a_run_of_one_line_and_unknown_settings_has_captions() -> None:
    (line,) = [{"step": 10, "fvu": 0.5, "l0": 8.0, "dead_latents": 0, "lr": 1e-4}]
    plots = training_plots([line], {"steps": 10, "fvu": float("nan")})
    assert [plot.name for plot in plots] == ["fvu", "l0", "dead_latents", "lr"]
    assert plots[0].caption.endswith("explain. 0.5000 at step 10.")
    assert plots[2].caption.endswith(" 0 at step 10.")
    assert plots[3].caption.endswith(" 0.0001 at step 10.")
    assert all("nan" not in plot.svg + plot.caption for plot in plots)


@pytest.mark.usefixtures("without_figures")
def test_a_term_of_the_loss_is_drawn_with_what_its_architecture_says_of_it() -> None:
    term = Term("penalty", "Σ|acts|", "How large activations are.", lambda step: None, weight="l1_coefficient")
    logged = [line | {"penalty": 100.0 - line["step"], "<i>'\"": 1.0} for line in metrics()]
    plots = training_plots(logged, EVALUATION, {}, table([term]))
    plot = by_name(plots, "penalty")
    assert plot.title == "Penalty"
    assert plot.caption == (
        "How large activations are. Its weight in the loss is l1_coefficient. 100 at step 0, 5 at step 95."
    )
    (unknown,) = [plot for plot in plots if plot.title == "<i>'\""]  # of an architecture that is not registered here
    assert unknown.caption == "1 throughout."
    assert re.fullmatch(r"[\w-]+", unknown.name)
    assert len(plots) == 6


@pytest.mark.usefixtures("without_figures")
def test_whatever_is_logged_of_held_out_tokens_stands_beside_the_same_of_training() -> None:
    logged = [line | {"held_out_l0": 7.0} for line in metrics()]
    plots = training_plots(logged, EVALUATION)
    assert [plot.name for plot in plots] == ["fvu", "l0", "dead_latents", "lr"]
    assert by_name(plots, "l0").caption.endswith(
        "Batches of training: 8.0 throughout. Held-out tokens: 7.0 throughout."
    )


@pytest.mark.usefixtures("without_figures")
def test_a_dictionary_whose_latents_write_in_another_place_than_they_read_has_no_agreement() -> None:
    known = arrays()
    del known["encoder_decoder_cosine"]
    assert [plot.name for plot in latent_plots(known)] == ["density", "norm", "nearest"]


@pytest.mark.parametrize("values", [[0.0, 0.0], [0.5, 0.0], [1e300, 1e-300], [-0.1, 0.2], [1e12]])
def test_odd_curves_can_be_drawn(values: list[float]) -> None:
    logged = [{"step": step, "fvu": value, "l0": value, "lr": value} for step, value in enumerate(values)]
    for plot in training_plots(logged, EVALUATION | {"fvu": values[0]}):
        ElementTree.fromstring(plot.svg)
        assert len(texts(plot.svg)) < 30
        assert len(path(plot.svg, "--accent")) == (1 if plot.name == "fvu" else len(values))


@pytest.mark.usefixtures("without_figures")
def test_dead_is_told_from_silent_on_the_sample() -> None:
    known = arrays() | {"is_dead": (np.arange(300) < 5).astype(float)}
    caption = by_name(latent_plots(known), "density").caption
    assert caption.endswith(
        "20 of 300 were not active on this sample and are not drawn; 5 of these were dead at the end of training."
    )
    assert "never" not in by_name(latent_plots(arrays()), "density").caption
    awake = arrays() | {"latent_density": np.full(300, 0.1)}
    assert by_name(latent_plots(awake), "density").caption.endswith("All 300 were active.")


@pytest.mark.usefixtures("without_figures")
def test_the_map_says_how_many_dots_it_leaves_out() -> None:
    assert "one of the 280 latents that were active on the sample: " in latent_map(arrays(), []).caption
    assert (
        "one of the 3,980 latents that were active on the sample, 2,500 of which are drawn"
        in latent_map(arrays(4000), []).caption
    )


def test_log_axis_is_labelled_with_what_it_stands_for() -> None:
    labels = texts(by_name(latent_plots(arrays()), "density").svg)
    assert {"10⁻⁴", "0.001", "0.01"} <= set(labels)


@pytest.mark.parametrize("value", [0.0, 1.0, float("nan"), 1e-9])
def test_odd_dictionaries_can_be_drawn(value: float) -> None:
    odd = {name: np.full(5, value) for name in arrays()}
    for plot in [*latent_plots(odd), latent_map(odd, [0, 4, 77])]:
        ElementTree.fromstring(plot.svg)
        assert "nan" not in plot.svg


def test_dots_of_shown_latents_link_to_their_cards() -> None:
    dead = 3
    svg = latent_map(arrays(), [dead, 30, 41]).svg
    assert re.findall(r'<a href="([^"]*)"', svg) == ["#latent-30", "#latent-41"]
    assert re.findall(r'<a href="([^"]*)"', latent_map(arrays(), [30]).svg) == ["#latent-30"]
    assert "latent:" not in svg


def test_large_dictionaries_stay_small_on_the_page() -> None:
    assert len(latent_map(arrays(100_000), []).svg) < 600_000


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"flashsae\[report\]"):
        latent_plots(arrays())


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0005, "0.0005"),
        (0.003, "0.003"),
        (0.00005, "5·10⁻⁵"),
        (1e-6, "10⁻⁶"),
        (0, "0"),
        (12_000, "12k"),
        (1e13, "10¹³"),
    ],
)
def test_numbers_of_an_axis_are_written_alike(value: float, text: str) -> None:
    assert number(value) == text
