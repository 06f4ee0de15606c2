"""Reports with every section and hostile texts, for tests; and how a browser opens them."""

import base64
import contextlib
import io

import numpy as np
from PIL import Image
from scipy import sparse

from vixml_jax.data.card import panels
from vixml_jax.data.card.stats import Distribution
from vixml_jax.evaluation import metrics, sliced_metrics, slices
from vixml_jax.evaluation.per_query import PerQuery
from vixml_jax.report import examples, page, render
from vixml_jax.report.examples import Neighbours

HOSTILE = '<script>window.hacked = 1</script><img src="http://127.0.0.1:9/x" onerror=alert(1)>"\'&'
LONG = "a_very_long_word_without_any_space_in_it_" * 8
SCHEMES = ("light", "dark")
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


def data_panels(images=True):
    """Panels of random data with four parts, and labels that no training query has."""
    rng = np.random.default_rng(2)

    def distributions(names, most):
        return {name: Distribution.of(rng.geometric(4 / most, 300)) for name in names.split()}

    return panels.Panels(
        panels._histogram("32 tokens", "tokens", "%", distributions("train test labels", 90), 33),
        panels._histogram("4 labels", "labels", "%", distributions("train valid test", 9)),
        panels._images(distributions("train valid test labels", 4)) if images else None,
        panels._frequencies(Distribution.of(rng.zipf(1.5, 500).clip(max=30_000) - 1)),
    )


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
        "unlabelled": 0,
        "propensity": (0.55, 1.5),
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
        "retrieved": 100,
        "chosen_by": "nDCG@5",
        "neighbours": [Neighbours(HOSTILE, 7, [(LONG, 0.91), (HOSTILE, 0.5)])],
        "card": CARD,
        "panels": data_panels(),
        "command": f"python -m vixml_jax.evaluate --report --workdir='{LONG}{HOSTILE}'",
        "versions": {"jax": "0.10", "device": "1 x cpu"},
        "settings": '{"seed": 0, "name": "</pre>"}',
        "facts": {"run": LONG, "peak memory": "1.0 GiB"},
    }  # fmt: skip
    return render.render(page.Page(**content | changes))


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
