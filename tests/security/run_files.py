"""Run directories for tests: a tiny run with all that a run may have, and random damage to it."""

import contextlib
import dataclasses
import io
import pathlib
import shutil
import tarfile
import tempfile

from tests import tiny
from tests.security import model_directories, test_tampered_run
from vixml_jax import run_data, train
from vixml_jax import workdir as workdir_lib
from vixml_jax.errors import InputError
from vixml_jax.search import scann
from vixml_jax.serving import label_updates
from vixml_jax.serving.predictor import Predictor
from vixml_jax.storage import digests
from vixml_jax.storage.vector_store import VectorStore

UNUSED = ("metrics.jsonl", "tensorboard")  # Predictions do not read them.
OPTIONAL = ("reading.json", "evaluation/mixing.json")  # A run may be without them.
QUERIES = test_tampered_run.QUERIES


def make(root):
    """Trains a run `root/run` with training neighbours, label updates and tuned settings."""
    config = tiny.configuration(tiny.make_data(root, train=60), root / "run")
    config = dataclasses.replace(
        config,
        loop=dataclasses.replace(config.loop, epochs=1),
        knn=dataclasses.replace(config.knn, weight=0.2, k=5),
    )
    with contextlib.redirect_stdout(io.StringIO()):
        train.train(config)
        test_tampered_run.complete(config.workdir)


def unpack(root):
    """Extracts a run of version 0.1 to `root/run`, and lets it have all that a run may have."""
    with tarfile.open(test_tampered_run.FIXTURE) as archive:
        archive.extractall(root, filter="data")
    for name in ("answers", "changes"):
        shutil.rmtree(root / "run" / name)
    with contextlib.redirect_stdout(io.StringIO()):
        test_tampered_run.complete(str(root / "run"), str(root / "data"))


def serve(path):
    """All that a run answers."""
    path = str(path)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        search = "scann" if scann.unavailable_reason() is None else "exact"
        predictor = Predictor.load(path, search=search, warm=False)
        step = tiny.saved(path).step
        stored = VectorStore(path, step, predictor.artifacts.about.content_hash)
        # Where the data are now is searched for; predictions do not need them.
        config = dataclasses.replace(workdir_lib.read_config(path), workdir="", data="")
        return {
            "answers": predictor(QUERIES, k=6),
            "reading": run_data.read_reading(path),
            # Files of version 0.1 have no checksums, and rates of training change no prediction.
            "config": {**dataclasses.asdict(config), "optimizer": None},
            "vectors": [stored.get(name) for name in ("labels", "train")],
            "steps": [label_updates.describe(step) for step in label_updates.steps(path)],
        }


class Target:
    """A run, of which a file is damaged at a time."""

    def __init__(self, root):
        self._run = root / "run"
        self._names = {}  # By file or directory at the top, each of which is damaged as often.
        for path in sorted(self._run.rglob("*")):
            name = path.relative_to(self._run)
            if path.is_file() and name.parts[0] not in UNUSED:
                self._names.setdefault(name.parts[0], []).append(name)
        self._expected = serve(self._run)
        test_tampered_run.assert_same(serve(self._run), self._expected)

    def attack(self, rng):
        """Damages a file of the run and serves it; see `worker`."""
        group = sorted(self._names)[rng.integers(len(self._names))]
        name = self._names[group][rng.integers(len(self._names[group]))]
        with tempfile.TemporaryDirectory() as above:
            run = pathlib.Path(shutil.copytree(self._run, f"{above}/run"))
            what = mutate(rng, run / name)
            print(f"{name}: {what}", end=" ", flush=True)
            try:
                found = serve(run)
            except InputError as error:
                line = str(error)
                assert "\n" not in line and len(line) < 2000, line
                assert above in line or line.startswith("--"), line
                print(line.replace(above, ""), end=" ")
                return group, "refused"
        if what.endswith("missing") and str(name) in OPTIONAL:
            return group, "other"
        test_tampered_run.assert_same(found, self._expected)
        return group, "same"


def mutate(rng, path):
    """Damages a file; returns what was done."""
    data = path.read_bytes()
    ways = [model_directories.put_special] * 2 + [_change_bytes]
    if data[:1] in (b"{", b"["):
        ways += [model_directories.replace_value, model_directories.damage_json]
        ways += [model_directories.replace_value, model_directories.nest]
    way = ways[rng.integers(len(ways))]
    what = f"{way.__name__}: {way(rng, path)}"
    step = next((x for x in path.parents if (x / digests.NAME).exists()), None)
    if step and way is not model_directories.put_special and rng.integers(2):
        if path.name != digests.NAME:  # As someone does who computes checksums again.
            digests.write_digests(str(step))
            what += ", new digests"
    return what


def _change_bytes(rng, path):
    data = path.read_bytes()
    changes = (
        test_tampered_run.flipped, test_tampered_run.overwritten, test_tampered_run.truncated,
    )  # fmt: skip
    change = changes[rng.integers(len(changes))]
    path.write_bytes(change(data, rng) if data else b"\0")
    return change.__name__
