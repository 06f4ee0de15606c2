"""Predictions: equal to those of evaluation, from any thread, without compiling after loading."""

import concurrent.futures
import itertools
import json
import os
import shutil

import jax
import numpy as np
import pytest

from tests import tiny
from vixml_jax import saved_model, workdir
from vixml_jax.augmentation import settings as settings_lib
from vixml_jax.errors import InputError
from vixml_jax.search.exact import ExactIndex
from vixml_jax.serving import artifacts, query_items
from vixml_jax.serving.predictor import Predictor
from vixml_jax.storage import sealed


def opened(config):
    dataset = workdir.open_dataset(config)
    model = workdir.build_model(
        config, *workdir.read_tower(config.workdir), dataset.num_labels, workdir.make_mesh(config)
    )
    return dataset, model, *saved_model.restore(config.workdir, model)[:2]


def images_of(items):
    values, offsets = items.images
    return [values[a:b] if b > a else None for a, b in itertools.pairwise(offsets)]


def test_vectors_equal_those_of_the_prepared_data(run, predictor):
    dataset, model, params, _ = opened(run)
    expected = model.encode_queries(params, dataset.test, block=32).values
    found = predictor.encode(list(dataset.test.texts), images_of(dataset.test))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("search", ["exact", "scann"])
@pytest.mark.parametrize("weight", [None, 0])
def test_predictions_equal_those_of_evaluation(run, search, weight):
    dataset, model, params, labels = opened(run)
    mixing = settings_lib.as_trained(run).mixing if weight is None else None
    queries = model.encode_queries(params, dataset.test, block=32).values
    exact = ExactIndex(model.encode_labels(params, labels, dataset.labels, block=32).values)
    expected = exact.search(queries, 6 if mixing is None else run.eval.k)
    if mixing is not None:
        train = model.encode_queries(params, dataset.train, block=32).values
        mixed = np.zeros((len(queries), 20))
        near = ExactIndex(train).search(queries, 5)
        for q in range(len(queries)):
            softmax = np.exp(np.concatenate([expected.scores[q], near.scores[q]]) / 0.05)
            softmax /= softmax.sum()
            mixed[q, expected.ids[q]] += 0.8 * softmax[: run.eval.k]
            for probability, row in zip(softmax[run.eval.k :], near.ids[q], strict=True):
                mixed[q] += 0.2 * probability * dataset.train_relevance[row].toarray()[0]
        ids = np.argsort(-mixed, axis=1, kind="stable")[:, :6]
        expected = expected._replace(ids=ids, scores=np.take_along_axis(mixed, ids, axis=1))
    predictor = Predictor.load(run.workdir, search=search, warm=False)
    if weight == 0:
        predictor.mixing = None
    found = predictor(list(dataset.test.texts), images_of(dataset.test), k=6)
    names, texts = list(dataset.labels.ids), list(dataset.labels.texts)
    for row, ids, scores in zip(found, expected.ids, expected.scores, strict=True):
        np.testing.assert_allclose([x.score for x in row], scores, rtol=2e-4)
        # Labels whose scores differ by less than the rounding error may come in either order.
        for prediction, label, score in zip(row, ids, scores, strict=True):
            assert prediction.text == texts[names.index(prediction.id)]
            assert prediction.id == names[label] or np.isclose(scores, score, rtol=1e-3).sum() > 1


@pytest.mark.parametrize("joint", [False, True])
def test_fewer_labels_are_the_first_of_more(run, joint):
    predictor = Predictor.load(run.workdir, warm=False)
    predictor.mixing = predictor.mixing._replace(joint=joint)
    texts = [f"a{i % 10} b{i * 7 % 10}" for i in range(30)]
    more = predictor(texts, k=run.eval.k)
    for k in (1, 4):
        assert predictor(texts, k=k) == [row[:k] for row in more]


def test_a_query_alone_gets_the_same_labels_as_among_many(predictor):
    texts = [f"a{i % 10} b{i * 7 % 10}" for i in range(300)]
    together = predictor(texts, k=4)
    for text, row in list(zip(texts, together, strict=True))[::37]:
        alone = predictor([text], k=4)[0]
        np.testing.assert_allclose([x.score for x in alone], [x.score for x in row], rtol=1e-4)


def test_many_threads_get_the_same_labels_as_one(predictor):
    blocks = [[f"a{(i + j) % 10} b{i % 10}" for j in range(i % 5 + 1)] for i in range(40)]
    alone = [predictor(block, k=3) for block in blocks]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda block: predictor(block, k=3), blocks))
    flat = [
        [label for block in blocks for row in block for label in row]
        for blocks in (together, alone)
    ]
    assert [label[:2] for label in flat[0]] == [label[:2] for label in flat[1]]
    # Calls that run together round sums otherwise.
    np.testing.assert_allclose(*([label.score for label in labels] for labels in flat), atol=1e-5)


def test_calls_that_run_together_keep_their_own_settings(predictor):
    """Numbers of labels, filters, errors and queries without content, each of its own call."""
    best = {text: [x.id for x in predictor([text], k=6)[0]] for text in ("a3 b4", "b7 a1")}

    def ask(number):
        text, k = ["a3 b4", "b7 a1"][number % 2], 1 + number % 5
        if number % 7 == 0:
            with pytest.raises(InputError, match="unknown label 'nobody' in its filter"):
                predictor([text], never=[["nobody"]])
            return True
        never = best[text][: number % 2]
        found = predictor([" ", text], k=k, never=[[], never])
        return [x.id for x in found[1]] == best[text][len(never) :][:k] and not found[0]

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, range(200)))


def test_nothing_is_compiled_after_loading(predictor):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **more: compiled.append(name) if "backend_compile" in name else None
    )
    rng = np.random.default_rng(0)
    for count in (1, 2, 4, 9, 16, 64, 100, 128, 256, 300):
        texts = [" ".join(["a1"] * rng.integers(1, 40)) for _ in range(count)]
        images = [rng.normal(size=(rng.integers(1, 3), 12)) for _ in range(count)]
        predictor(texts, images)
        predictor(texts, k=3)
        predictor(texts, never=[["0", "1"]] * count)
        predictor(texts, never=[["0", "1"][: rng.integers(3)] for _ in range(count)])
    assert not compiled
    jax.jit(lambda x: x * 3.5 + 1)(np.ones(7))
    assert compiled  # The listener works.


def test_filters_minimum_scores_and_k_above_the_number_of_labels(predictor):
    ranking = predictor(["a1 b2"], k=50)[0]
    assert len(ranking) == 20 and len({x.id for x in ranking}) == 20
    assert [x.score for x in ranking] == sorted((x.score for x in ranking), reverse=True)
    never = [x.id for x in ranking[:3]]
    filtered = predictor(["a1 b2"], k=5, never=[never])[0]
    assert [x.id for x in filtered] == [x.id for x in ranking[3:8]]
    least = ranking[4].score
    assert predictor(["a1 b2"], k=50, min_score=least)[0] == ranking[:5]
    assert predictor([]) == []
    with pytest.raises(InputError, match="unknown label 'none' in its filter"):
        predictor(["a1"], never=[["none"]])
    for wrong in (np.ones(5), np.ones((2, 3, 12)), 1.0):
        with pytest.raises(InputError, match="expected embeddings of width 12"):
            predictor(["a1"], [wrong])
    for wrong in ([[1.0] * 12, [1.0]], ["cat.jpg"], {}):
        with pytest.raises(InputError, match="query 0: found images that are no array of numbers"):
            predictor(["a1"], [wrong])
    one = np.ones(12).tolist()
    assert predictor(["a1"], [one]) == predictor(["a1"], [[one]]) != predictor(["a1"])
    assert predictor(["a1"], [[]]) == predictor(["a1"], [None]) == predictor(["a1"])


@pytest.mark.parametrize(
    "texts,settings,message",
    [
        ("a1 b2", {}, "found one text, 'a1 b2', expected a list of texts"),
        (["a1", None], {}, "query 1: found NoneType, expected a text"),
        (["new words \ud800"], {}, "query 0: the text contains a lone surrogate"),
        (["a1"], {"k": 0}, "k=0: expected at least 1"),
        (["a1"], {"min_score": np.nan}, "min_score=nan: expected a number"),
        (["a1"], {"images": [[np.nan] * 12]}, "query 0: an image embedding is not finite"),
        (["a1"], {"images": [[1e6] * 12]}, "query 0: an image embedding is not finite"),
        (["a1", "b2"], {"images": [None]}, "found images for 1 queries, expected 2"),
        (["a1", "b2"], {"never": [["0"]]}, "found filters for 1 queries, expected 2"),
        (["a1"], {"never": ["12"]}, "query 0: found one text, '12', as its filter"),
        (["a1", "b2"], {"never": "12"}, "query 0: found one text, '1', as its filter"),
    ],
)
def test_invalid_input_is_reported_and_changes_nothing(predictor, texts, settings, message):
    before = predictor(["a1 b2"], k=3)
    with pytest.raises(InputError, match=message):
        predictor(texts, **settings)
    assert predictor(["a1 b2"], k=3) == before


def test_images_of_queries_to_a_run_without_images_are_refused(predictor):
    reader = query_items.ItemReader(predictor.artifacts.path, 8, 0)
    for none in (None, [None, None], [[], None]):
        assert len(reader.read(["a1", "b2"], none)) == 2
    for image in (np.ones(12), [[1.0] * 12], 1.0):
        with pytest.raises(InputError, match="query 1: found an image; the run was trained"):
            reader.read(["a1", "b2"], [None, image])
    with pytest.raises(InputError, match="found images for 1 queries, expected 2"):
        reader.read(["a1", "b2"], [None])


def test_a_query_without_text_and_image_has_no_labels(predictor):
    image = np.eye(12)[3]
    found = predictor(["", " \t", "", "a1"], [None, None, image, None], k=3)
    assert list(map(len, found)) == [0, 0, 3, 3]


def test_long_texts_are_cut(predictor):
    huge = "a1 b2 " * 2_000_000
    np.testing.assert_array_equal(predictor.encode([huge]), predictor.encode([huge[:60_000]]))


def test_a_run_directory_is_loaded_without_its_data(run, tmp_path):
    shutil.copytree(run.workdir, tmp_path / "run")
    config = json.loads((tmp_path / "run/config.json").read_text())
    sealed.write(tmp_path / "run/config.json", {**config, "data": "/nowhere"})
    moved = Predictor.load(str(tmp_path / "run"), warm=False)
    assert moved(["a1 b2"]) == Predictor.load(run.workdir, warm=False)(["a1 b2"])
    shutil.rmtree(tmp_path / "run/serving")
    with pytest.raises(InputError, match=r"serving: missing for this model.* by --data"):
        Predictor.load(str(tmp_path / "run"), warm=False)
    again = Predictor.load(str(tmp_path / "run"), data=run.data, warm=False)
    np.testing.assert_allclose(again.artifacts.vectors, moved.artifacts.vectors, atol=1e-6)


def test_artifacts_of_another_step_or_damaged_ones_are_not_used(run, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(run.workdir, workdir)
    about = workdir / "serving" / artifacts.ABOUT
    content = json.loads(about.read_text())
    sealed.write(about, {**content, "step": 3})
    Predictor.load(str(workdir), warm=False)
    assert "of step 3; written again for the model of step 8" in capsys.readouterr().out
    assert json.loads(about.read_text())["step"] == 8
    for name in ("train_labels", "vectors", "texts"):
        file = workdir / f"serving/{name}.npy"
        intact = file.read_bytes()
        file.write_bytes(intact[:-9] + bytes([intact[-9] ^ 64]) + intact[-8:])
        with pytest.raises(InputError, match=rf"{name}.npy: does not match its checksum; remove"):
            Predictor.load(str(workdir), warm=False)
        file.write_bytes(intact)
    vectors = workdir / "serving/vectors.npy"
    vectors.write_bytes(vectors.read_bytes()[:-40])
    with pytest.raises(InputError, match=r"vectors.npy: truncated .*remove"):
        Predictor.load(str(workdir), warm=False)
    os.remove(vectors)
    with pytest.raises(InputError, match=r"vectors.npy: not found"):
        Predictor.load(str(workdir), warm=False)
    about.write_text("{}")
    with pytest.raises(InputError, match=r"artifacts.json: .*missing required field `format`"):
        Predictor.load(str(workdir), warm=False)
    for damage in ({}, {"dtype": 7}, {"dtype": "int33"}, {"shape": 3}, {"sha256": None}):
        wrong = {**content["arrays"]["ids"], **damage} if damage else {}
        about.write_text(json.dumps({**content, "arrays": {**content["arrays"], "ids": wrong}}))
        with pytest.raises(InputError, match=r"artifacts.json: .*; remove the directory"):
            Predictor.load(str(workdir), warm=False)


def test_data_of_another_run_is_refused(run, tmp_path):
    (tmp_path / "other").mkdir()
    other = tiny.make_data(tmp_path / "other", train=100)
    shutil.copytree(run.workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/serving")
    with pytest.raises(InputError, match="not the data that the run was trained on"):
        Predictor.load(str(tmp_path / "run"), data=other, warm=False)


def test_texts_of_unknown_tokens_are_detected(predictor):
    items = predictor.items(["a1 b2", "ωφ", "", "a1 ωφ"])
    assert predictor.has_only_unknown_tokens(items) == [False, True, False, False]
