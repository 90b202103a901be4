"""Figures: one definition for the page and for the PNG file, in colours that stand once."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from gptray.reports.chart import Chart, Series
from gptray.reports.curves import curves_figure
from gptray.reports.page import DARK, LIGHT, PRINT, render, save_png
from gptray.reports.picture import Figure, Picture, Scale, dot, line, words
from gptray.reports.run.report import write_report
from gptray.reports.sweep.report import write_sweep_report
from tests.reports.curves import config_of, rows_of, started, write_run
from tests.reports.pages import Page
from tests.reports.test_run_report import EVIL, LOSSES, whole_evaluation, with_evaluation
from tests.reports.test_sweep_report import finished
from tests.serving.browser import chromium, needs_chromium
from tests.tuning.sweeps import sweep_config, trained, write_sweep

SVG = "{http://www.w3.org/2000/svg}"


def figure(title: str = "Loss", text: str = "best") -> Figure:
    shapes = [line("curve train", [(0, 0), (9, 9)], text), dot("dot val", (5, 5), 2, text)]
    picture = Picture(100, 50, text, [*shapes, words("label", (0, 20), text)])
    return Figure("loss", title, text, [("train", text)], picture)


def test_names_in_a_picture_are_text_whatever_they_hold(tmp_path: Path) -> None:
    drawing = ElementTree.fromstring(render("figure.svg.j2", figure=figure(EVIL, EVIL), css=""))
    shown = EVIL.replace("\x00", "\ufffd").replace("\x1b", "\ufffd")
    found = [element for element in drawing.iter() if element.text == shown]
    assert sorted(element.tag.removeprefix(SVG) for element in found) == sorted(
        ["tspan", "tspan", "tspan", "text", "title", "title"]
    )
    assert not [element for element in drawing.iter() if element.tag.endswith("script")]
    assert save_png(figure(EVIL, EVIL), tmp_path).read_bytes()[:4] == b"\x89PNG"


def test_a_png_file_shows_texts_and_shapes(tmp_path: Path) -> None:
    def drawn(one: Figure) -> bytes:
        return save_png(one, tmp_path).read_bytes()

    assert drawn(figure()) == drawn(figure())
    assert drawn(figure("Loss")) != drawn(figure("Gain"))
    empty = Figure("loss", "Loss", "best", [("train", "best")], Picture(100, 50, "", []))
    assert drawn(figure()) != drawn(empty)


def test_colours_of_the_style_sheets_stand_in_every_palette() -> None:
    palettes = {"light": LIGHT, "dark": DARK, "print": PRINT}
    styles = render("chart.css") + render("style.css.j2", palettes=palettes)
    used = set(re.findall(r"var\(--(\w+)\)", styles))
    assert used == set(LIGHT) == set(DARK) == set(PRINT)


@pytest.mark.parametrize("is_log", [False, True])
def test_a_scale_maps_values_and_clamps_those_beyond_it(is_log: bool) -> None:
    scale = Scale(1, 100, 0, 200, is_log=is_log)
    assert [scale.at(1), scale.at(100)] == [0, 200]
    assert scale.at(10) == pytest.approx(100 if is_log else 200 * 9 / 99)
    assert scale.clamped(1000) == 200 and scale.clamped(0.5) == 0 and scale.at(1000) > 200
    assert Scale(5, 5, 0, 200).at(5) == 0  # one value


def test_the_dot_of_a_trial_that_stopped_at_the_first_step_is_whole() -> None:
    stopped = Series("stopped at a rung", "cut", ((75, 3.0),))
    best = Series("the best trial", "winner", ((75, 2.9), (600, 2.5)))
    figure = curves_figure(
        Chart("trials", "Loss", "", (stopped, best), last=600, low=2.4, high=3.2, first=75)
    )
    for picture in (figure.wide, figure.narrow):
        assert picture
        (one,) = (shape for shape in picture.curves if shape.css == "dot cut")
        assert picture.plot[0] <= float(one.at["cx"]) - float(one.at["r"])


def test_a_run_of_few_steps_has_each_of_them_once_below_its_curves() -> None:
    figure = curves_figure(
        Chart("loss", "Loss", "", (Series("training", "train", ((1, 4.1), (2, 4.0))),), 2, 3.9, 4.2)
    )
    labels = [shape.text for shape in figure.wide.shapes if shape.css.split()[0] == "x"]
    assert labels == ["step 0", "1", "2"]


def test_options_that_differ_at_their_ends_are_told_apart_below_a_panel(tmp_path: Path) -> None:
    options = [[0.9, 0.99], [0.9, 0.95], [0.95, 0.999], [0.8, 0.9]]
    config = sweep_config([{"path": "optim.betas", "choice": options}], "tune.num_samples=12")
    made = trained(config, lambda values: (0.0, 0.0))
    page = Page(write_sweep_report(write_sweep(tmp_path, config, made), running=True))
    assert {"0.9:0.99", "0.9:0.95", "0.95:0.999", "0.8:0.9"} <= set(page.words)


@needs_chromium
def test_pages_fit_a_phone_and_a_wide_window(tmp_path: Path) -> None:
    rows = rows_of(LOSSES, every=2000)  # its steps are long numbers in three columns
    run = write_run(tmp_path / "run", rows, [started()], config_of(rows))
    with_evaluation(run, **whole_evaluation())
    pages = [write_report(run), write_sweep_report(finished(tmp_path / "sweep"))]
    with chromium(tmp_path / "profile") as tab:
        for path in pages:
            for width in (360, 1200):
                tab.open(path.as_uri(), width=width)
                assert tab.run("document.documentElement.scrollWidth") <= width
                # One of the two pictures of each figure is shown.
                shown = "[...document.querySelectorAll('svg.{}')].map((e) => e.clientWidth > 0)"
                is_narrow = width < 600
                assert set(tab.run(shown.format("narrow"))) == {is_narrow}
                assert set(tab.run(shown.format("wide"))) == {not is_narrow}
        assert tab.complaints == []
