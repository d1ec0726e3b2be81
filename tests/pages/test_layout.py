"""In a browser, at the width of a phone and a desktop: does anything overflow, overlap, or get too small to read?

Needs a Chromium (Debian: chromium-headless-shell), which .ci/run installs.
"""

from __future__ import annotations

import os

import pytest

from . import samples
from .browser import Browser, find_browser

MEASURE = """(() => {
  const shown = element => element.getClientRects().length > 0;
  const svgs = [...document.querySelectorAll("figure svg[role=img]")].filter(shown);
  const overlaps = [], outside = [], sizes = [];
  for (const svg of svgs) {
    const frame = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll("text")].filter(shown);
    const boxes = texts.map(text => text.getBoundingClientRect());
    boxes.forEach((a, i) => {
      sizes.push(parseFloat(getComputedStyle(texts[i]).fontSize) * frame.width / svg.viewBox.baseVal.width);
      if (a.left < frame.left - 1 || a.right > frame.right + 1 || a.top < frame.top - 1 || a.bottom > frame.bottom + 1)
        outside.push(texts[i].textContent);
      boxes.slice(i + 1).forEach((b, j) => {
        // Boxes of text are taller than its letters.
        if (a.left < b.right && b.left < a.right && a.top + 2 < b.bottom - 2 && b.top + 2 < a.bottom - 2)
          overlaps.push([texts[i].textContent, texts[i + 1 + j].textContent]);
      });
    });
  }
  const colour = getComputedStyle(document.body).backgroundColor;
  const wide = [...document.querySelectorAll("body > *, figure > *, .wide")].filter(shown)
    .filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.className || e.tagName);
  const scrolls = [...document.querySelectorAll(".wide")].filter(e => e.scrollWidth > e.clientWidth + 1).length;
  return {page: document.documentElement.scrollWidth, window: innerWidth, charts: svgs.length, overlaps, outside, wide,
    smallest: Math.min(...sizes), scrolls, colour, figures: document.querySelectorAll("figure").length};
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = find_browser()
    if program is None:
        if os.environ.get("CI") == "true":
            pytest.fail("there is no Chromium")
        pytest.skip("there is no Chromium: apt-get install chromium-headless-shell")
    with Browser(program, tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Function (name of a sample) that returns the file of its page."""
    folder = tmp_path_factory.mktemp("pages")

    def get(name):
        file = folder / f"{name}.html"
        if not file.exists():
            file.write_text(samples.render(samples.PAGES[name]()), encoding="utf-8")
        return file

    return get


@pytest.mark.parametrize("width", [320, 390, 801, 1280])
@pytest.mark.parametrize("name", samples.PAGES)
def test_nothing_overflows_overlaps_or_is_too_small(browser, page, name, width):
    browser.show(page(name), width)
    found = browser.evaluate(MEASURE)
    assert found["page"] <= found["window"] == width
    assert found["wide"] == []
    assert found["overlaps"] == []
    assert found["outside"] == []
    assert found["charts"] == found["figures"] > 0  # one layout of each is visible
    assert found["smallest"] >= 10
    if width == 390:
        assert found["scrolls"] > 0  # wide tables scroll in their own container
    if width == 1280 and samples.LONG not in page(name).read_text(encoding="utf-8"):
        assert found["scrolls"] == 0


def test_the_page_follows_dark_mode_and_fetches_nothing(browser, page):
    colours = []
    for dark in (False, True):
        browser.requests.clear()
        browser.show(page("evil"), 390, dark=dark)
        colours.append(browser.evaluate(MEASURE)["colour"])
        assert browser.requests == [page("evil").resolve().as_uri()]
    assert colours == ["rgb(255, 255, 255)", "rgb(20, 24, 28)"]
    assert browser.evaluate("document.scripts.length") == 0


@pytest.mark.parametrize("name", ["failed", "evaluated"])
def test_the_printed_page_is_black_on_white_with_all_details(browser, page, name):
    browser.show(page(name), 718, dark=True, media="print")  # A4 without the browser's margins
    found = browser.evaluate(MEASURE)
    assert found["page"] <= 718
    assert found["wide"] == found["overlaps"] == found["outside"] == []
    assert found["scrolls"] == 0
    assert found["colour"] == "rgb(255, 255, 255)"
    assert browser.evaluate("[...document.querySelectorAll('details > *')].every(e => e.checkVisibility())")


def test_names_stay_visible_when_a_table_is_scrolled(browser, page):
    browser.show(page("evaluated"), 390)
    before, after, cell = browser.evaluate(
        """(() => { const box = document.querySelector(".wide"), name = box.querySelector("td");
        const at = name.getBoundingClientRect().left; box.scrollLeft = 300;
        const next = box.querySelector("td + td").getBoundingClientRect().left;
        return [at, name.getBoundingClientRect().left, next]; })()"""
    )
    assert before == after > cell


def test_the_answer_is_visible_on_a_phone_without_scrolling(browser, page):
    for name in ("passed", "failed", "evaluated"):
        browser.show(page(name), 390)
        assert browser.evaluate("document.querySelector('.answer').getBoundingClientRect().bottom") < 600
