"""The HTML of the report: well-formed, with the given numbers, in distinguishable colours."""

import itertools
import re

import numpy as np
import pytest
from scipy import sparse

from tests.report.pages import SCHEMES, data_panels, evaluated, make_page
from tests.report.test_markdown import read
from vixml_jax.data.card import panels
from vixml_jax.data.card.stats import Distribution
from vixml_jax.evaluation import metrics, sliced_metrics, slices
from vixml_jax.report import page, render

SERIES = ("s0", "s1", "s2")


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


def test_queries_without_labels_are_counted():
    assert "300 queries, 400 labels" in make_page()
    shown = "300 queries (12 of them without labels, which count as misses), 400 labels"
    assert shown in make_page(unlabelled=12)


def test_metrics_are_of_the_row_that_predict_serves():
    other = "this run, text and images, with neighbours"
    (sliced, row), text = evaluated(1), make_page(run=other, score="mixed")
    assert f"<dt>P@1</dt><dd>{row['P@1']:.2f}" in text
    assert f"Of <b>{other}</b>, which <code>predict</code> serves." in text
    assert re.findall(r'<tr class="emphasised"><th scope="row">\s*<bdi>(.*?)<', text) == [other]
    tail = sliced.groups["label frequency"]["tail"]["metrics"]["R@100"]
    assert f"<td>{tail:.2f}</td>" in text.split("By label frequency</h2>")[1].split("<details")[0]
    assert "Predictions, with scores" in text and "shares of a softmax" in text
    assert "A = 0.55 and B = 1.5" in text


def test_data_with_fewer_labels_than_the_usual_cut_offs():
    """With 3 labels there are no P@5 and no R@10: the largest cut-offs take their place."""
    rng = np.random.default_rng(0)
    ids = rng.random((50, 3)).argsort(axis=1)
    relevance = sparse.csr_matrix((rng.random((50, 3)) < 0.5).astype(np.float32))
    frequency = np.array([200, 20, 2])
    groups = {
        "label frequency": slices.by_frequency(frequency),
        "frequency decile": slices.by_decile(frequency, np.diff(relevance.tocsc().indptr)),
    }
    cuts = {"ks": (1, 3), "recall_ks": ()}
    sliced = sliced_metrics.compute(
        ids, relevance, np.ones(3), label_groups=groups, query_groups={}, **cuts
    )
    row = metrics.compute_metrics(ids, relevance, np.ones(3), **cuts)
    text = make_page(run="few", rows={"few": row}, groups={"few": sliced.groups}, intervals={})
    assert "P@3, contribution of the group" in text and "coverage@3 within the group" in text
    assert "P@5" not in text.split("Learning curves</h2>")[0]
    read(text.removeprefix("<!doctype html>"))
    assert page.largest_cutoff("nDCG", row) == "nDCG@3" and page.largest_cutoff("R", row) is None
    assert page.largest_cutoff("P", ["PSP@5", "P@1", "P@10", "P@5", "MRR"]) == "P@10"


def test_charts_of_data_without_images_and_of_labels_without_training_queries():
    plain = make_page(panels=data_panels(images=False))
    assert "Items with images" in make_page() and "Items with images" not in plain
    unseen = panels._frequencies(Distribution.of(np.zeros(9, int)))
    assert make_page(panels=data_panels()._replace(frequencies=unseen)).count("<figure>") == (
        make_page().count("<figure>") - 1
    )
    one = panels._frequencies(Distribution.of(np.array([7])))
    read(make_page(panels=data_panels()._replace(frequencies=one)).removeprefix("<!doctype html>"))
