"""The report in a real browser: it renders, says nothing on the console, and fits a phone."""

import dataclasses
import json
import shutil
import subprocess

import pytest

from qvla_jax.report import render
from qvla_jax.report.closed_loop import choose_rollouts

from .fakes import fake_map, fake_report

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt install chromium")

# Appended to the page under test alone: the report itself has no script.
PROBE = """
<script>
const seen = e => e.getBoundingClientRect();
const wide = [...document.querySelectorAll("main *")].filter(
  e => !e.closest(".scroll") && !e.closest("svg") && seen(e).right > innerWidth + 1);
document.title = JSON.stringify({
  scroll: document.documentElement.scrollWidth,
  width: innerWidth,
  headings: document.querySelectorAll("h2").length,
  images: [...document.images].every(i => i.complete && i.naturalWidth > 0),
  paper: getComputedStyle(document.body).backgroundColor,
  wide: wide.map(e => e.outerHTML.slice(0, 80)),
  text: document.body.innerText,
});
</script>
"""


@pytest.fixture(scope="module")
def page(closed_loop_summary, tmp_path_factory):
    summary = closed_loop_summary
    folder = tmp_path_factory.mktemp("page")
    report = dataclasses.replace(fake_report(), closed_loop=summary)
    path = folder / "report.html"
    path.write_text(render(report, fake_map(), rollouts=choose_rollouts(folder, summary)) + PROBE)
    return path


def look(page, tmp_path, *flags):
    """What the probe says, and everything that the browser logged."""
    command = [
        CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-extensions",
        f"--user-data-dir={tmp_path}", "--enable-logging=stderr", "--v=0", "--hide-scrollbars",
        *flags, "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    title = done.stdout.split("<title>")[1].split("</title>")[0]
    said = json.loads(title.replace("&quot;", '"').replace("&lt;", "<").replace("&amp;", "&"))
    return said, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize(
    ("flags", "paper"),
    [
        (("--window-size=1280,900",), "rgb(251, 251, 249)"),
        (("--window-size=1280,900", "--blink-settings=preferredColorScheme=0"), "rgb(17, 20, 23)"),
        (("--window-size=500,900",), "rgb(251, 251, 249)"),
    ],
    ids=["wide", "dark", "narrow"],
)
def test_the_page_renders_without_a_word_on_the_console(page, tmp_path, flags, paper):
    said, console = look(page, tmp_path, *flags)
    assert console == []
    assert said["headings"] == 7
    assert said["images"]
    assert said["paper"] == paper
    # Nothing sticks out: wide tables and figures scroll by themselves.
    assert said["scroll"] <= said["width"]
    assert said["wide"] == []
    for text in ("18 of 20", "10.5 ms", "0.9990"):
        assert text in said["text"]
