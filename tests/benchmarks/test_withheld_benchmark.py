"""The benchmark of new labels: withheld labels are removed, then searched among all labels."""

import types

import numpy as np
import pytest
from scipy import sparse

from tests import tiny
from vixml_jax.benchmarks import withheld
from vixml_jax.labels import head as head_lib
from vixml_jax.search import fusion
from vixml_jax.structs import Queries


def test_a_source_without_some_labels(tmp_path):
    (tmp_path / "raw").mkdir()
    tiny.make_data(tmp_path / "raw")
    gone = withheld.make(str(tmp_path / "raw"), str(tmp_path / "less"), 0.25, 3)
    assert len(gone) == 5
    assert (tmp_path / "less" / withheld.ROWS).read_text().split() == [str(row) for row in gone]
    before, after = (
        (tmp_path / name / "lbl.raw.txt").read_text().splitlines() for name in ("raw", "less")
    )
    assert after == [label for row, label in enumerate(before) if row not in gone]
    for split in ("trn", "tst"):
        found = []
        for name, labels in (("raw", before), ("less", after)):
            texts = (tmp_path / name / f"{split}.raw.txt").read_text().splitlines()
            head, *rows = (tmp_path / name / f"{split}_X_Y.txt").read_text().splitlines()
            assert head == f"{len(texts)} {len(labels)}"
            found.append([
                (text, {labels[int(pair.split(":")[0])] for pair in row.split()})
                for text, row in zip(texts, rows, strict=True)
            ])  # fmt: skip
        left = [(text, own & set(after)) for text, own in found[0]]
        assert found[1] == [(text, own) for text, own in left if own or split == "tst"]


def test_only_withheld_labels_are_true():
    rng = np.random.default_rng()
    vectors, queries = rng.normal(size=(300, 6)), rng.normal(size=(40, 6))
    dense = rng.random((40, 300)) < 0.02
    gone = np.sort(rng.permutation(300)[:60])
    top = np.argsort(-queries @ vectors.T, axis=1)[:, :100]
    recalls, firsts, whole, fives = [], [], [], []
    for true, best in zip(dense, top, strict=True):
        own = set(np.flatnonzero(true)) & set(gone)
        if own:
            recalls.append(len(own & set(best)) / len(own))
            firsts.append(best[0] in own)
        if true.any():
            whole.append(true[best].sum() / true.sum())
        fives.append(true[best[:5]].sum() / 5)
    found = withheld.measure(
        vectors.astype(np.float32), queries.astype(np.float32), sparse.csr_matrix(dense), gone
    )
    expected = [100 * np.mean(recalls), 100 * np.mean(firsts)]
    np.testing.assert_allclose(found[:2], expected, rtol=1e-6)
    assert found[2] == pytest.approx(100 * np.sum(whole) / 40)
    assert found[3] == pytest.approx(100 * np.mean(fives))


def test_examples_are_training_queries_of_the_label():
    rng = np.random.default_rng()
    dense = rng.random((50, 9)) < 0.3
    columns = sparse.csc_matrix(dense)
    for label in range(9):
        own = np.flatnonzero(dense[:, label])
        np.testing.assert_array_equal(np.sort(withheld.examples_of(columns, label, None, rng)), own)
        some = withheld.examples_of(columns, label, 3, rng)
        assert len(some) == min(3, len(own)) and set(some) <= set(own)


@pytest.mark.parametrize("has_head", [False, True])
def test_queries_search_by_prototypes_by_the_head_and_by_both(has_head):
    rng = np.random.default_rng()
    z, w, q, g = rng.normal(size=(4, 6, 5)).astype(np.float32)
    bias = rng.normal(size=6).astype(np.float32)
    weights = fusion.Fusion(3.0, 0.5, 0.2) if has_head else None
    queries = Queries(q, g if has_head else None)
    found = withheld.search_vectors(types.SimpleNamespace(fusion=weights), queries)
    prototypes, head = q @ z.T, head_lib.SCALE * g @ w.T + bias
    if not has_head:
        np.testing.assert_array_equal(found[""], q)
        return
    log_count = rng.random(6).astype(np.float32)
    vectors = fusion.label_vectors(z, fusion.HeadRows(w, bias, log_count))
    both = 3 * prototypes + 0.5 * head + 0.2 * log_count
    expected = {", prototypes": prototypes, ", head": head, ", fused": both}
    assert list(found) == list(expected)
    for name, scores in expected.items():
        np.testing.assert_allclose(found[name] @ vectors.T, scores, rtol=1e-4, atol=1e-4)
