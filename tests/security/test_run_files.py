"""Hostile files of a run: each is refused in a line, or makes no difference.

See `test_tampered_run` for changed values.
"""

import os
import shutil

import pytest

from tests.security import run_files, worker
from vixml_jax.errors import InputError
from vixml_jax.storage import locks

MODULE = "tests.security.run_files"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs")
    run_files.unpack(path)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("trained")
    run_files.make(path)
    return path


@pytest.fixture
def run(root, tmp_path):
    return shutil.copytree(root / "run", tmp_path / "run")


def test_damaged_runs_are_served_or_refused(root):
    counts = worker.run(MODULE, root, 0, 60)
    assert sum(outcomes.get("refused", 0) for outcomes in counts.values()) > 10, counts


@pytest.mark.parametrize("target", ["/dev/zero", "/proc/self/pagemap", "nowhere", "fifo"])
def test_special_files_are_refused(target, root, run):
    names = ["config.json", "tower.json", "reading.json", "evaluation/mixing.json"]
    names += [f"serving/{path.name}" for path in sorted((run / "serving").iterdir())]
    names += [f"label_updates/000001/{path.name}"
              for path in sorted((run / "label_updates" / "000001").iterdir())]  # fmt: skip
    for name in names:
        path = run / name
        path.unlink()
        if target == "fifo":
            os.mkfifo(path)
        else:
            path.symlink_to(target)
        with pytest.raises(InputError) as error:
            run_files.serve(run)
        assert str(run) in str(error.value) and "\n" not in str(error.value), name
        path.unlink()
        shutil.copyfile(root / "run" / name, path)


@pytest.mark.parametrize("name", ["about.json", "lock", "labels.npy", "train.npy"])
def test_special_files_among_vectors_are_made_anew(name, root, run):
    path = run / "vectors" / name
    expected = run_files.serve(run)["answers"]
    path.unlink()
    os.mkfifo(path)
    assert run_files.serve(run)["answers"] == expected


def test_a_lock_that_is_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / locks.NAME)
    with pytest.raises(InputError, match=r"\.lock: not a regular file; remove it"):
        with locks.exclusive(str(tmp_path), doing="training"):
            pass


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 4))
def test_many_damaged_runs_are_served_or_refused(seed, trained):
    worker.run(MODULE, trained, seed, 700)
