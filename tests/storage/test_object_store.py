"""Runs and data in a store of objects: one that answers as Google's does, on this machine."""

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
    """A bucket; the prepared data are in it."""
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


def test_a_run_there_is_the_run_here(data, store, tmp_path):
    """Trained, its newest checkpoints taken away as if it had been killed, resumed, evaluated."""
    here = configuration(data, tmp_path / "run")
    train.train(here)
    there = dataclasses.replace(here, data=f"{store}/prepared", workdir=f"{store}/run")
    cache = str(tmp_path / "cache")
    train.train(there, data_cache=cache)
    assert_same_state(final_state(here), final_state(there))
    checkpoints = epath.Path(there.workdir) / workdir.CHECKPOINTS
    last = digests.steps(os.fspath(checkpoints))[-1]
    (checkpoints / str(last)).rmtree()
    assert digests.steps(os.fspath(checkpoints))
    (tmp_path / "cache" / os.listdir(cache)[0]).exists()
    train.train(there, data_cache=cache)
    assert_same_state(final_state(here), final_state(there))
    assert curve(f"{there.workdir}/{METRICS}") == curve(f"{here.workdir}/{METRICS}")
    told = [
        json.loads((epath.Path(config.workdir) / "evaluation/test-exact.json").read_text())
        for config in (here, there)
    ]
    assert told[0]["P@1"] == told[1]["P@1"] and told[0]["R@10"] == told[1]["R@10"]
    assert list((epath.Path(there.workdir) / "tensorboard").iterdir())


def test_data_are_copied_once_and_whole(data, store, tmp_path, monkeypatch):
    cache = str(tmp_path)
    copied = object_store.copied(f"{store}/prepared", "some-data", cache)
    assert copied == os.path.join(cache, "some-data")
    assert sorted(os.listdir(copied)) == sorted(os.listdir(data))
    for name in os.listdir(data):
        with open(os.path.join(data, name), "rb") as one, open(f"{copied}/{name}", "rb") as other:
            assert one.read() == other.read()
    monkeypatch.setattr(object_store, "_files", lambda path: pytest.fail("it was asked for again"))
    assert object_store.copied(f"{store}/prepared", "some-data", cache) == copied


def test_a_copy_that_fails_leaves_nothing(store, tmp_path, monkeypatch):
    def fail(path, file, to):
        raise OSError("the line is dead")

    monkeypatch.setattr(object_store, "_download", fail)
    with pytest.raises(OSError, match="line is dead"):
        object_store.copied(f"{store}/prepared", "some-data", str(tmp_path))
    assert os.listdir(tmp_path) == ["some-data.lock"]


def test_without_room_nothing_is_copied(store, tmp_path, monkeypatch):
    monkeypatch.setattr(
        object_store.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 7})
    )
    with pytest.raises(InputError, match=r"--data_cache=.* 7 are free"):
        object_store.copied(f"{store}/prepared", "some-data", str(tmp_path))
    assert os.listdir(tmp_path) == ["some-data.lock"]


def test_what_is_not_there_is_said(store, tmp_path):
    config = configuration(f"{store}/nothing", tmp_path / "run")
    with pytest.raises(InputError, match=r"gs://shop/nothing/dataset.json: not found"):
        workdir.open_dataset(config, str(tmp_path))
    command = [sys.executable, "-m", "vixml_jax.evaluate", f"--workdir={store}/nothing"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "gs://shop/nothing/config.json: not found" in done.stderr


def test_without_gcsfs_it_says_how_to_get_it(monkeypatch):
    def fail(self):
        raise ImportError("No module named 'gcsfs'")

    monkeypatch.setattr(type(epath.Path("gs://shop")), "exists", fail)
    with pytest.raises(InputError, match=r"--workdir=gs://shop: .*vixml_jax\[gcs\]"):
        object_store.check("gs://shop", "workdir")


def test_scann_beside_a_remote_run_is_refused(store):
    command = [sys.executable, "-m", "vixml_jax.evaluate", f"--workdir={store}/run"]
    done = subprocess.run([*command, "--search=scann"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "copy the run to this machine" in done.stderr


def test_a_mirror_copies_what_changed(store):
    mirror = object_store.Mirror(f"{store}/mirror", ["curve"])
    path = os.path.join(mirror.here, "curve")
    with open(path, "a") as file:
        file.write("one\n")
    mirror.close()
    assert not os.path.exists(path)
    again = object_store.Mirror(f"{store}/mirror", ["curve"])
    with open(os.path.join(again.here, "curve"), "a") as file:
        file.write("two\n")
    again._copied_at -= object_store._EVERY_S
    again.copy()
    again._under_way.result()
    assert epath.Path(f"{store}/mirror/curve").read_text() == "one\ntwo\n"
    again.close()


def test_a_mirror_leaves_what_it_did_not_change(store):
    """Of several processes one writes; the others have older copies."""
    file = epath.Path(f"{store}/older/curve")
    file.write_text("one\n")
    idle = object_store.Mirror(f"{store}/older", ["curve"])
    file.write_text("one\ntwo\n")
    idle.close()
    assert file.read_text() == "one\ntwo\n"


def test_a_local_directory_is_its_own_mirror(tmp_path):
    mirror = object_store.Mirror(str(tmp_path), ["curve"])
    assert mirror.here == str(tmp_path)
    mirror.copy()
    mirror.close()
    assert os.listdir(tmp_path) == []
