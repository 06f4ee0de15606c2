"""A run and data set written by version 0.1 are evaluated, served, updated and resumed."""

import json
import os
import pathlib
import shutil
import tarfile
import types

import numpy as np
import pytest

from tests import tiny
from vixml_jax import config as config_lib
from vixml_jax import predict, train, workdir
from vixml_jax.data.store import PreparedDataset
from vixml_jax.evaluation import compare, per_query
from vixml_jax.serving import artifacts, label_updates
from vixml_jax.serving.predictor import Predictor

FIXTURE = pathlib.Path(__file__).parent / "fixtures" / "run_0_1.tar.gz"


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    root = tmp_path_factory.mktemp("version_0_1")
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(root, filter="data")
    return root


@pytest.fixture
def root(unpacked, tmp_path):
    return pathlib.Path(shutil.copytree(unpacked, tmp_path / "copy"))


def test_settings_are_read_under_their_new_names(root):
    written = json.loads((root / "run" / "config.json").read_text())
    config = config_lib.load(root / "run" / "config.json")
    assert "memory_weight" in written["eval"] and "knn" not in written  # Really of version 0.1.
    assert config.knn == config_lib.KnnConfig(weight=0.2, k=5)
    assert config.batch.microbatch_rows == written["batch"]["encode_chunk"] == 2
    assert (config.loop.monitor, config.loop.max_to_keep) == ("P@1", 1)
    assert not config.eval.knn_baseline
    assert "prefetch" in written["batch"] and not hasattr(config.batch, "prefetch")


def test_data_and_tower_are_read(root):
    dataset = PreparedDataset.open(root / "data")
    assert (len(dataset.train), len(dataset.valid), len(dataset.test)) == (108, 12, 30)
    np.testing.assert_array_equal(dataset.train.full_lengths, np.diff(dataset.train.tokens.offsets))
    tower, layout = workdir.read_tower(str(root / "run"))
    assert (tower.width, layout.num_images) == (16, 1)


def test_it_is_evaluated_to_the_same_metrics(root):
    expected = json.loads((root / "run" / "evaluation" / "test-exact.json").read_text())
    before = per_query.load(str(root / "run/evaluation/test-exact.queries.npz"))[0]
    said = tiny.run_command("evaluate", f"--workdir={root}/run", f"--data={root}/data")
    found = json.loads((root / "run" / "evaluation" / "test-exact.json").read_text())
    metrics = [name for name, value in expected.items() if "@" in name or name == "MRR"]
    assert len(metrics) > 15
    for name in metrics:
        assert found[name] == pytest.approx(expected[name], abs=1e-4), name
    for name, value in expected["with_memory"].items():
        assert found["with_neighbours"][name] == pytest.approx(value, abs=1e-4), name
    assert found["mixing"] == expected["mixing"]  # As tuned by version 0.1.
    assert "--knn.weight=0.1" in said
    after = per_query.load(str(root / "run/evaluation/test-exact.queries.npz"))[0]
    np.testing.assert_allclose(after.values, before.values, atol=1e-5)


def test_it_answers_as_before(root):
    expected = [json.loads(line) for line in (root / "answers.jsonl").read_text().splitlines()]
    predictor = Predictor.load(str(root / "run"), warm=False)  # Without the prepared data.
    found = predictor(["a3 b4", "b7 a1", "a9 b0"], k=3)
    for one, other in zip(found, expected, strict=True):
        assert [label.id for label in one] == [label["id"] for label in other["labels"]]
        np.testing.assert_allclose(
            [label.score for label in one], [label["score"] for label in other["labels"]], rtol=1e-4
        )
    assert artifacts.locate(str(root / "run")) == str(root / "run" / "answers")
    assert predictor.num_labels == 20  # One was added, one removed.


def test_its_label_updates_go_on(root):
    run = str(root / "run")
    (root / "gone.txt").write_text("1\n")
    tiny.run_command("predict", f"--workdir={run}", f"--remove_labels={root}/gone.txt")
    assert [os.path.basename(path) for path in label_updates.steps(run)] == [
        "000001", "000002", "000003",
    ]  # fmt: skip
    assert Predictor.load(run, warm=False).num_labels == 19
    for _ in range(3):
        label_updates.undo(run)
    assert Predictor.load(run, warm=False).num_labels == 20 and not label_updates.steps(run)


def test_training_resumes_in_it(root, monkeypatch, capfd):
    """Its state is restored; the run is complete, so it is only evaluated again."""
    monkeypatch.chdir(root)
    assert tiny.saved("run").step == 14  # The best epoch, not the last.
    config = config_lib.load("run/config.json")
    train.train(config)
    printed = capfd.readouterr().out
    assert "step 21 of 21" in printed
    found = json.loads((root / "run" / "evaluation" / "valid-exact.json").read_text())
    assert found["P@1"] == 100.0 and "with_neighbours" in found
    assert artifacts.locate("run") == os.path.join(
        "run", "serving"
    )  # Of this version, from now on.
    assert len(Predictor.load("run", warm=False)(["a3 b4"], k=2)[0]) == 2


def test_its_evaluations_are_compared_under_their_new_names(root):
    run = str(root / "run")
    directory = root / "run" / "evaluation"
    for new, old in (("neighbours", "memory"), ("knn_image", "vote_picture")):
        path = directory / f"test-exact-{old}.queries.npz"
        shutil.copy(directory / "test-exact.queries.npz", path)
        assert compare.find(run, f"test-exact-{new}") == str(path)
        path.with_name(f"test-exact-{new}.queries.npz").touch()  # Evaluated again since.
        assert compare.find(run, f"test-exact-{new}") != str(path)
    assert compare.find(run, "test-exact") == str(directory / "test-exact.queries.npz")


@pytest.mark.parametrize("names,used", [((), "images"), (("pictures",), "pictures"),
                                        (("pictures", "images"), "images")])  # fmt: skip
def test_its_embeddings_of_query_images_are_used(tmp_path, monkeypatch, names, used):
    for name in names:
        (tmp_path / name).mkdir()
    about = types.SimpleNamespace(images="model, stretched")
    predictor = types.SimpleNamespace(artifacts=types.SimpleNamespace(about=about))
    values = types.SimpleNamespace(
        workdir=str(tmp_path), image_dtype="float32", allow_private_hosts=False, num_processes=1
    )
    monkeypatch.setattr(predict, "ImageFinder", lambda _, path, **__: path)
    assert predict._image_finder(predictor, values) == str(tmp_path / used)
    values.num_processes, values.process_index = 3, 1  # Each process has a store of its own.
    assert predict._image_finder(predictor, values) == str(tmp_path / f"{used}-00001-of-00003")
