"""Files of a run that were changed: each is refused in one line, or answers as before.

All files of a run directory are walked, so that a file of a later version is covered by itself.
"""

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import shutil
import tarfile

import numpy as np
import pytest

from tests import tiny
from vixml_jax import config as config_lib
from vixml_jax import frozen_weights, run_data, train
from vixml_jax import workdir as workdir_lib
from vixml_jax.augmentation import settings
from vixml_jax.errors import InputError
from vixml_jax.saved_model import SavedModel
from vixml_jax.search import scann
from vixml_jax.search.scann import ScannIndex
from vixml_jax.serving import label_updates
from vixml_jax.serving.predictor import Predictor
from vixml_jax.storage import sealed
from vixml_jax.storage.vector_store import VectorStore

FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures" / "run_0_1.tar.gz"
SEED = np.random.SeedSequence().entropy
CHECKPOINTS = (workdir_lib.CHECKPOINTS, workdir_lib.BEST, frozen_weights.DIRECTORY)
QUERIES = ["a1 b2", "b7 a3", "a0", ""]


READING = {
    "kind": "csv",
    "columns": {"id": "id", "text": "title"},
    "dialect": {"encoding": "cp1252"},
}


def complete(workdir, data=""):
    """Lets a run have all that it can serve: tuned scores, label updates, an index, vectors."""
    step = tiny.saved(workdir).step
    mixing = {"weight": 0.3, "k": 4, "temperature": 0.1, "joint": False}
    settings.save_tuned(workdir, step, ["P@1"], [{**mixing, "value": 50.0}])
    run_data.save_reading(workdir, READING)
    predictor = Predictor.load(workdir, search="scann", data=data, warm=False)
    vectors = predictor.encode(["a1 b2", "a4 b4"])
    names, texts = ["new 1", "new 2"], ["text 1", "text 2"]
    label_updates.add(workdir, predictor.artifacts, names, texts, vectors)
    label_updates.remove(workdir, predictor.artifacts, [predictor.artifacts.ids[3], "new 2"])
    return pathlib.Path(workdir)


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """A run of version 0.1, whose files this version has written again."""
    root = tmp_path_factory.mktemp("intact")
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(root, filter="data")
    workdir = str(root / "run")
    for name in ("answers", "changes"):
        shutil.rmtree(root / "run" / name)
    tower = root / "run" / workdir_lib.TOWER
    sealed.write(tower, json.loads(tower.read_text()))
    config = root / "run" / workdir_lib.CONFIG
    config_lib.save(str(config), config_lib.load(str(config)))
    return complete(workdir, str(root / "data"))


@pytest.fixture
def workdir(intact, tmp_path):
    return pathlib.Path(shutil.copytree(intact, tmp_path / "run"))


@pytest.fixture
def served(intact, monkeypatch):
    """A function that opens a run and returns all that it answers; checkpoints are read once."""
    restored = {}
    restore = SavedModel.restore

    def restore_once(saved, model):
        key = model.table.num_labels, model.tower.config
        if key not in restored:
            restored[key] = restore(saved, model)
        return restored[key]

    monkeypatch.setattr(SavedModel, "restore", restore_once)

    def serve(path):
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            predictor = Predictor.load(str(path), search="scann", warm=False)
            config = workdir_lib.read_config(str(path))
            step = tiny.saved(path).step
            stored = VectorStore(str(path), step, predictor.artifacts.about.content_hash)
            vectors = [stored.get(name) for name in ("labels", "train")]
            answers = predictor(QUERIES, k=6)
        return {
            "answers": answers,
            "reading": run_data.read_reading(str(path)),
            "config": {**dataclasses.asdict(config), "workdir": ""},
            "vectors": vectors,
            "steps": [label_updates.describe(step) for step in label_updates.steps(str(path))],
        }

    return serve


def assert_same(found, expected):
    for name in ("answers", "reading", "config", "steps"):
        assert found[name] == expected[name], name
    for one, other in zip(found["vectors"], expected["vectors"], strict=True):
        if one is not None:  # None: made anew.
            np.testing.assert_array_equal(one, other)


def files_of(workdir):
    """Files of a run by their relative paths, without those of checkpoints."""
    paths = [path for path in sorted(workdir.rglob("*")) if path.is_file()]
    names = [path.relative_to(workdir) for path in paths]
    return [name for name in names if name.parts[0] not in CHECKPOINTS]


def is_refused_or_same(serve, workdir, expected, what):
    """Serves a changed run; returns whether it was refused, in a line."""
    try:
        found = serve(workdir)
    except InputError as error:
        assert "\n" not in str(error), what
        return True
    try:
        assert_same(found, expected)
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}") from None
    return False


def flipped(data, rng):
    """A copy with one byte changed."""
    changed = bytearray(data)
    changed[rng.integers(len(data))] ^= int(rng.integers(1, 256))
    return bytes(changed)


def overwritten(data, rng):
    """A copy with eight bytes in a row changed."""
    changed, at = bytearray(data), int(rng.integers(max(1, len(data) - 8)))
    changed[at : at + 8] = rng.bytes(len(changed[at : at + 8]))
    return bytes(changed)


def truncated(data, rng):
    return data[: rng.integers(len(data))]


def edited(data, rng):
    """A JSON file with one value changed, its checksum left; None: not a JSON object."""
    try:
        tree = json.loads(data)
        leaves = list(leaves_of(tree))
    except ValueError:
        return None
    if not leaves or not isinstance(tree, dict):
        return None
    parent, key = leaves[rng.integers(len(leaves))]
    value = parent[key]
    if isinstance(value, bool):
        parent[key] = not value
    elif isinstance(value, int | float):
        parent[key] = type(value)(rng.choice([value + 1, value * 1000, -1, 0, 10**9]))
    else:
        parent[key] = rng.choice(["", "x", f"{value}x", "../x"]).item()
    return json.dumps(tree).encode()


def leaves_of(tree):
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in [*items] if isinstance(tree, dict | list) else ():
        if isinstance(value, dict | list):
            yield from leaves_of(value)
        elif value is not None:
            yield tree, key


MUTATIONS = (flipped, overwritten, truncated, edited)


def attack(serve, intact, workdir, rng, turns):
    """Changes each file in each way; returns how often each file was refused."""
    expected = serve(workdir)
    refused = {}
    for name in files_of(intact):
        data = (intact / name).read_bytes()
        mutations = MUTATIONS * turns if turns else rng.choice(MUTATIONS, 2, replace=False)
        for mutate in mutations if data else ():
            changed = mutate(data, rng)
            if changed is None or changed == data:
                continue
            (workdir / name).write_bytes(changed)
            what = f"{name}, {mutate.__name__}, seed {SEED}"
            refused.setdefault(str(name), []).append(
                is_refused_or_same(serve, workdir, expected, what)
            )
            for path in files_of(workdir):  # What was written again or anew.
                if not (intact / path).exists():
                    (workdir / path).unlink()
            for path in files_of(intact):
                if (workdir / path).read_bytes() != (intact / path).read_bytes():
                    shutil.copyfile(intact / path, workdir / path)
    return refused


def test_no_changed_file_answers_otherwise(served, intact, workdir):
    refused = attack(served, intact, workdir, np.random.default_rng(SEED), turns=0)
    names = {os.path.basename(name) for name in refused if any(refused[name])}
    assert names >= {"tokenizer.json", "vectors.npy", "ids.npy", "train_labels.npy"}


@pytest.mark.slow
def test_no_changed_file_of_a_new_run_answers_otherwise(served, tmp_path):
    config = tiny.configuration(tiny.make_data(tmp_path, train=60), tmp_path / "new")
    config = dataclasses.replace(
        config,
        loop=dataclasses.replace(config.loop, epochs=1),
        knn=dataclasses.replace(config.knn, weight=0.2, k=5),
    )
    train.train(config)
    new = complete(config.workdir)
    copy = pathlib.Path(shutil.copytree(new, tmp_path / "copy"))
    refused = attack(served, new, copy, np.random.default_rng(SEED), turns=20)
    names = {os.path.basename(name) for name in refused if any(refused[name])}
    assert names >= {
        "config.json", "tower.json", "reading.json", "mixing.json", "artifacts.json",
        "tokenizer.json", "change.json", "vectors.npy", "ids.npy", "texts.npy", "train_labels.npy",
    }  # fmt: skip


def seal_again(path, change):
    """Changes fields of a file as someone does who computes its checksum again."""
    fields = json.loads(path.read_text())
    change(fields)
    sealed.write(path, fields)


def unsealed(path, change):
    """Changes fields of a file as an earlier version wrote it, without a checksum."""
    fields = json.loads(path.read_text())
    del fields[sealed.FIELD]
    change(fields)
    path.write_text(json.dumps(fields))


WRONG = {
    "evaluation/mixing.json": [
        *(("mixing", name, value) for name, value in [
            ("temperature", 0), ("temperature", -1.0), ("temperature", 1e300), ("temperature", "x"),
            ("k", 0), ("k", -3), ("k", 10**30), ("k", 1.5), ("k", None),
            ("weight", -0.1), ("weight", 1.1), ("weight", "1"), ("joint", 2),
        ]),
        ("fusion", None, {"prototypes": 0, "head": 0}),
        ("fusion", None, {"prototypes": -1, "head": 1}),
        ("fusion", None, [1, 2]),
        ("step", None, "x"),
    ],
    "serving/artifacts.json": [
        *(("num_labels", None, value) for value in (0, -1, 10**9, 2**31, 10**30, "20", 21)),
        *(("max_tokens", None, value) for value in (0, -1, 10**12, 1.5)),
        *(("mean_tokens", None, value) for value in (-1, "x", 1e300)),
        ("image_width", None, -1),
        ("step", None, -1),
        *(("arrays", None, value) for value in ({}, [], 3, {"ids": 3}, {"ids": {}})),
        *(("arrays", name, {"dtype": "|u1", "shape": [10**12], "sha256": ""})
          for name in ("ids", "ids_offsets", "vectors", "train_vectors", "train_indptr")),
        *(("arrays", name, {"dtype": dtype, "shape": [2**62, 2**62], "sha256": "0"})
          for name in ("vectors", "texts") for dtype in ("<f4", "|O", "nonsense", "<f4,<f4")),
    ],
    "label_updates/000001/change.json": [
        ("kind", None, "remove"), ("ids", None, ["x"]), ("texts", None, []), ("texts", None, "x"),
        ("rows", None, [-1]), ("rows", None, [0]), ("step", None, 99), ("content_hash", None, ""),
        ("ids", None, {}), ("sha256", None, "0" * 64),
    ],
    "label_updates/000002/change.json": [
        ("rows", None, [-1, 4]), ("rows", None, [3, 3]), ("rows", None, [4, 21]),
        ("rows", None, []), ("rows", None, [10**30, 21]), ("ids", None, ["x", "new 2"]),
        ("kind", None, "add"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("change", [seal_again, unsealed])
@pytest.mark.parametrize("name", WRONG)
def test_values_out_of_range_are_refused_with_and_without_checksum(served, workdir, name, change):
    data = (workdir / name).read_bytes()
    for field, inner, value in WRONG[name]:

        def edit(fields, field=field, inner=inner, value=value):
            if inner is None:
                fields[field] = value
            else:
                fields[field][inner] = value

        change(workdir / name, edit)
        with pytest.raises(InputError, match=os.path.dirname(name).split("/")[0]) as refusal:
            served(workdir)
        assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 1000
        (workdir / name).write_bytes(data)


@pytest.mark.parametrize("text", ["[]", "3", "null", '"x"', "{}", "", "[" * 100_000, "\x00", "{"])
def test_files_of_another_shape_are_refused(served, workdir, text):
    for name in [*WRONG, "config.json", "tower.json", "reading.json"]:
        data = (workdir / name).read_bytes()
        (workdir / name).write_text(text)
        with pytest.raises(InputError) as refusal:
            served(workdir)
        assert os.path.basename(name) in str(refusal.value) and "\n" not in str(refusal.value)
        (workdir / name).write_bytes(data)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x * 1000,
        lambda x: x * np.nan,
        lambda x: x * np.inf,
        lambda x: x * 0,
        lambda x: x[:, ::-1],
        lambda x: x.astype(np.float64),
        lambda x: np.asfortranarray(x),
        lambda x: x[:1],
        lambda x: np.array([object()], object),
        lambda x: x.reshape(-1),
    ],
)
def test_vectors_of_added_labels_are_checked(served, workdir, change):
    path = workdir / "label_updates" / "000001" / label_updates.VECTORS
    np.save(path, change(np.load(path)), allow_pickle=True)
    with pytest.raises(InputError, match=r"000001.*remove the directory"):
        served(workdir)


def test_headers_of_arrays_take_no_memory(served, workdir):
    path = workdir / "label_updates" / "000001" / label_updates.VECTORS
    with open(path, "wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 1 << 20)}
        np.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(InputError, match=r"000001.*remove the directory"):
        served(workdir)
    path.write_bytes(b"\x93NUMPY\x01\x00\x10\x00" + b"({['\x00'''''''''''")
    with pytest.raises(InputError, match=r"000001.*remove the directory"):
        served(workdir)


def test_a_missing_step_between_others_is_refused(served, workdir):
    shutil.rmtree(workdir / "label_updates" / "000001")
    with pytest.raises(InputError, match=r"000002: expected .*000001 before it"):
        served(workdir)


def test_words_of_the_tokenizer_cannot_be_swapped(served, workdir):
    path = workdir / "serving" / "tokenizer.json"
    tree = json.loads(path.read_text())
    vocabulary = tree["model"]["vocab"]
    if isinstance(vocabulary, dict):
        one, two = [*vocabulary][-2:]
        vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    else:
        vocabulary[-1][0], vocabulary[-2][0] = vocabulary[-2][0], vocabulary[-1][0]
    path.write_text(json.dumps(tree))
    with pytest.raises(InputError, match=r"tokenizer.json: does not match its checksum; remove"):
        served(workdir)


def test_files_without_checksums_of_earlier_versions_are_read(served, workdir):
    expected = served(workdir)
    for name in ("config.json", "tower.json", "reading.json", *WRONG):
        unsealed(workdir / name, lambda fields: fields.pop("tokenizer", fields.pop("sha256", 0)))
    assert_same({**served(workdir), "steps": expected["steps"]}, expected)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A small ScaNN index with leaves, and its vectors."""
    if reason := scann.unavailable_reason():
        pytest.skip(reason)
    vectors = np.random.default_rng(1).normal(size=(800, 16)).astype(np.float32)
    built = ScannIndex.build(vectors, {**scann.settings_for(scann.FEW), "leaves": 10})
    built.use({"k": 5, "recall_wanted": 0.9, "recall": 0.95, "leaves_searched": 5, "reordered": 50})
    directory = tmp_path_factory.mktemp("tree") / "index"
    built.save(directory)
    return directory, vectors


def test_files_of_an_index_are_checked(tree, tmp_path):
    directory, vectors = tree
    rng = np.random.default_rng(SEED)
    copy = pathlib.Path(shutil.copytree(directory, tmp_path / "copy"))
    expected = ScannIndex.load(copy, vectors).search(vectors[:9], 5)
    names = [path.name for path in directory.iterdir()]
    assert len(names) > 3
    for name in names:
        data = (copy / name).read_bytes()
        for mutate in (flipped, overwritten, truncated, edited):
            changed = mutate(data, rng)
            if changed is None or changed == data:
                continue
            (copy / name).write_bytes(changed)
            try:
                found = ScannIndex.load(copy, vectors).search(vectors[:9], 5)
            except InputError as error:
                assert name in str(error) and "built again" in str(error), SEED
            else:  # Such as a space of `index.json`, or a letter of the name of its checksum.
                assert name == scann.ABOUT, (name, mutate.__name__, SEED)
                np.testing.assert_array_equal(found.ids, expected.ids)
        (copy / name).write_bytes(data)
    (copy / "more").write_bytes(b"")
    with pytest.raises(InputError, match="more: does not match"):
        ScannIndex.load(copy, vectors)


@pytest.mark.parametrize("change", [seal_again, unsealed])
def test_settings_of_an_index_are_checked(tree, tmp_path, change):
    directory, vectors = tree
    copy = pathlib.Path(shutil.copytree(directory, tmp_path / "copy"))
    data = (copy / scann.ABOUT).read_bytes()
    wrong = [
        *(("settings", name, value)
          for name in ("leaves", "leaves_searched", "reordered", "k", "dimensions_per_block")
          for value in (-1, 10**30, "x", None, 1.5)),
        ("settings", None, {}), ("settings", None, []), ("points", None, [{}]),
        ("points", None, [{"k": 0}]), ("points", None, 3), ("points", None, ["x"]),
        ("num_labels", None, -1), ("files", None, 3), ("fingerprint", None, 3),
    ]  # fmt: skip
    for field, inner, value in wrong:

        def edit(fields, field=field, inner=inner, value=value):
            if inner is None:
                fields[field] = value
            else:
                fields[field][inner] = value

        change(copy / scann.ABOUT, edit)
        with pytest.raises(InputError, match=r"index.json: .*built again"):
            ScannIndex.load(copy, vectors)
        (copy / scann.ABOUT).write_bytes(data)


def test_an_index_of_an_earlier_version_is_read_or_refused(tree, tmp_path):
    directory, vectors = tree
    copy = pathlib.Path(shutil.copytree(directory, tmp_path / "copy"))
    unsealed(copy / scann.ABOUT, lambda fields: fields.pop("files"))
    expected = ScannIndex.load(directory, vectors).search(vectors[:9], 5)
    found = ScannIndex.load(copy, vectors).search(vectors[:9], 5)
    np.testing.assert_array_equal(found.ids, expected.ids)
    (copy / "scann_assets.pbtxt").write_bytes(b"")
    with pytest.raises(InputError, match=r"scann cannot read the index .*built again"):
        ScannIndex.load(copy, vectors)
