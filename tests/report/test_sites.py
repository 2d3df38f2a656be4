"""The figure of an SAE of several sites: over which of them its latents are spread."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import flashsae
from flashsae.architecture import settings_of
from flashsae.evaluate import latent_geometry
from flashsae.report.sites import site_plots, sites_of
from flashsae.sae import SAEConfig

pytest.importorskip("matplotlib")


def test_of_two_sites_the_share_of_the_second_is_drawn() -> None:
    second = np.array([0.0, 0.05, 0.5, 0.5, 0.95, np.nan, 0.2])
    arrays = {"site_norms": np.stack([1 - second, second], 1) * 3, "is_dead": np.arange(7) == 6}
    (plot,) = site_plots(arrays, ["a", "b"])
    assert "of a (1) and b (2)" in plot.caption
    assert "Of 5, 2 are below 0.1, 2 between, 1 above 0.9. 1 dead ones are left out." in plot.caption
    assert "median 0.5" in plot.svg
    assert "a  ←  relative norm  →  b" in plot.svg
    assert re.search(r">\s*0\s*<.*>\s*1\s*<", plot.svg, re.DOTALL)  # the axis shows both ends, whatever there is


@pytest.mark.parametrize("latents", [1, 5, 700])
def test_of_more_sites_the_share_of_each_is_drawn_by_the_mean_site(latents: int) -> None:
    norms = np.random.default_rng(0).random((latents, 3)) ** 8
    norms[0] = [0.0, 2.0, 0.0]
    (plot,) = site_plots({"site_norms": norms}, ["in", "mid", "out"])
    most = np.bincount(norms.argmax(1), minlength=3)
    assert f"largest at these sites: {most[0]} at in, {most[1]} at mid, {most[2]} at out; " in plot.caption
    assert ("a latent, from" if latents < 97 else "the mean of about 8 latents, from") in plot.caption
    assert "dead" not in plot.caption
    ET.fromstring(plot.svg)
    assert plot.svg.count("fill-opacity") >= latents // 8
    assert "var(--accent)" in plot.svg
    assert "#0" not in plot.svg.replace("#sites", "")


def test_columns_go_from_the_first_site_to_the_last() -> None:
    from flashsae.report import sites

    seen = {}

    def shares(name: str, parts: np.ndarray, labels: list[str], x_label: str) -> str:
        seen[name] = parts
        return ""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sites, "shares", shares)
        site_plots({"site_norms": np.eye(3)[[2, 0, 1]] + 1e-9}, ["a", "b", "c"])
    np.testing.assert_allclose(seen["sites"], np.eye(3), atol=1e-8)


def test_nothing_is_drawn_of_what_is_not_known() -> None:
    norms = np.ones((4, 2))
    assert not site_plots({}, ["a", "b"])
    assert not site_plots({"site_norms": norms}, ["a", "b", "c"])
    assert not site_plots({"site_norms": norms[:, :1]}, ["a"])
    (plot,) = site_plots({"site_norms": norms * np.nan}, ["a", "b"])
    assert "Of 0, 0 are below" in plot.caption
    (plot,) = site_plots({"site_norms": np.zeros((4, 3))}, ["a", "b", "c"])
    assert "0 of 0 have more" in plot.caption
    ET.fromstring(plot.svg)


def test_names_of_sites_cannot_break_the_figure() -> None:
    names = ["$\\frac{ 層", "<script>&\x00", "x" * 300]
    (plot,) = site_plots({"site_norms": np.ones((4, 3))}, names)
    ET.fromstring(plot.svg)
    assert "<script>" not in plot.svg
    (plot,) = site_plots({"site_norms": np.ones((4, 2))}, names[:2])
    ET.fromstring(plot.svg)


def test_sites_and_widths_are_read_from_the_settings() -> None:
    assert sites_of({"k": 3}) == {}
    assert sites_of({"widths": [4, 5], "sites": None}) == {"site 0": 4, "site 1": 5}
    assert sites_of({"widths": [4, 5], "sites": ["a", "b"]}) == {"a": 4, "b": 5}
    assert sites_of({"widths": "45", "sites": "ab"}) == sites_of({"widths": ["4", None]}) == {}


def test_norms_by_site_are_those_of_training() -> None:
    arch = settings_of("crosscoder", k=2, sites=("a", "b"), widths=(2, 4))
    sae = flashsae.SAE(SAEConfig(6, 5, arch=arch))
    with torch.no_grad():
        sae.site_scale[:2], sae.site_scale[2:] = 3.0, 0.5
    norms = latent_geometry(sae)["site_norms"]
    expected = torch.stack([3 * sae.W_dec[:, :2].norm(dim=1), 0.5 * sae.W_dec[:, 2:].norm(dim=1)], 1)
    torch.testing.assert_close(norms, expected.detach())
    assert "site_norms" not in latent_geometry(flashsae.SAE(SAEConfig(6, 5, 2)))


def test_the_report_shows_them(make_run: Callable[[Path], Path], tmp_path: Path) -> None:
    from flashsae.report.render import render_report

    run = make_run(tmp_path / "run")
    tensors = load_file(run / "latents.safetensors")
    save_file({**tensors, "site_norms": torch.rand(96, 3)}, run / "latents.safetensors")
    evaluation = json.loads((run / "evaluation.json").read_text())
    settings = {"k": 4, "sites": ["h.1", "h.2", "h.3"], "widths": [8, 8, 16]}
    evaluation |= {"d_in": 32, "architecture": "crosscoder", "settings": settings}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    page = render_report(run).read_text("utf-8")
    assert "8 + 8 + 16 → 96 latents" in page
    assert "Decoder norms by site" in page
    assert page.index("Nearest decoder neighbour") < page.index("Decoder norms by site")
