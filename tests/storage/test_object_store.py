"""Runs and data in an object store, with a local fake of Google Cloud Storage."""

import dataclasses
import json
import os
import subprocess
import sys

import fsspec
import pytest
from etils import epath

from tests import fake_object_store
from tests.tiny import assert_same_state, configuration, final_state, make_data
from vixml_jax import train, workdir
from vixml_jax.errors import InputError
from vixml_jax.storage import digests, object_store
from vixml_jax.training.metric_logger import METRICS


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="module")
def store(data):
    """A bucket that holds the prepared data."""
    with fake_object_store.serve() as environment, pytest.MonkeyPatch.context() as patched:
        for name, value in environment.items():
            patched.setenv(name, value)
        patched.setitem(fsspec.config.conf, "gcs", {"token": "anon"})
        object_store.check("gs://shop/prepared", "data")
        for name in os.listdir(data):
            with open(os.path.join(data, name), "rb") as file:
                epath.Path(f"gs://shop/prepared/{name}").write_bytes(file.read())
        yield "gs://shop"


def curve(path):
    lines = [json.loads(line) for line in epath.Path(path).read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


@pytest.mark.slow
def test_a_remote_run_equals_a_local_run(data, store, tmp_path):
    """Trains, removes the newest checkpoint as if the run had been killed, resumes, evaluates."""
    local = configuration(data, tmp_path / "run")
    train.train(local)
    remote = dataclasses.replace(local, data=f"{store}/prepared", workdir=f"{store}/run")
    cache = str(tmp_path / "cache")
    train.train(remote, data_cache=cache)
    assert_same_state(final_state(local), final_state(remote))
    checkpoints = epath.Path(remote.workdir) / workdir.CHECKPOINTS
    last = digests.steps(os.fspath(checkpoints))[-1]
    (checkpoints / str(last)).rmtree()
    assert digests.steps(os.fspath(checkpoints))
    (tmp_path / "cache" / os.listdir(cache)[0]).exists()
    train.train(remote, data_cache=cache)
    assert_same_state(final_state(local), final_state(remote))
    assert curve(f"{remote.workdir}/{METRICS}") == curve(f"{local.workdir}/{METRICS}")
    reports = [
        json.loads((epath.Path(config.workdir) / "evaluation/test-exact.json").read_text())
        for config in (local, remote)
    ]
    assert reports[0]["P@1"] == reports[1]["P@1"] and reports[0]["R@10"] == reports[1]["R@10"]
    assert list((epath.Path(remote.workdir) / "tensorboard").iterdir())


def local_copy(store, cache):
    return object_store.local_copy(f"{store}/prepared", "some-data", cache)


def test_data_are_copied_once_and_completely(data, store, tmp_path, monkeypatch):
    cache = str(tmp_path)
    copy = local_copy(store, cache)
    assert copy == os.path.join(cache, "some-data")
    assert sorted(os.listdir(copy)) == sorted(os.listdir(data))
    for name in os.listdir(data):
        with open(os.path.join(data, name), "rb") as file, open(f"{copy}/{name}", "rb") as copied:
            assert file.read() == copied.read()
    monkeypatch.setattr(object_store, "_files", lambda path: pytest.fail("copied again"))
    assert local_copy(store, cache) == copy


def test_a_failed_copy_leaves_no_files(store, tmp_path, monkeypatch):
    def fail(path, file, to):
        raise OSError("connection lost")

    monkeypatch.setattr(object_store, "_download", fail)
    with pytest.raises(OSError, match="connection lost"):
        local_copy(store, str(tmp_path))
    assert os.listdir(tmp_path) == []


def test_without_disk_space_nothing_is_copied(store, tmp_path, monkeypatch):
    monkeypatch.setattr(
        object_store.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 7})
    )
    with pytest.raises(InputError, match=r"--data_cache=.* only 7 are free"):
        local_copy(store, str(tmp_path))
    assert os.listdir(tmp_path) == []


def test_missing_data_and_runs_are_reported(store, tmp_path):
    config = configuration(f"{store}/nothing", tmp_path / "run")
    with pytest.raises(InputError, match=r"gs://shop/nothing/dataset.json: not found"):
        workdir.open_dataset(config, str(tmp_path))
    command = [sys.executable, "-m", "vixml_jax.evaluate", f"--workdir={store}/nothing"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "gs://shop/nothing/config.json: not found" in done.stderr


def test_without_gcsfs_the_message_says_how_to_install_it(monkeypatch):
    def fail(self):
        raise ImportError("No module named 'gcsfs'")

    monkeypatch.setattr(type(epath.Path("gs://shop")), "exists", fail)
    with pytest.raises(InputError, match=r"--workdir=gs://shop: .*vixml_jax\[gcs\]"):
        object_store.check("gs://shop", "workdir")


def test_scann_beside_a_remote_run_is_refused(store):
    command = [sys.executable, "-m", "vixml_jax.evaluate", f"--workdir={store}/run"]
    done = subprocess.run([*command, "--search=scann"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "copy the run to this machine" in done.stderr


def test_a_mirror_copies_changed_files(store):
    mirror = object_store.Mirror(f"{store}/mirror", ["curve"])
    path = os.path.join(mirror.local, "curve")
    with open(path, "a") as file:
        file.write("one\n")
    mirror.close()
    assert not os.path.exists(path)
    reopened = object_store.Mirror(f"{store}/mirror", ["curve"])
    with open(os.path.join(reopened.local, "curve"), "a") as file:
        file.write("two\n")
    reopened._copied_at -= object_store._EVERY_S
    reopened.copy()
    reopened._pending.result()
    assert epath.Path(f"{store}/mirror/curve").read_text() == "one\ntwo\n"
    reopened.close()


def test_a_mirror_does_not_overwrite_with_unchanged_files(store):
    """One of several processes writes; the local files of the others are older."""
    file = epath.Path(f"{store}/older/curve")
    file.write_text("one\n")
    idle = object_store.Mirror(f"{store}/older", ["curve"])
    file.write_text("one\ntwo\n")
    idle.close()
    assert file.read_text() == "one\ntwo\n"


def test_a_local_directory_is_its_own_mirror(tmp_path):
    mirror = object_store.Mirror(str(tmp_path), ["curve"])
    assert mirror.local == str(tmp_path)
    mirror.copy()
    mirror.close()
    assert os.listdir(tmp_path) == []
