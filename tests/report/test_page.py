"""The HTML report: self-contained, well-formed, and with the figures it promises."""

import dataclasses
import html.parser
import re

import numpy as np
import pytest

from qvla_jax.report import figures, render
from qvla_jax.report.heatmap import cost_bounds
from qvla_jax.report.page import size_text
from qvla_jax.report.svg import Axis, number, span

from .fakes import LAYERS, fake_map, fake_report

VOID = {"meta", "input", "br", "img"}


class Checker(html.parser.HTMLParser):
    """Checks that tags are balanced and collects what the page refers to."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.references, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        self.references += [v for k, v in attrs if k in ("href", "src") and v is not None]

    def handle_startendtag(self, tag, attrs):
        self.references += [v for k, v in attrs if k in ("href", "src") and v is not None]

    def handle_endtag(self, tag):
        assert self.open, f"closing </{tag}> without an opening one"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def page():
    return render(fake_report(), fake_map())


@pytest.fixture(scope="module")
def checker(page):
    checker = Checker()
    checker.feed(page)
    checker.close()
    return checker


def test_tags_are_balanced(checker):
    assert checker.open == []


def test_nothing_is_loaded_from_elsewhere(page, checker):
    assert all(r.startswith("data:image/png;base64,") for r in checker.references)
    assert "@import" not in page
    assert not re.search(r"url\(\s*['\"]?https?:", page)
    assert "<script" not in page


def test_every_method_and_layer_is_shown(page):
    report = fake_report()
    for entry in report.methods:
        assert entry.label in page
    for path in LAYERS:
        assert path in page


def test_key_figures_are_those_of_the_report(checker):
    text = " ".join(checker.text)
    report = fake_report()
    assert number(report.ours.versus_full_precision.action_mse_normalized) in text
    assert "0.9990" in text
    assert "ran from its packed weights" in text
    assert report.calibration["hash"][:16] in text


def test_a_report_without_validation_renders():
    report = dataclasses.replace(fake_report(), validation=None)
    assert "Spearman" not in render(report, fake_map())


def test_names_are_escaped():
    report = fake_report()
    model = dataclasses.replace(report.model, name="<script>alert(1)</script>")
    report = dataclasses.replace(report, model=model)
    assert "<script>" not in render(report, fake_map())


@pytest.mark.parametrize(("low", "high", "log"), [(0, 7.3, False), (2e-5, 3, True), (1, 1e9, True)])
def test_ticks_lie_within_the_axis(low, high, log):
    axis = Axis(low, high, 10, 110, log=log)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 9
    assert all(low <= t <= high for t in ticks)
    assert axis(low) == pytest.approx(10)
    assert axis(high) == pytest.approx(110)
    assert axis(high * 2) == pytest.approx(110)


@pytest.mark.parametrize("log", [False, True])
def test_spans_enclose_their_values_even_a_single_one(log):
    for values in ([3.0], [1.0, 50.0]):
        low, high = span(values, log=log)
        assert low < min(values) <= max(values) < high


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.00012, "0.00012"), (0.01234, "0.0123"), (1234.5, "1234"), (3e-7, "3·10⁻⁷"),
     (1e-6, "10⁻⁶"), (16.0, "16"), (1.2e8, "1.2·10⁸")],
)  # fmt: skip
def test_numbers_are_short(value, text):
    assert number(value) == text


def test_sizes_have_binary_units():
    assert size_text(512) == "512 B"
    assert size_text(2048) == "2.00 KiB"
    assert size_text(3 * 2**20) == "3.00 MiB"


def test_colour_bounds_survive_zero_costs():
    low, high = cost_bounds(np.zeros(5))
    assert 0 < low < high
    low, high = cost_bounds(np.array([0.0, 1e-12, 1.0]))
    assert 0 < low < high == 1.0


def test_series_of_one_family_have_different_colours():
    families = ["full", "uniform", "baseline", "baseline", "ours", "other_solver", "baseline"]
    entries = [(f"s{n}", family) for n, family in enumerate(families)]
    styles = figures.styles_of([*entries, *entries])
    assert list(styles) == [f"s{n}" for n in range(len(families))]
    assert len(set(styles.values())) == len(families)
    assert styles["s4"] == "ours"
