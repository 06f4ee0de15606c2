"""Answers of a run: as evaluation has them, from any thread, with what is compiled at load."""

import concurrent.futures
import itertools
import json
import os
import shutil

import jax
import numpy as np
import pytest

from tests import tiny
from vixml_jax import workdir
from vixml_jax.augmentation import neighbors
from vixml_jax.errors import InputError
from vixml_jax.search.exact import ExactIndex
from vixml_jax.serving import artifacts
from vixml_jax.serving.predictor import SIZES, Predictor


def opened(config):
    dataset = workdir.open_dataset(config)
    model = workdir.build_model(
        config, *workdir.read_tower(config.workdir), dataset.num_labels, workdir.make_mesh(config)
    )
    return dataset, model, *workdir.restore_model(config.workdir, model)[:2]


def pictures_of(items):
    values, offsets = items.images
    return [values[a:b] if b > a else None for a, b in itertools.pairwise(offsets)]


def test_vectors_of_texts_and_pictures_are_those_of_prepared_data(run, predictor):
    dataset, model, params, _ = opened(run)
    expected = model.encode_queries(params, dataset.test, block=32).values
    found = predictor.encode(list(dataset.test.texts), pictures_of(dataset.test))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("search", ["exact", "scann"])
@pytest.mark.parametrize("weight", [None, 0])
def test_labels_are_those_that_evaluation_finds(run, search, weight):
    dataset, model, params, labels = opened(run)
    mixing = neighbors.as_trained(run.eval) if weight is None else None
    queries = model.encode_queries(params, dataset.test, block=32).values
    exact = ExactIndex(model.encode_labels(params, labels, dataset.labels, block=32).values)
    expected = exact.search(queries, 6 if mixing is None else run.eval.k)
    if mixing is not None:
        memory = model.encode_queries(params, dataset.train, block=32).values
        shares = np.zeros((len(queries), 20))
        near = ExactIndex(memory).search(queries, 5)
        for q in range(len(queries)):
            scores = np.exp(np.concatenate([expected.scores[q], near.scores[q]]) / 0.05)
            scores /= scores.sum()
            shares[q, expected.ids[q]] += 0.8 * scores[: run.eval.k]
            for share, row in zip(scores[run.eval.k :], near.ids[q], strict=True):
                shares[q] += 0.2 * share * dataset.train_relevance[row].toarray()[0]
        ids = np.argsort(-shares, axis=1, kind="stable")[:, :6]
        expected = expected._replace(ids=ids, scores=np.take_along_axis(shares, ids, axis=1))
    predictor = Predictor.load(run.workdir, search=search, warm=False)
    if weight == 0:
        predictor.mixing = None
    found = predictor(list(dataset.test.texts), pictures_of(dataset.test), k=6)
    names, texts = list(dataset.labels.ids), list(dataset.labels.texts)
    for row, ids, scores in zip(found, expected.ids, expected.scores, strict=True):
        np.testing.assert_allclose([one.score for one in row], scores, rtol=2e-4)
        # Of scores that differ by less than rounding either may come first.
        for one, label, score in zip(row, ids, scores, strict=True):
            assert one.text == texts[names.index(one.id)]
            assert one.id == names[label] or np.isclose(scores, score, rtol=1e-3).sum() > 1


@pytest.mark.parametrize("joint", [False, True])
def test_fewer_labels_are_the_first_of_more(run, joint):
    predictor = Predictor.load(run.workdir, warm=False)
    predictor.mixing = predictor.mixing._replace(joint=joint)
    texts = [f"a{i % 10} b{i * 7 % 10}" for i in range(30)]
    more = predictor(texts, k=run.eval.k)
    for k in (1, 4):
        assert predictor(texts, k=k) == [row[:k] for row in more]


def test_one_query_is_answered_as_among_many(predictor):
    texts = [f"a{i % 10} b{i * 7 % 10}" for i in range(300)]
    together = predictor(texts, k=4)
    for text, row in list(zip(texts, together, strict=True))[::37]:
        alone = predictor([text], k=4)[0]
        np.testing.assert_allclose([x.score for x in alone], [x.score for x in row], rtol=1e-4)


def test_threads_get_the_answers_that_one_gets(predictor):
    blocks = [[f"a{(i + j) % 10} b{i % 10}" for j in range(i % 5 + 1)] for i in range(40)]
    alone = [predictor(block, k=3) for block in blocks]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda block: predictor(block, k=3), blocks)) == alone


def test_nothing_is_compiled_once_it_is_loaded(predictor):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **more: compiled.append(name) if "backend_compile" in name else None
    )
    rng = np.random.default_rng(0)
    for count in (*SIZES, 2, 9, 100, 300):
        texts = [" ".join(["a1"] * rng.integers(1, 40)) for _ in range(count)]
        images = [rng.normal(size=(rng.integers(1, 3), 12)) for _ in range(count)]
        predictor(texts, images)
        predictor(texts, k=3)
        predictor(texts, never=[["0", "1"]] * count)
    assert not compiled
    jax.jit(lambda x: x * 3.5 + 1)(np.ones(7))
    assert compiled  # The listener hears.


def test_filters_scores_and_more_than_there_are(predictor):
    whole = predictor(["a1 b2"], k=50)[0]
    assert len(whole) == 20 and len({one.id for one in whole}) == 20
    assert [one.score for one in whole] == sorted((x.score for x in whole), reverse=True)
    never = [one.id for one in whole[:3]]
    assert [x.id for x in predictor(["a1 b2"], k=5, never=[never])[0]] == [x.id for x in whole[3:8]]
    least = whole[4].score
    assert predictor(["a1 b2"], k=50, min_score=least)[0] == whole[:5]
    assert predictor([]) == []
    with pytest.raises(InputError, match="label 'none' is not among the labels"):
        predictor(["a1"], never=[["none"]])
    with pytest.raises(InputError, match="expected embeddings 12 wide"):
        predictor(["a1"], [np.ones(5)])


@pytest.mark.parametrize(
    "texts,settings,said",
    [
        ("a1 b2", {}, "found one text, 'a1 b2', expected a list"),
        (["a1", None], {}, "query 1: found NoneType, expected text"),
        (["new words \ud800"], {}, "query 0: holds half a character"),
        (["a1"], {"k": 0}, "k=0: expected at least 1"),
        (["a1"], {"images": [[np.nan] * 12]}, "query 0: a picture's embedding is not finite"),
        (["a1"], {"images": [[1e6] * 12]}, "query 0: a picture's embedding is not finite"),
        (["a1", "b2"], {"images": [None]}, "pictures of 1 queries, expected of 2"),
        (["a1", "b2"], {"never": [["0"]]}, "filters of 1 queries, expected of 2"),
    ],
)
def test_what_cannot_be_answered_is_told_and_spoils_nothing(predictor, texts, settings, said):
    before = predictor(["a1 b2"], k=3)
    with pytest.raises(InputError, match=said):
        predictor(texts, **settings)
    assert predictor(["a1 b2"], k=3) == before


def test_nothing_to_search_with_finds_nothing(predictor):
    picture = np.eye(12)[3]
    found = predictor(["", " \t", "", "a1"], [None, None, picture, None], k=3)
    assert list(map(len, found)) == [0, 0, 3, 3]


def test_huge_texts_cost_what_their_beginning_costs(predictor):
    huge = "a1 b2 " * 2_000_000
    np.testing.assert_array_equal(predictor.encode([huge]), predictor.encode([huge[:60_000]]))


def test_the_run_directory_is_enough(run, tmp_path):
    shutil.copytree(run.workdir, tmp_path / "run")
    config = json.loads((tmp_path / "run/config.json").read_text())
    (tmp_path / "run/config.json").write_text(json.dumps({**config, "data": "/nowhere"}))
    moved = Predictor.load(str(tmp_path / "run"), warm=False)
    assert moved(["a1 b2"]) == Predictor.load(run.workdir, warm=False)(["a1 b2"])
    shutil.rmtree(tmp_path / "run/answers")
    with pytest.raises(InputError, match=r"answers: not there yet .* say where they are by --data"):
        Predictor.load(str(tmp_path / "run"), warm=False)
    again = Predictor.load(str(tmp_path / "run"), data=run.data, warm=False)
    np.testing.assert_allclose(again.answers.vectors, moved.answers.vectors, atol=1e-6)


def test_answers_of_another_step_or_damaged_are_not_used(run, tmp_path, capsys):
    where = tmp_path / "run"
    shutil.copytree(run.workdir, where)
    about = where / "answers" / artifacts.ABOUT
    told = json.loads(about.read_text())
    about.write_text(json.dumps({**told, "step": 3}))
    Predictor.load(str(where), warm=False)
    assert "found of step 3, the model is of step 8: made anew" in capsys.readouterr().out
    assert json.loads(about.read_text())["step"] == 8
    for name in ("memory_labels", "vectors", "texts"):
        file = where / f"answers/{name}.npy"
        good = file.read_bytes()
        file.write_bytes(good[:-9] + bytes([good[-9] ^ 64]) + good[-8:])
        with pytest.raises(InputError, match=rf"{name}.npy: has other bytes .*remove"):
            Predictor.load(str(where), warm=False)
        file.write_bytes(good)
    vectors = where / "answers/vectors.npy"
    vectors.write_bytes(vectors.read_bytes()[:-40])
    with pytest.raises(InputError, match=r"vectors.npy: truncated .*remove"):
        Predictor.load(str(where), warm=False)
    os.remove(vectors)
    with pytest.raises(InputError, match=r"vectors.npy: not found"):
        Predictor.load(str(where), warm=False)
    about.write_text("{}")
    with pytest.raises(InputError, match="another format"):
        Predictor.load(str(where), warm=False)


def test_data_of_another_run_are_refused(run, tmp_path):
    (tmp_path / "other").mkdir()
    other = tiny.make_data(tmp_path / "other", train=100)
    shutil.copytree(run.workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/answers")
    with pytest.raises(InputError, match="has other content than the run was trained on"):
        Predictor.load(str(tmp_path / "run"), data=other, warm=False)


def test_what_no_word_is_known_of(predictor):
    items = predictor.items(["a1 b2", "ωφ", "", "a1 ωφ"])
    assert predictor.unknown(items) == [False, True, False, False]
