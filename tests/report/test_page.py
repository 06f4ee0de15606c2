"""The report in a browser: light and dark, phone and desktop, distinguishable without colours."""

import base64
import contextlib
import io
import itertools
import re

import numpy as np
import pytest
from PIL import Image
from scipy import sparse

from tests.report import chromium
from tests.report.test_markdown import read
from vixml_jax.evaluation import metrics, sliced_metrics, slices
from vixml_jax.evaluation.per_query import PerQuery
from vixml_jax.report import examples, page, render
from vixml_jax.report.examples import Neighbours

HOSTILE = '<script>window.hacked = 1</script><img src="http://127.0.0.1:9/x" onerror=alert(1)>"\'&'
LONG = "a_very_long_word_without_any_space_in_it_" * 8
SCHEMES, WIDTHS = ("light", "dark"), (360, 1280)
SERIES = ("s0", "s1", "s2")
CARD = (
    "# icons\n\n| | items |\n| --- | --: |\n| train | 9 |\n\n![In images](dataset.png)\n\n"
    "- “\\<script\\>window.hacked = 1\\</script\\>”\n  → " + LONG + "\n"
)


def evaluated(seed):
    """Sliced and overall metrics of random results."""
    rng, num, num_labels = np.random.default_rng(9), 300, 400
    ids = np.random.default_rng(seed).random((num, num_labels)).argsort(axis=1)[:, :100]
    frequency = np.sort(rng.zipf(1.4, num_labels).clip(max=3000) - 1)[::-1]
    truth = rng.random((num, num_labels)) < 0.01 + 0.02 * (frequency > 50)
    relevance = sparse.csr_matrix(truth.astype(np.float32))
    weights = np.ones(num_labels)
    lengths = rng.integers(3, 40, num)
    sliced = sliced_metrics.compute(
        ids,
        relevance,
        weights,
        label_groups={
            "label frequency": slices.by_frequency(frequency),
            "frequency decile": slices.by_decile(frequency, truth.sum(axis=0)),
        },
        query_groups={
            "images": slices.Groups(("with images", "without"), lengths % 2),
            "text length": slices.by_length(lengths),
        },
    )
    return sliced, metrics.compute_metrics(ids, relevance, weights)


def item_image():
    """Returns a red image with a transparent corner, as a `data:` URL."""
    image = Image.new("RGBA", (400, 200), (200, 0, 0, 255))
    image.putpixel((0, 0), (0, 0, 0, 0))
    out = io.BytesIO()
    image.save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


IMAGE = item_image()


def make_page(**changes):
    """Returns a report with every section, and texts that try to break it."""
    run, other = "this run, text and images", "this run, text and images, with neighbours"
    (one, one_row), (two, two_row) = evaluated(0), evaluated(1)
    assert isinstance(one.queries, PerQuery)
    bounds = {name: (one_row[name] - 1, one_row[name] + 1) for name in one.queries.names}
    true_labels = [examples.TrueLabel(HOSTILE, 1), examples.TrueLabel(LONG, None)]
    predictions = [
        examples.Prediction(HOSTILE, 0.9, True),
        examples.Prediction(LONG, 0.5, False),
        examples.Prediction("plain", -0.1, False),
    ]
    example = examples.Example("7", HOSTILE, 2, 61.5, predictions, true_labels, 9)
    bare = examples.Example("8", "", 0, 0.0, [], true_labels[1:], 1)
    content = {
        "dataset": f"icons {HOSTILE}",
        "split": "test",
        "search": "scann",
        "queries": 300,
        "labels": 400,
        "run": run,
        "rows": {
            "kNN baseline, text": dict.fromkeys(("P@1", "R@100"), 3.0),
            run: one_row,
            other: two_row,
        },
        "intervals": {run: bounds},
        "groups": {run: one.groups, other: two.groups},
        "losses": [(step, 1.0 / (1 + step)) for step in range(0, 1000)],
        "curves": {"P@1": [(10, 5.0), (20, 40.0), (30, 52.5)], "R@100": [(10, 50.0), (30, 90.0)]},
        "curves_split": "valid",
        "recall_curve": [
            dict(leaves_searched=n, reordered=9 * n, recall=1 - 0.5 / n, queries_per_s=9e4 / n)
            for n in (1, 4, 16, 64)
        ],
        "thumbnails": {"7": [IMAGE, ""]},
        "worst": [bare, example, example],
        "best": [example, example._replace(text=LONG)],
        "chosen_by": "nDCG@5",
        "neighbours": [Neighbours(HOSTILE, 7, [(LONG, 0.91), (HOSTILE, 0.5)])],
        "card": CARD,
        "card_image": b"\x89PNG\r\n\x1a\n",
        "command": f"python -m vixml_jax.evaluate --report --workdir='{LONG}{HOSTILE}'",
        "versions": {"jax": "0.10", "device": "1 x cpu"},
        "settings": '{"seed": 0, "name": "</pre>"}',
        "facts": {"run": LONG, "peak memory": "1.0 GB"},
    }  # fmt: skip
    return render.render(page.Page(**content | changes))


@pytest.fixture(scope="module")
def browser():
    with chromium.launch() as browser:
        yield browser


@contextlib.contextmanager
def opened(browser, path, scheme="light", width=1280, media="screen"):
    """Yields the page with all details open, its requests, and its console messages."""
    context = browser.new_context(
        color_scheme=scheme, viewport={"width": width, "height": 800}, offline=False
    )
    tab, requests, messages = context.new_page(), [], []
    tab.on("request", lambda request: requests.append(request.url))
    tab.on("console", lambda message: messages.append(message.text))
    tab.on("pageerror", lambda error: messages.append(str(error)))
    tab.emulate_media(media=media, color_scheme=scheme)
    tab.goto(path.as_uri())
    tab.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    yield tab, requests, messages
    context.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "test-scann.report.html"
    path.write_text(make_page(), encoding="utf-8")
    return path


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
        assert len(sizes) == 11 and min(sizes) >= 10


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


def test_charts_tables_and_headings_are_accessible(browser, path):
    with opened(browser, path) as (tab, *_):
        charts = tab.evaluate(
            "[...document.querySelectorAll('svg[role=img]')].map(c => c.getAttribute("
            "'aria-labelledby').split(' ').map(id => document.getElementById(id).textContent))"
        )
        assert len(charts) == 11 and all(title and description for title, description in charts)
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
        filled = tab.evaluate(
            "[...document.querySelectorAll('.legend .key rect:not([class^=m])')].map(r => "
            "[r.getAttribute('class'), getComputedStyle(r).fill])"
        )
        assert {kind for kind, _ in filled} == {"s0", "s1"}
        assert all(("pattern" in fill) == (kind == "s1") for kind, fill in filled)
        dashes = tab.evaluate(
            "[...document.querySelectorAll('.legend .key path')].filter(p => "
            "p.getAttribute('class')[0] === 'l').map(p => getComputedStyle(p).strokeDasharray)"
        )
        assert len(dashes) == len(set(dashes)) == 2


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


def test_html_is_well_formed_and_refers_to_no_other_file():
    text = make_page()
    reader = read(text.removeprefix("<!doctype html>"))
    assert not {"script", "link", "iframe", "object", "base"} & set(reader.tags)
    for tag, attributes in reader.attributes:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href"):
                assert value.startswith(("data:image/png;base64,", "#")), (tag, value)
    assert "url(http" not in text and "@import" not in text


def test_sections_without_content_are_left_out():
    full, reduced = make_page(), make_page(
        recall_curve=[], losses=[], curves={}, neighbours=[], worst=[], best=[], card=None
    )  # fmt: skip
    for title in ("Recall and speed of the index", "Learning curves", "Label neighbours"):
        assert full.count(title) == 2 and title not in reduced
    assert "have no card (dataset.md)" in reduced
    read(reduced.removeprefix("<!doctype html>"))


def test_page_shows_the_given_numbers():
    text = make_page()
    row = evaluated(0)[1]
    for name in ("P@1", "nDCG@5", "R@100"):
        assert f"<dt>{name}</dt><dd>{row[name]:.2f}<small>[{row[name] - 1:.2f}" in text
    unseen = evaluated(0)[0].groups["label frequency"]["unseen"]
    shown = re.search(r"Labels never seen in training: ([\d,]+), in ([\d,]+) of", text)
    assert (int(shown[1]), int(shown[2])) == (unseen["labels"], unseen["pairs"]) and unseen["pairs"]
    assert f"R@100 within the group: {unseen['metrics']['R@100']:.2f}" in text


# Linear RGB as seen by people who lack one kind of cones (Machado, Oliveira & Fernandes, A
# Physiologically-based Model for Simulation of Color Vision Deficiency, 2009, severity 1).
DEFICIENCIES = {
    "none": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                   [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                     [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
                   [0.004733, 0.691367, 0.303900]],
}  # fmt: skip


def colours(scheme):
    """Returns the colours of the style sheet, by name of the variable."""
    light, dark = re.findall(r":root \{(.*?)\}", render.stylesheet(), re.DOTALL)
    return dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", light if scheme == "light" else dark))


def linear(colour):
    values = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    """Returns CIELAB of linear sRGB, with white point D65."""
    xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    ) @ np.clip(rgb, 0, 1)
    x, y, z = np.cbrt(np.maximum(xyz / [0.9505, 1.0, 1.089], 1e-9))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_series_differ_for_the_colour_blind(scheme, deficiency):
    series = [colours(scheme)[name] for name in SERIES]
    seen = [lab(np.array(DEFICIENCIES[deficiency]) @ linear(colour)) for colour in series]
    least = min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(seen, 2))
    assert least > 20  # The just noticeable difference is 2.3.


@pytest.mark.parametrize("scheme", SCHEMES)
def test_shapes_contrast_with_the_page(scheme):
    """WCAG 2.2, criterion 1.4.11, asks for a contrast of 3 to 1."""

    def luminance(name):
        return linear(colours(scheme)[name]) @ [0.2126, 0.7152, 0.0722]

    for name in SERIES:
        a, b = sorted((luminance(name), luminance("page")))
        assert (b + 0.05) / (a + 0.05) >= 3, name


def test_a_run_with_a_label_head_shows_probabilities_and_its_loss():
    losses = [(step, 1.0 / step) for step in range(1000, 1010)]
    text = make_page(score="probability", head_losses=losses)
    assert "Predictions, with probabilities" in text and "Loss of the label head" in text
    plain = make_page()
    assert "Predictions, with cosines" in plain and "Loss of the label head" not in plain
