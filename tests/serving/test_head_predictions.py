"""Predictions of a run with a label head, against dense scores in float64."""

import os
import shutil

import jax
import numpy as np
import pytest
import scipy.special
import tokenizers

from tests import tiny
from vixml_jax import saved_model
from vixml_jax import workdir as workdir_lib
from vixml_jax.augmentation import settings
from vixml_jax.augmentation.mixing import Mixing
from vixml_jax.augmentation.settings import Scoring
from vixml_jax.config import SearchConfig
from vixml_jax.errors import InputError
from vixml_jax.labels.head import SCALE
from vixml_jax.modeling import Model
from vixml_jax.search.fusion import Fusion, HeadRows, label_vectors
from vixml_jax.serving import artifacts as artifacts_lib
from vixml_jax.serving import cold_start, explaining, label_updates
from vixml_jax.serving.predictor import Predictor


@pytest.fixture
def workdir(head_run, tmp_path):
    """A copy of the run, which tests may change."""
    return str(shutil.copytree(head_run.workdir, tmp_path / "run"))


class Dense:
    """The run's vectors and parameters in float64, read from its checkpoint."""

    def __init__(self, config):
        config = workdir_lib.read_config(config.workdir)
        self.fusion = config.fusion
        self.dataset = workdir_lib.open_dataset(config)
        model = workdir_lib.build_model(
            config,
            *workdir_lib.read_tower(config.workdir),
            self.dataset.num_labels,
            workdir_lib.make_mesh(config),
        )
        params, labels, _ = saved_model.restore(config.workdir, model)
        self.head = jax.tree.map(lambda x: np.asarray(x, np.float64), params["head"])
        items = self.dataset.labels
        self.z = model.encode_labels(params, labels, items, block=32).values.astype(np.float64)
        self.tokenizer = tokenizers.Tokenizer.from_file(self.dataset.tokenizer)
        train = model.encode_queries(params, self.dataset.train, block=32).values
        self.train = train.astype(np.float64)

    def words(self, texts):
        """The sum of the rows of a text's tokens, by the root of their number."""
        table, found = self.head["words"], []
        for encoded in self.tokenizer.encode_batch(list(texts)):
            rows = [token % len(table) for token in encoded.ids]
            found.append(table[rows].sum(axis=0) / len(rows) ** 0.5)
        return np.array(found)

    def g(self, q, texts):
        """The vectors of queries in the head."""
        up, down = self.head["mlp"]["up"], self.head["mlp"]["down"]
        x = q @ up["kernel"] + up["bias"]
        gelu = x * 0.5 * (1 + scipy.special.erf(x / np.sqrt(2)))
        g = q + gelu @ down["kernel"] + down["bias"] + self.words(texts)
        return g / np.linalg.norm(g, axis=1, keepdims=True)

    @property
    def rows(self):
        """z, w, b and log(1 + n) of each label."""
        log_count = np.log1p(self.dataset.train_relevance.toarray().astype(bool).sum(axis=0))
        return [*zip(self.z, self.head["vectors"], self.head["bias"], log_count, strict=False)]

    def probabilities(self, q, texts, rows, width=None):
        """Of all labels; with a width, by the first columns of all vectors."""
        z, w, b, log_count = map(np.array, zip(*rows, strict=True))
        a, c, t = (getattr(self.fusion, name) for name in ("prototypes", "head", "frequency"))
        cut = [x[:, :width] for x in (q, z, self.g(q, texts))]
        q, z, g = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in cut)
        logits = a * q @ z.T + c * (SCALE * g @ w[:, :width].T + b) + t * log_count
        return scipy.special.softmax(logits, axis=1)

    def neighbours(self, q, k, temperature, columns):
        """Labels of the k nearest training queries, which divide their share among their labels."""
        cosine = q @ self.train.T
        relevance = self.dataset.train_relevance.toarray()
        found = np.zeros((len(q), len(columns)))
        for row, values in enumerate(cosine):
            near = np.argsort(-values, kind="stable")[:k]
            share = scipy.special.softmax(values[near] / temperature)
            for query, part in zip(near, share, strict=True):
                own = relevance[query] * np.isin(np.arange(relevance.shape[1]), columns)
                for at, column in enumerate(columns):
                    if column < len(own) and own[column]:
                        found[row, at] += part / own.sum()
        return found


@pytest.fixture(scope="module")
def dense(head_run):
    return Dense(head_run)


def texts_of(rng, count):
    return [f"a{a} b{b}" for a, b in rng.integers(0, 10, (count, 2))]


def scores_of(predictor, texts):
    """Scores of all labels, as {label id: score} of each query."""
    return [{x.id: x.score for x in row} for row in predictor(texts, k=predictor.num_labels)]


@pytest.mark.parametrize("search", ["exact", "scann"])
def test_a_score_is_the_probability_among_all_labels(head_run, dense, search):
    predictor = Predictor.load(head_run.workdir, search=search, warm=False)
    texts = texts_of(np.random.default_rng(), 12)
    q = predictor.encode(texts).astype(np.float64)
    p = dense.probabilities(q, texts, dense.rows)
    near = dense.neighbours(q, head_run.knn.k, head_run.knn.temperature, range(20))
    names = [*dense.dataset.labels.ids]
    for weight in (head_run.knn.weight, 0.0):
        if not weight:
            predictor.mixing = None
        expected = (1 - weight) * p + weight * near
        for row, found in zip(expected, scores_of(predictor, texts), strict=True):
            assert set(found) == set(names)
            np.testing.assert_allclose([found[name] for name in names], row, rtol=1e-4, atol=1e-7)
            assert sum(found.values()) == pytest.approx(1, abs=1e-4)
        # Labels that only neighbours brought lack their own part, which is less than that of the
        # last label retrieved; without neighbours, it does not matter how many are asked for.
        lacking = (1 - weight) * np.sort(p, axis=1)[:, -head_run.eval.k] * bool(weight)
        everything = scores_of(predictor, texts)
        for row, found, less in zip(predictor(texts, k=3), everything, lacking, strict=True):
            best = sorted(found.values())[:-4:-1]
            np.testing.assert_allclose([x.score for x in row], best, rtol=1e-4, atol=less)


def test_first_columns_and_8_bits(workdir, dense):
    """With added and removed labels; all labels are scored again here, so scores are exact."""
    search = SearchConfig(width=8, dtype="int8")
    predictor = Predictor.load(workdir, search_config=search, warm=False)
    predictor.mixing = None
    rng = np.random.default_rng()
    z = rng.normal(size=(1, 16))
    new = z / np.linalg.norm(z), rng.normal(size=(1, 16)), np.array([0.5]), np.array([1.5])
    prototypes, *head = (x.astype(np.float32) for x in new)
    vectors = label_vectors(prototypes, HeadRows(*head))
    label_updates.remove(workdir, predictor.artifacts, [predictor.artifacts.ids[4]])
    label_updates.add(workdir, predictor.artifacts, ["new"], ["a new one"], vectors)
    predictor.refresh()
    texts = texts_of(rng, 12)
    q = predictor.encode(texts).astype(np.float64)
    names = [*dense.dataset.labels.ids, "new"]
    rows = [*dense.rows, tuple(x[0] for x in new)]
    del names[4], rows[4]
    p = dense.probabilities(q, texts, rows, 8)
    for row, found in zip(p, scores_of(predictor, texts), strict=True):
        np.testing.assert_allclose([found[name] for name in names], row, rtol=1e-4, atol=1e-7)
    explained = explaining.explain(predictor, texts[0], k=20).labels
    logits = np.array([one.prototype + one.head for one in explained])
    log_scores = np.log([one.label.score for one in explained])
    np.testing.assert_allclose(np.diff(logits), np.diff(log_scores), atol=1e-4)


def test_an_added_label_is_as_probable_as_others_at_any_width(workdir):
    """Its bias is set for the logits that are searched."""
    predictor = Predictor.load(workdir, search_config=SearchConfig(width=8), warm=False)
    rows = cold_start.label_vectors(predictor, ["a1 b2", "a3"])
    share = predictor.artifacts.train_relevance.nnz / 20
    share /= predictor.artifacts.train_relevance.nnz + share
    chosen = artifacts_lib.sample_rows(len(predictor.artifacts.train_vectors))
    train = predictor.artifacts.train_vectors[chosen]
    g = predictor.head_queries(train, predictor.artifacts.sample_tokens).astype(np.float64)
    log_sum = predictor.head_log_sum(g.astype(np.float32)).astype(np.float64)
    g = g[:, :8] / np.linalg.norm(g[:, :8], axis=1, keepdims=True)
    log_odds = g @ rows[:, 16:24].T.astype(np.float64) + rows[:, 32] - log_sum[:, None]
    probability = scipy.special.expit(log_odds).mean(axis=0)
    np.testing.assert_allclose(probability, share, rtol=1e-3)


@pytest.mark.parametrize("with_neighbours", [True, False])
def test_added_labels_count_and_removed_ones_do_not(workdir, head_run, dense, with_neighbours):
    rng = np.random.default_rng()
    predictor = Predictor.load(workdir, warm=False)
    weight = head_run.knn.weight if with_neighbours else 0.0
    if not with_neighbours:
        predictor.mixing = None
    live = dict(zip(dense.dataset.labels.ids, enumerate(dense.rows), strict=True))
    texts = texts_of(rng, 6)
    q = predictor.encode(texts).astype(np.float64)
    new_texts = ["label a1 b2", "label b7"]
    for turn in range(3):
        if turn == 1:
            gone = [str(x) for x in rng.choice(list(live), 4, replace=False)]
            label_updates.remove(workdir, predictor.artifacts, gone)
            for name in gone:
                del live[name]
        else:
            names = [f"new {turn} {i}" for i in range(2)]
            vectors = cold_start.label_vectors(predictor, new_texts, None, [["a1 b3"], []])
            label_updates.add(workdir, predictor.artifacts, names, new_texts, vectors)
            e = dense.z.shape[1]
            for i, (name, x) in enumerate(zip(names, vectors.astype(np.float64), strict=True)):
                row = 20 + turn + i  # Two labels are added in turn 0 and two in turn 2.
                live[name] = row, (x[:e], x[e : 2 * e] / SCALE, x[2 * e], x[2 * e + 1])
        predictor.refresh()
        columns = [column for column, _ in live.values()]
        p = dense.probabilities(q, texts, [row for _, row in live.values()])
        near = dense.neighbours(q, head_run.knn.k, head_run.knn.temperature, columns)
        expected = (1 - weight) * p + weight * near
        for row, found in zip(expected, scores_of(predictor, texts), strict=True):
            assert set(found) == set(live)
            np.testing.assert_allclose([found[n] for n in live], row, rtol=1e-4, atol=1e-7)
    label_updates.undo(workdir)  # The labels of the last turn.
    predictor.refresh()
    before = set(live) - set(names)
    assert {x for x in {*live, *gone} if predictor.row_of(x) is not None} == before


def test_a_minimum_score_is_a_probability(head_run):
    predictor = Predictor.load(head_run.workdir, warm=False)
    texts = texts_of(np.random.default_rng(), 9)
    everything = predictor(texts, k=20)
    found = predictor(texts, k=20, min_score=0.1)
    assert found == [[x for x in row if x.score >= 0.1] for row in everything]
    assert any(found) and max(map(len, found)) <= 10
    filtered = predictor(texts, k=20, never=[[row[0].id] for row in everything])
    predictor.mixing = None  # Filters leave the probabilities of other labels as they are.
    alone = predictor(texts, k=20)
    filtered = predictor(texts, k=20, never=[[row[0].id] for row in alone])
    for row, rest in zip(alone, filtered, strict=True):
        assert [x.id for x in rest] == [x.id for x in row[1:]]
        assert [x.score for x in rest] == pytest.approx([x.score for x in row[1:]])


def test_nothing_is_compiled_after_loading(head_run):
    predictor = Predictor.load(head_run.workdir)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **more: compiled.append(name) if "backend_compile" in name else None
    )
    for count in (1, 2, 4, 16, 64, 100, 128, 256):
        texts = texts_of(np.random.default_rng(), count)
        predictor(texts)
        predictor(texts, never=[["0", "1"]] * count)
    assert not compiled
    jax.jit(lambda x: x * 2.5 + 3)(np.ones(11))
    assert compiled  # The listener works.


def test_vectors_are_neither_encoded_nor_stored_twice(workdir, dense, monkeypatch):
    shutil.rmtree(os.path.join(workdir, "serving"))
    monkeypatch.setattr(Model, "_stream", lambda *_: pytest.fail("items are encoded again"))
    predictor = Predictor.load(workdir, warm=False)
    for own, stored in (("vectors", "labels"), ("train_vectors", "train")):
        paths = [os.path.join(workdir, x) for x in (f"serving/{own}.npy", f"vectors/{stored}.npy")]
        assert os.path.samefile(*paths)
    np.testing.assert_allclose(predictor.artifacts.vectors, dense.z, atol=1e-5)
    shutil.rmtree(os.path.join(workdir, "vectors"))
    again = Predictor.load(workdir, warm=False)
    assert again(["a1 b2"]) == predictor(["a1 b2"])


def test_the_nearest_labels_are_those_of_the_prototypes(head_run, dense):
    predictor = Predictor.load(head_run.workdir, warm=False)
    q = predictor.encode(texts_of(np.random.default_rng(), 7))
    expected = np.sort(q @ dense.z.T, axis=1)[:, ::-1][:, :5]
    found = predictor.nearest_labels(q, 5)
    np.testing.assert_allclose(np.take_along_axis(q @ dense.z.T, found, 1), expected, atol=1e-5)


def test_the_head_row_of_a_new_label(head_run, dense):
    """Its vector is a mean of examples and text; its bias gives it its share of training pairs."""
    rng = np.random.default_rng()
    predictor = Predictor.load(head_run.workdir, warm=False)
    texts = ["label a3", "label b4", "something", "label a1"]
    counts = [0, 2, 5, 60]
    queries = [texts_of(rng, count) for count in counts]
    e = dense.z.shape[1]
    found = cold_start.label_vectors(predictor, texts, None, queries).astype(np.float64)
    without = cold_start.label_vectors(predictor, texts).astype(np.float64)
    np.testing.assert_array_equal(found[0], without[0])
    u = predictor.encode(texts).astype(np.float64)
    np.testing.assert_allclose(without[:, :e], u, atol=1e-6)
    np.testing.assert_allclose(without[:, e : 2 * e], SCALE * u, rtol=1e-5, atol=1e-5)
    g = dense.g(dense.train, dense.dataset.train.texts)
    logits = SCALE * g @ dense.head["vectors"][:20].T + dense.head["bias"][:20]
    pairs = dense.dataset.train_relevance.nnz
    for x, own, label, count in zip(found, queries, u, counts, strict=True):
        total = sum(dense.g(predictor.encode(own).astype(np.float64), own)) if own else 0.0
        w = (total + 3 * label) / (count + 3)
        np.testing.assert_allclose(x[e : 2 * e], SCALE * w, rtol=1e-4, atol=1e-4)
        score = SCALE * g @ w + x[2 * e]
        p = scipy.special.softmax(np.c_[logits, score], axis=1)[:, -1]
        expected = max(count, pairs / 20)
        assert p.mean() == pytest.approx(expected / (pairs + expected), rel=1e-3)
        assert x[2 * e + 1] == pytest.approx(np.log1p(expected))
    z = cold_start.prototypes(
        predictor, texts, None, u.astype(np.float32), [predictor.queries(x) for x in queries]
    )
    np.testing.assert_allclose(found[:, :e], z, atol=1e-6)


def test_vectors_without_a_head_are_refused(workdir):
    predictor = Predictor.load(workdir, warm=False)
    unit = np.eye(1, 16, dtype=np.float32)
    label_updates.add(workdir, predictor.artifacts, ["x"], ["label x"], unit)
    with pytest.raises(
        InputError, match=r"damaged \(vectors \(1, 16\) .* expected vectors \(1, 40"
    ):
        Predictor.load(workdir, warm=False)


def test_without_neighbours_the_weights_are_those_tuned_without_them(workdir):
    step = tiny.saved(workdir).step
    mixing = Mixing(0.3, 4, 0.1)
    tried = [Scoring(Fusion(5.0, 2.0), mixing), Scoring(Fusion(7.0, 1.0))]
    rows = [settings.to_row(x, value) for x, value in zip(tried, (2.0, 1.0), strict=True)]
    settings.save_tuned(workdir, step, ["P@1"], rows)
    predictor = Predictor.load(workdir, warm=False)
    assert (predictor.fusion, predictor.mixing) == (Fusion(5.0, 2.0), mixing)
    predictor = Predictor.load(workdir, with_neighbours=False, warm=False)
    assert (predictor.fusion, predictor.mixing) == (Fusion(7.0, 1.0), None)
