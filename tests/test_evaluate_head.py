"""Evaluation of a run with a label head against dense scores in float64; nothing encoded twice."""

import dataclasses
import json
import os
import pathlib

import jax
import numpy as np
import pytest
import scipy.special

from tests import tiny
from vixml_jax import evaluate, evaluator, saved_model, train, workdir
from vixml_jax.augmentation import settings
from vixml_jax.augmentation.mixing import Mixing
from vixml_jax.augmentation.settings import Scoring
from vixml_jax.config import SearchConfig
from vixml_jax.labels.head import SCALE
from vixml_jax.modeling import Model
from vixml_jax.search.fusion import Fusion
from vixml_jax.storage.vector_store import VectorStore

FUSION = Fusion(5.0, 1.0, 0.7)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with a refitted head, tuned at the end of training."""
    root = tmp_path_factory.mktemp("run")
    config = tiny.configuration(tiny.make_data(root, train=120, valid=0.2), root / "run")
    config = dataclasses.replace(
        config,
        loop=dataclasses.replace(config.loop, epochs=1),
        head=dataclasses.replace(config.head, refit=True, epochs=3, batch_size=16, mlp_width=8),
        eval=dataclasses.replace(config.eval, tune=["P@1", "R@10"]),
    )
    train.train(config)
    return config


@pytest.fixture(scope="module")
def opened(run):
    config = workdir.read_config(run.workdir)
    dataset = workdir.open_dataset(config)
    model = workdir.build_model(
        config, *workdir.read_tower(run.workdir), dataset.num_labels, workdir.make_mesh(config)
    )
    params, labels, step = saved_model.restore(run.workdir, model)
    return config, model, params, labels, dataset, step


def searched(opened, **how):
    _, model, params, labels, dataset, _ = opened
    how = {"k": 10, "block": 32, "titles": False, **how}
    return evaluator.search_model(model, params, labels, dataset, **how)


def dense(opened, split, fusion, width=None):
    """Probabilities of all labels in float64, and the cosines of queries and training queries.

    They are those of the first `width` columns of all vectors.
    """
    _, model, params, labels, dataset, _ = opened
    z = model.encode_labels(params, labels, dataset.labels, block=32).values.astype(np.float64)
    q, t = (
        model.encode_queries(params, items, block=32).values.astype(np.float64)
        for items in (getattr(dataset, split), dataset.train)
    )
    head = jax.tree.map(lambda x: np.asarray(x, np.float64), params["head"])
    w, b = (head[name][: dataset.num_labels] for name in ("vectors", "bias"))
    up, down = head["mlp"]["up"], head["mlp"]["down"]
    x = q @ up["kernel"] + up["bias"]
    gelu = x * 0.5 * (1 + scipy.special.erf(x / np.sqrt(2)))
    g = q + gelu @ down["kernel"] + down["bias"]
    w, (q, z, t, g) = w[:, :width], (x[:, :width] for x in (q, z, t, g))
    q, z, t, g = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (q, z, t, g))
    count = np.array([np.sum(dataset.train_relevance.toarray() > 0, axis=0)])
    scores = fusion.prototypes * q @ z.T + fusion.head * (SCALE * g @ w.T + b)
    scores += fusion.frequency * np.log(1 + count)
    return scipy.special.softmax(scores, axis=1), q @ t.T


def assert_ranked(result, p):
    assert result.ids.shape[1] == 10
    order = np.sort(p, axis=1)[:, ::-1][:, :10]
    np.testing.assert_allclose(result.scores, order, rtol=2e-4)
    np.testing.assert_allclose(np.take_along_axis(p, result.ids, axis=1), order, rtol=2e-4)


@pytest.mark.parametrize("fusion", [FUSION, Fusion(0.0, 1.0, -2.0), Fusion(20.0, 0.0)])
@pytest.mark.parametrize("search", ["exact", "scann"])
def test_scores_are_probabilities_over_all_labels(opened, search, fusion):
    found = searched(opened, scoring=Scoring(fusion), search=search)
    p, _ = dense(opened, "test", fusion)
    assert_ranked(found.searches[""], p)
    assert found.results["fusion"] == fusion._asdict()
    assert found.results["search"]["log_sum"] == "exact"  # Few labels, with ScaNN too.
    assert found.results["search"]["recall@10"] == 1.0
    np.testing.assert_allclose(np.linalg.norm(found.label_vectors.values, axis=1), 1, rtol=1e-5)
    if not fusion.head:  # Prototypes alone rank as cosines do.
        _, model, params, labels, dataset, _ = opened
        plain = {name: value for name, value in params.items() if name != "head"}
        cosines = evaluator.search_model(model, plain, labels, dataset, k=10, block=32)
        assert cosines.results["metrics"] == found.results["metrics"]
        assert "fusion" not in cosines.results and "log_sum" not in cosines.results["search"]


@pytest.mark.parametrize(("split", "width"), [("test", 0), ("train", 0), ("test", 8)])
def test_neighbours_mix_in_probability(opened, split, width):
    dataset = opened[4]
    mixing, alone = Mixing(0.4, 6, 0.1), Fusion(2.0, 1.0, 0.3)
    size = SearchConfig(width=width)
    found = searched(
        opened, split=split, scoring=Scoring(FUSION, mixing, alone), search_config=size
    )
    assert_ranked(found.searches[""], dense(opened, split, alone, width or None)[0])
    p, cosines = dense(opened, split, FUSION, width or None)
    expected = np.zeros_like(p)
    best = np.argsort(-p, axis=1)[:, :10]
    np.put_along_axis(expected, best, 0.6 * np.take_along_axis(p, best, axis=1), axis=1)
    if split == "train":  # No query is its own neighbour.
        np.fill_diagonal(cosines, -np.inf)
    of_labels = dataset.train_relevance.toarray()
    of_labels /= of_labels.sum(axis=1, keepdims=True)
    near = np.argsort(-cosines, axis=1)[:, :6]
    pi = scipy.special.softmax(np.take_along_axis(cosines, near, axis=1) / 0.1, axis=1)
    expected += 0.4 * np.einsum("qt,qtl->ql", pi, of_labels[near])
    result = found.searches[evaluator.NEIGHBOURS]
    np.testing.assert_allclose(
        result.scores, np.sort(expected, axis=1)[:, ::-1][:, :10], rtol=2e-3, atol=1e-6
    )
    assert found.results["fusion_with_neighbours"] == FUSION._asdict()
    assert found.results["fusion"] == alone._asdict()


def test_a_head_needs_weights(opened):
    with pytest.raises(ValueError, match=r"expected scoring\.fusion"):
        searched(opened)


def test_training_ends_with_tuned_settings(run, opened):
    config, *_, step = opened
    saved = json.loads(pathlib.Path(run.workdir, settings.TUNED).read_text())
    assert saved["step"] == step and saved["by"] == ["P@1", "R@10"]
    tuned = settings.as_tuned(config, run.workdir, step)
    assert tuned == settings.best_of(saved["tried"])
    path = os.path.join(run.workdir, "evaluation", "valid-exact.json")
    results = json.loads(pathlib.Path(path).read_text())
    assert results["fusion"] == tuned.without_neighbours().fusion._asdict()
    # The value of the best setting is that of the evaluation on the validation split.
    row = results if tuned.mixing is None else results["with_neighbours"]
    assert saved["tried"][0]["value"] == pytest.approx((row["P@1"] + row["R@10"]) / 2)
    alone = next(row for row in saved["tried"] if not row["weight"])
    assert alone["value"] == pytest.approx((results["P@1"] + results["R@10"]) / 2)
    fusions = {settings.from_row(row).fusion for row in saved["tried"]}
    assert Fusion(0.0, 1.0) in fusions and Fusion(20.0, 0.0) in fusions and len(fusions) >= 9


def test_nothing_is_encoded_twice(opened, tmp_path, monkeypatch):
    config, model, params, labels, dataset, step = opened
    config = dataclasses.replace(config, workdir=str(tmp_path))
    calls = []
    for name in ("encode_labels", "encode_queries"):
        encode = getattr(Model, name)

        def counted(self, *args, name=name, encode=encode, **how):
            calls.append(name)
            return encode(self, *args, **how)

        monkeypatch.setattr(Model, name, counted)

    def show(search="exact", split="test", **how):
        vectors = VectorStore(str(tmp_path), step, dataset.content_hash)
        calls.clear()
        scoring = Scoring(FUSION, Mixing(0.2, 5, 0.1))
        return evaluate.show(
            config, model, params, labels, dataset, split=split, search=search, step=step,
            vectors=vectors, scoring=scoring, **how,
        )  # fmt: skip

    first = show()
    assert sorted(calls) == ["encode_labels", "encode_queries", "encode_queries"]
    again = show()
    assert not calls
    for key in ("P@1", "R@10", "nDCG@5"):
        assert first["metrics"][key] == again["metrics"][key]
        assert first["with_neighbours"][key] == again["with_neighbours"][key]
    show(search="scann")
    assert not calls
    show(split="valid")
    assert calls == ["encode_queries"]
    show(tune=["P@1"])
    assert not calls
    show(split="train")
    assert not calls
    show(drop_images=True)  # Other queries: nothing is read from the store, nor written to it.
    assert calls
    assert show()["metrics"] == first["metrics"] and not calls


def test_the_command_takes_weights_and_shows_them(run):
    printed = tiny.run_command(
        "evaluate", f"--workdir={run.workdir}", "--fusion.prototypes=3", "--report"
    )
    path = pathlib.Path(run.workdir, "evaluation", "test-exact.json")
    results = json.loads(path.read_text())
    assert results["fusion"]["prototypes"] == 3.0
    assert "scores as tuned: --fusion.prototypes=" in printed and "overridden" in printed
    page = path.with_suffix(".report.html").read_text()
    assert "Predictions, with probabilities" in page and "Loss of the label head" in page
    assert "prototypes 3.0, head" in page
    error = tiny.run_command(
        "evaluate", f"--workdir={run.workdir}", "--fusion.prototypes=0", "--fusion.head=0", status=2
    )
    assert "all scores would be equal" in error


@pytest.mark.parametrize("search", ["exact", "scann"])
def test_the_first_columns_of_all_vectors_are_searched(opened, search, tmp_path):
    """Of both parts; indexes and vectors of other widths are not used."""
    width, store = 8, VectorStore(str(tmp_path), 1, "hash", num_processes=1)
    how = {"scoring": Scoring(FUSION), "search": search, "vectors": store}
    how["index_dir"] = str(tmp_path / "scann")
    whole = searched(opened, **how)
    found = searched(opened, search_config=SearchConfig(width=width), **how)
    again = searched(opened, **how)
    np.testing.assert_array_equal(whole.searches[""].ids, again.searches[""].ids)
    assert_ranked(found.searches[""], dense(opened, "test", FUSION, width)[0])
    assert found.label_vectors.values.shape[1] > width  # Those that are kept are whole.


def test_vectors_of_8_bits_find_the_same(opened):
    """With so few labels all are scored again, so the sum over them is exact, too."""
    found = searched(opened, scoring=Scoring(FUSION), search_config=SearchConfig(dtype="int8"))
    assert_ranked(found.searches[""], dense(opened, "test", FUSION)[0])
    assert found.results["search"]["log_sum"] == "int8"
    assert found.results["search"]["recall@10"] == 1.0
    whole = searched(opened, scoring=Scoring(FUSION))
    held = [x.results["search"]["bytes_per_label"] for x in (found, whole)]
    assert held[0] < 0.45 * held[1]  # Narrow vectors: scales and bias count.


def test_results_of_other_sizes_have_names_of_their_own(run):
    tiny.run_command("evaluate", f"--workdir={run.workdir}")
    path = pathlib.Path(run.workdir, "evaluation", "test-exact.json")
    before = path.read_bytes()
    printed = tiny.run_command(
        "evaluate", f"--workdir={run.workdir}", "--search.width=8", "--search.dtype=int8"
    )
    assert "note: --search.width=8: the run was trained for 16 (--loss.widths)" in printed
    results = json.loads(path.with_name("test-exact-width_8-int8.json").read_text())
    assert results["search"]["width"] == 8 and results["search"]["dtype"] == "int8"
    assert path.read_bytes() == before
    error = tiny.run_command("evaluate", f"--workdir={run.workdir}", "--search.width=17", status=2)
    assert "--search.width=17: expected 0 to 16" in error


def test_search_settings_do_not_change_probabilities(opened):
    scoring = Scoring(FUSION)
    one = searched(opened, scoring=scoring)
    other = searched(
        opened, scoring=scoring, search_config=SearchConfig(query_block=8, label_block=4)
    )
    np.testing.assert_allclose(one.searches[""].scores, other.searches[""].scores, rtol=1e-5)
