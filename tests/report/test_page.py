"""The report in a browser: light and dark, phone and desktop, distinguishable without colours."""

import io
import itertools
import re

import numpy as np
import pytest
from PIL import Image

from tests.report.pages import HOSTILE, SCHEMES, make_page, opened
from vixml_jax.report import examples

WIDTHS = (360, 1280)

CONTRASTS = """() => {
  const channel = c => { c /= 255; return c <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4 };
  const luminance = c => .2126 * channel(c[0]) + .7152 * channel(c[1]) + .0722 * channel(c[2]);
  const colour = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.data.trim(), element = walker.currentNode.parentElement;
    if (!text || ['TITLE', 'title', 'desc', 'SCRIPT', 'STYLE'].includes(element.tagName)) continue;
    const own = getComputedStyle(element);
    const front = colour(element.closest('svg') ? own.fill : own.color);
    let back = [0, 0, 0, 0], at = element;
    while (at && back[3] === 0) {
      back = colour(getComputedStyle(at).backgroundColor);
      if (back.length === 3) back.push(1);
      at = at.parentElement;
    }
    const [a, b] = [luminance(front), luminance(back)];
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    found.push([text.slice(0, 40), ratio, front.length === 3 && back[3] === 1]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme,width", list(itertools.product(SCHEMES, WIDTHS)))
def test_page_makes_no_requests_fits_and_has_contrast(browser, path, scheme, width):
    with opened(browser, path, scheme, width) as (tab, requests, messages):
        assert [url for url in requests if not url.startswith("data:")] == [path.as_uri()]
        assert messages == []
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.evaluate("window.hacked") is None
        contrasts = tab.evaluate(CONTRASTS)
        assert len(contrasts) > 400
        for text, ratio, solid in contrasts:
            assert solid and ratio >= 4.5, (text, ratio)
        background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(255, 255, 255)") == (scheme == "light")


def test_chart_text_is_large_enough_on_a_phone(browser, path):
    with opened(browser, path, width=360) as (tab, *_):
        sizes = tab.evaluate(
            "[...document.querySelectorAll('.chart')].map(c => "
            "c.getBoundingClientRect().width / c.viewBox.baseVal.width * "
            "parseFloat(getComputedStyle(c).fontSize))"
        )
        assert len(sizes) == 15 and min(sizes) >= 10


def test_chart_text_is_not_clipped(browser, path):
    outside = """[...document.querySelectorAll('.chart text')].filter(t => {
        const box = t.getBBox(), all = t.ownerSVGElement.viewBox.baseVal;
        return box.x < -0.5 || box.y < -0.5 || box.x + box.width > all.width + 0.5
            || box.y + box.height > all.height + 0.5;
    }).map(t => t.textContent)"""
    with opened(browser, path) as (tab, *_):
        assert tab.evaluate(outside) == []


def test_chart_texts_do_not_overlap(browser, path):
    overlapping = """[...document.querySelectorAll('.chart')].flatMap(c => {
        const found = [...c.querySelectorAll('text')].map(t => [t.getBBox(), t.textContent]);
        return found.flatMap(([a, s], i) => found.slice(i + 1).filter(([b]) =>
            a.x < b.x + b.width && b.x < a.x + a.width
            && a.y + 3 < b.y + b.height && b.y + 3 < a.y + a.height).map(([, t]) => [s, t]));
    })"""
    with opened(browser, path) as (tab, *_):
        assert tab.evaluate(overlapping) == []


def test_wide_tables_scroll_inside_their_box(browser, path):
    with opened(browser, path, width=360) as (tab, *_):
        wide = tab.evaluate(
            "[...document.querySelectorAll('.scroll')].filter(b => b.scrollWidth > b.clientWidth)"
            ".map(b => [getComputedStyle(b).overflowX, b.tabIndex])"
        )
        assert len(wide) >= 3 and all(box == ["auto", 0] for box in wide)


def edges(tab, box):
    """How much of the left and right edge of a box is shaded, from 0 to 1."""
    box.scroll_into_view_if_needed()
    place = box.bounding_box()
    with Image.open(io.BytesIO(tab.screenshot(clip=place))) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    page = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    page = [int(channel) for channel in re.findall(r"\d+", page)]
    different = (np.abs(pixels - page) > 12).any(axis=-1)
    return different[:, 1].mean(), different[:, -3].mean()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_shadow_says_that_a_table_goes_on(browser, path, scheme):
    with opened(browser, path, scheme, width=390) as (tab, *_):
        boxes = [tab.locator(".scroll").nth(i) for i in range(tab.locator(".scroll").count())]
        wide = [box for box in boxes if box.evaluate("b => b.scrollWidth > b.clientWidth")]
        narrow = [box for box in boxes if box not in wide]
        assert len(wide) >= 3 and narrow
        for box in wide[:3]:
            assert edges(tab, box)[1] > 0.95
            box.evaluate("b => b.scrollLeft = b.scrollWidth")
            assert edges(tab, box)[1] < 0.5  # Some text and lines may be there.
        for box in narrow[:2]:
            assert max(edges(tab, box)) < 0.5


def test_texts_of_labels_fit_a_phone(browser, path):
    with opened(browser, path, width=390) as (tab, *_):
        box = tab.locator(".texts .scroll")
        assert box.evaluate("b => b.scrollWidth <= b.clientWidth")
        assert box.locator("bdi").count() == 3


def test_charts_of_the_data_have_the_colours_of_the_page(browser, path):
    """No image of fixed colours and sizes is left, so that dark mode and a phone are served."""
    fills = []
    for scheme in SCHEMES:
        with opened(browser, path, scheme, width=390) as (tab, *_):
            assert tab.locator(".card img").count() == 0
            assert tab.locator(".card .chart").count() == 4
            widths = tab.locator(".card .chart").evaluate_all(
                "charts => charts.map(c => c.getBoundingClientRect().width)"
            )
            assert min(widths) > 320
            fills.append(
                tab.evaluate("getComputedStyle(document.querySelector('.card text')).fill")
            )
    assert fills[0] != fills[1]


def test_charts_tables_and_headings_are_accessible(browser, path):
    with opened(browser, path) as (tab, *_):
        charts = tab.evaluate(
            "[...document.querySelectorAll('svg[role=img]')].map(c => c.getAttribute("
            "'aria-labelledby').split(' ').map(id => document.getElementById(id).textContent))"
        )
        assert len(charts) == 15 and all(title and description for title, description in charts)
        ids = tab.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
        assert len(ids) == len(set(ids))
        assert tab.evaluate("document.querySelectorAll('th:not([scope])').length") == 0
        tables = tab.evaluate("document.querySelectorAll('table').length")
        assert tables == tab.evaluate("document.querySelectorAll('.scroll[aria-label]').length")
        links = tab.evaluate(
            "[...document.querySelectorAll('nav a')].map(a => "
            "!!document.getElementById(a.getAttribute('href').slice(1)))"
        )
        assert len(links) == 9 and all(links)
        levels = tab.evaluate(
            "[...document.querySelectorAll('h1,h2,h3,h4,h5,h6')].map(h => +h.tagName[1])"
        )
        assert levels[0] == 1 and levels.count(1) == 1
        assert all(b <= a + 1 for a, b in itertools.pairwise(levels))


def test_hits_and_series_differ_without_colour(browser, path):
    with opened(browser, path) as (tab, *_):
        hits = tab.evaluate(
            "[...document.querySelectorAll('article li')].map(l => "
            "[l.classList.contains('hit'), l.firstChild.textContent.includes('✓')])"
        )
        assert {tuple(hit) for hit in hits} == {(True, True), (False, False)}
        missed = tab.evaluate(
            "[...document.querySelectorAll('article li.miss')].map(l => l.innerText)"
        )
        assert missed and all("✗" in text and "missed" in text for text in missed)
        filled = tab.evaluate(
            "[...document.querySelectorAll('.legend .key rect:not([class^=m])')].map(r => "
            "[r.getAttribute('class'), getComputedStyle(r).fill])"
        )
        assert {kind for kind, _ in filled} == {"s0", "s1"}
        assert all(("pattern" in fill) == (kind == "s1") for kind, fill in filled)
        legends = tab.evaluate(
            "[...document.querySelectorAll('.legend')].map(l => [...l.querySelectorAll('path')]"
            ".filter(p => p.getAttribute('class')[0] === 'l')"
            ".map(p => getComputedStyle(p).strokeDasharray))"
        )
        assert max(map(len, legends)) == 3
        assert all(len(dashes) == len(set(dashes)) for dashes in legends)


@pytest.mark.parametrize(
    "rank,found", [(1, True), (3, True), (4, False), (72, False), (None, False)]
)
def test_true_labels_that_are_not_predicted_look_missed(browser, tmp_path, rank, found):
    """Predictions have three labels; a label of a later rank is not among them."""
    predictions = [examples.Prediction(f"label {i}", 0.5, False) for i in range(3)]
    true_labels = [examples.TrueLabel("its label", rank)]
    example = examples.Example("7", "query", 0, 0.0, predictions, true_labels, 1)
    file = tmp_path / "page.html"
    file.write_text(make_page(worst=[example], best=[]), encoding="utf-8")
    with opened(browser, file) as (tab, *_):
        item = tab.locator("article ul li")
        shown = item.inner_text().split("\n")
        place = "beyond rank 100" if rank is None else f"rank {rank}"
        assert shown == (
            ["✓", "its label", place] if found else ["✗", "its label", f"missed, {place}"]
        )
        colour = item.evaluate("i => getComputedStyle(i).color")
        names = {name: tab.evaluate(
            "name => { const e = document.createElement('i'); e.style.color = `var(${name})`;"
            "document.body.append(e); return getComputedStyle(e).color }", f"--{name}",
        ) for name in ("hit", "miss")}  # fmt: skip
        assert names["hit"] != names["miss"] and colour == names["hit" if found else "miss"]


def test_content_security_policy_blocks_the_network(browser, path):
    blocked = """kind => new Promise(done => {
        document.addEventListener('securitypolicyviolation', e => done(e.effectiveDirective));
        if (kind === 'img') new Image().src = 'http://127.0.0.1:9/x.png';
        if (kind === 'fetch') fetch('http://127.0.0.1:9/x').catch(() => 0);
        if (kind === 'script') {
            const s = document.createElement('script');
            s.textContent = 'window.hacked = 1';
            document.body.append(s);
        }
        setTimeout(() => done('nothing'), 3000);
    })"""
    for kind, directive in (("img", "img-src"), ("fetch", "connect-src"), ("script", "script-src")):
        with opened(browser, path) as (tab, *_):
            assert tab.evaluate(blocked, kind).startswith(directive)
            assert tab.evaluate("window.hacked") is None


def test_printed_page_is_light(browser, path):
    with opened(browser, path, "dark", media="print") as (tab, *_):
        background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == "rgb(255, 255, 255)"


def test_texts_are_shown_verbatim(browser, path):
    with opened(browser, path) as (tab, *_):
        assert tab.evaluate("document.querySelector('h1').textContent") == f"icons {HOSTILE}, test"
        texts = tab.evaluate("[...document.querySelectorAll('article h4')].map(h => h.textContent)")
        assert HOSTILE in texts and "(no text)" in texts
        assert tab.evaluate("document.querySelectorAll('script, iframe, object').length") == 0


def test_images_of_queries_are_shown(browser, path):
    with opened(browser, path) as (tab, *_):
        images = tab.evaluate(
            "[...document.querySelectorAll('article img')].map(i => [i.alt, i.naturalWidth, "
            "i.naturalHeight, i.getBoundingClientRect().width > 0])"
        )
        assert images == [["image 1", 400, 200, True]] * 4
        text = tab.evaluate("document.querySelector('.examples').innerText")
        assert "image 2: not readable" in text
