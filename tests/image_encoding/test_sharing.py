"""`prepare` with several processes: the store and the data set of one, also after a kill."""

import collections
import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from absl import flags
from PIL import Image

from tests import tiny
from vixml_jax import prepare
from vixml_jax.data.images import image_files
from vixml_jax.data.images.embedding_store import EmbeddingStore, Parts
from vixml_jax.errors import InputError
from vixml_jax.image_encoding import pipeline
from vixml_jax.storage import locks

BATCH = 8  # The number of devices.
CHUNK = pipeline.CHUNK_BATCHES * BATCH
COUNT = 5 * CHUNK // 2  # Two chunks and a half.
BROKEN, MISSING = COUNT // 2, COUNT - 2


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Arguments of `prepare`: a table of images, some of which are equal, one broken, one gone."""
    root, rng = tmp_path_factory.mktemp("shop"), np.random.default_rng()
    with open(root / "shop.jsonl", "w") as file:
        for i in range(COUNT):
            path = root / f"{i}.png"
            pixels = rng.integers(0, 256, (5, 9, 3), np.uint8)
            if i in (7, COUNT // 2 + 3, COUNT - 1):  # In each chunk.
                pixels = np.zeros((5, 9, 3), np.uint8)
            if i != MISSING:
                Image.fromarray(pixels).save(path)
            if i == BROKEN:
                path.write_bytes(path.read_bytes()[:40])
            row = {"text": f"shoe {i % 7}", "labels": ["x"], "image": f"{i}.png"}
            file.write(json.dumps(row | {"split": "test" if i % 5 == 0 else "train"}) + "\n")
    model = tiny.make_siglip(tmp_path_factory.mktemp("siglip"), 16, 8, width=12)
    return [f"--source={root / 'shop.jsonl'}", "--out=out", f"--images={model}",
            f"--image_batch={BATCH}"]  # fmt: skip


def run(directory, source, index=0, count=1, **changes):
    """Runs `prepare` in a directory, as process `index` of `count`."""
    values = flags.FlagValues()
    prepare.define_flags(values)
    more = [f"--{name}={value}" for name, value in changes.items()]
    if count > 1:
        more += [f"--num_processes={count}", f"--process_index={index}"]
    values(["prepare", *source, *more])
    before = os.getcwd()
    directory.mkdir(exist_ok=True)
    os.chdir(directory)
    try:
        prepare.run(values)
    finally:
        os.chdir(before)


def contents(directory):
    """The bytes of all files."""
    root = pathlib.Path(directory)
    paths = [path for path in root.rglob("*") if path.is_file()]
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def expected(source, tmp_path_factory):
    """What one process writes."""
    directory = tmp_path_factory.mktemp("one")
    run(directory, source)
    return contents(directory)


@pytest.fixture
def decoded(monkeypatch):
    """Counts how often each file is decoded."""
    counts, load = collections.Counter(), image_files.load_pixels

    def counted(path, *args, **kwargs):
        counts[os.path.basename(path)] += 1
        return load(path, *args, **kwargs)

    monkeypatch.setattr(image_files, "load_pixels", counted)
    return counts


def test_one_process(expected):
    names = {name for name in expected if name.startswith("out.images")}
    assert names == {f"out.images/{x}" for x in
                     ("about.json", "broken.txt", "digests.txt", "vectors.f16")}  # fmt: skip
    broken = expected["out.images/broken.txt"].decode().splitlines()
    files = sorted(line.split("\t")[0].rsplit("/", 1)[1] for line in broken)
    assert files == sorted([f"{BROKEN}.png", f"{MISSING}.png"])
    assert len(expected["out.images/digests.txt"].split()) == COUNT - 4


def test_a_process_that_was_stopped_embeds_nothing_twice(
    source, expected, decoded, tmp_path, capsys, monkeypatch
):
    add, added = EmbeddingStore.add, []

    def stop(self, digests, vectors):
        add(self, digests, vectors)
        added.append(digests)
        if len(added) == 5:
            raise KeyboardInterrupt

    run(tmp_path, source, 1, 2)
    assert "missing: the part of process 0; the process that is the last" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(EmbeddingStore, "add", stop)
        run(tmp_path, source, 0, 2)
    stored = len((tmp_path / "out.images/part-00000-of-00002/digests.txt").read_text().split())
    assert 5 * BATCH - 2 <= stored <= 5 * BATCH
    before = sum(decoded.values())
    run(tmp_path, source, 0, 2)
    assert contents(tmp_path) == expected
    # All in the part of process 0 that were not stored, of which one more may be broken.
    own = [i for i in range(COUNT) if i // CHUNK != 1]
    assert len(own) - stored - 3 <= sum(decoded.values()) - before <= len(own) - stored + 1
    run(tmp_path, source, 1, 2)  # Once more: the data set is kept.
    assert "kept as it is" in capsys.readouterr().out
    assert contents(tmp_path) == expected


def test_processes_of_another_number_use_what_was_embedded(
    source, expected, decoded, tmp_path, monkeypatch
):
    add, added = EmbeddingStore.add, []

    def stop(self, digests, vectors):
        add(self, digests, vectors)
        added.extend(digests)
        if len(added) > COUNT // 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(EmbeddingStore, "add", stop)
        run(tmp_path, source)
    decoded.clear()
    for index in (2, 0, 1):
        run(tmp_path, source, index, 3)
    # All that were not stored, of which one is broken.
    assert sum(decoded.values()) <= COUNT - 1 - len(added)
    assert contents(tmp_path) == expected


@pytest.mark.parametrize("order", [(0, 1), (1, 0, 1)])
def test_failed_downloads_are_listed_as_by_one_process(order, source, tmp_path):
    # Every other image is a URL of this machine, which is refused without a request.
    names = [f"http://127.0.0.1/{i}.png" if i % 2 else f"{i}.png" for i in range(3 * CHUNK // 2)]
    rows = [{"text": "a", "labels": ["x"], "image": name} for name in names]
    Image.new("RGB", (9, 9)).save(tmp_path / "0.png")
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [f"--source={tmp_path / 'q.jsonl'}", *source[1:]]
    run(tmp_path / "one", arguments)
    expected = contents(tmp_path / "one")
    lines = expected["out.images/files/failures.tsv"].decode().splitlines()
    assert len(lines) == len(rows) // 2
    for index in order:
        run(tmp_path / "two", arguments, index, 2)
    assert contents(tmp_path / "two") == expected


def test_images_of_which_none_can_be_embedded_may_be_repaired(source, tmp_path, capsys):
    for i in range(2):
        (tmp_path / f"{i}.png").write_text("broken")
    rows = [{"text": "a", "labels": ["x"], "image": f"{i}.png"} for i in range(2)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [f"--source={tmp_path / 'q.jsonl'}", *source[1:]]
    run(tmp_path, arguments, 0, 2)
    with pytest.raises(InputError, match=r"none of the 2 images that q names could be embedded"):
        run(tmp_path, arguments, 1, 2)
    for i in range(2):
        Image.new("RGB", (9, 9), (i, 0, 0)).save(tmp_path / f"{i}.png")
    run(tmp_path, arguments, 1, 2)
    assert "missing: the part of process 0" in capsys.readouterr().out
    run(tmp_path, arguments, 0, 2)
    assert len((tmp_path / "out.images/digests.txt").read_text().split()) == 2


def test_a_part_of_other_images_is_not_merged(source, tmp_path, capsys):
    run(tmp_path, source, 1, 2, test=0.5)
    run(tmp_path, source, 1, 2)
    capsys.readouterr()
    run(tmp_path, [*source, "--split_column=none"], 0, 2)  # Another order of the images.
    assert "missing: the part of process 1;" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_only_one_process_finishes(source, expected, tmp_path, capsys, monkeypatch):
    run(tmp_path, source, 0, 2)
    finishing, complete = contextlib.ExitStack(), Parts.complete

    def others_finish(self, outcomes):
        complete(self, outcomes)
        finishing.enter_context(
            locks.exclusive(str(tmp_path), doing="preparing --out=out", name=".out.lock")
        )

    with finishing:
        with monkeypatch.context() as patch:
            patch.setattr(Parts, "complete", others_finish)
            run(tmp_path, source, 1, 2)
        assert "in use by process" in capsys.readouterr().out
        with pytest.raises(InputError, match="in use by process"):  # Its part is being merged.
            run(tmp_path, source, 1, 2)
    with (
        locks.exclusive(str(tmp_path), doing="part", name=".out-00001-of-00002.lock"),
        pytest.raises(InputError, match="in use by process"),
    ):
        run(tmp_path, source, 1, 2)
    run(tmp_path, source, 1, 2)
    assert contents(tmp_path) == expected


def test_processes_without_images_are_refused(source, tmp_path):
    with pytest.raises(InputError, match=r"--num_processes=2: expected --images=MODEL with it"):
        run(tmp_path, source, 0, 2, images="")
    with pytest.raises(InputError, match=r"--process_index=2: expected 0 to 1, because of --num_"):
        run(tmp_path, source, 2, 2)


@pytest.mark.slow
def test_real_processes_of_which_one_is_killed(source, expected, tmp_path):
    def start(index):
        command = [sys.executable, "-m", "vixml_jax.prepare", *source, "--num_processes=2",
                   f"--process_index={index}"]  # fmt: skip
        root = str(pathlib.Path(__file__).parents[2])
        return subprocess.Popen(
            command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": root}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    first, other = start(0), start(1)
    stored = tmp_path / "out.images/part-00000-of-00002/digests.txt"
    while first.poll() is None and not (stored.exists() and stored.stat().st_size):
        time.sleep(0.002)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    out, _ = other.communicate()
    assert other.returncode == 0, out
    is_killed = first.returncode == -signal.SIGKILL  # Else it was faster than this test.
    assert (tmp_path / "out").exists() != is_killed
    again = start(0)
    out, _ = again.communicate()
    assert again.returncode == 0, out
    assert contents(tmp_path) == expected
