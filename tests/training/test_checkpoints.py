"""Tests of checkpoints: damaged files, other numbers of devices, interruptions and disk space."""

import errno
import os
import shutil
import time

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests import tiny
from vixml_jax import errors, frozen_weights, workdir
from vixml_jax.errors import InputError
from vixml_jax.parallel import sharding
from vixml_jax.storage import digests
from vixml_jax.structs import LabelState, TrainState
from vixml_jax.training import checkpoints as checkpoints_lib
from vixml_jax.training.checkpoints import Checkpoints

QUERIES, LABELS, FREE, WIDTH = 13, 17, 5, 6


def make_state(num_devices, step=0, seed=0):
    """A state on some devices, with zeros in the padding rows."""
    mesh = sharding.create_mesh(devices=jax.devices()[:num_devices])
    rng = np.random.default_rng(seed)
    rows = sharding.rows_sharding(mesh)

    def sharded(num_rows, *shape, dtype=np.float32):
        x = np.zeros((sharding.pad_rows(num_rows, mesh), *shape), dtype)
        x[:num_rows] = rng.integers(1, 1000, (num_rows, *shape)).astype(dtype)
        return jax.device_put(x, rows)

    def replicated(*shape):
        x = rng.normal(size=shape).astype(np.float32)
        return jax.device_put(x, NamedSharding(mesh, P()))

    return TrainState(
        step=jax.device_put(np.int32(step), NamedSharding(mesh, P())),
        params={"free": sharded(FREE, WIDTH), "tower": {"kernel": replicated(4, 5)}},
        frozen={},
        opt_state=(
            {"mu": sharded(FREE, WIDTH), "nu": sharded(FREE, WIDTH)},
            {"count": replicated()},
        ),
        labels=LabelState(sharded(LABELS, WIDTH), sharded(LABELS, dtype=np.int32)),
        bank=sharded(QUERIES, WIDTH),
    )


def position(step, **changes):
    return {"epoch": step, "best": None, "best_step": None, "waited": 0} | changes


def open_checkpoints(root, **settings):
    settings = {"max_to_keep": 3, "every": 1} | settings
    return Checkpoints(str(root / workdir.CHECKPOINTS), **settings)


def write(root, steps, num_devices=1, **settings):
    """Saves a different checkpoint under each of these steps."""
    checkpoints = open_checkpoints(root, **settings)
    for step in steps:
        clusters = np.arange(QUERIES, dtype=np.int32) + step
        checkpoints.save(make_state(num_devices, step, seed=step), clusters, position(step))
    checkpoints.close()


def assert_newest_is(root, step, num_devices=1):
    """Asserts that the newest checkpoint is the one that `write` saved under the step."""
    checkpoints = open_checkpoints(root)
    assert checkpoints.latest_step() == step
    like = make_state(num_devices)
    state, clusters, restored_position = checkpoints.restore(like, np.zeros(QUERIES, np.int32))
    checkpoints.close()
    expected = make_state(num_devices, step, seed=step)
    for leaf, expected_leaf in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(leaf, expected_leaf)
        assert leaf.sharding.is_equivalent_to(expected_leaf.sharding, leaf.ndim)
    np.testing.assert_array_equal(clusters, np.arange(QUERIES) + step)
    assert restored_position == position(step)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("written")
    write(root, [4, 6])
    return root


def files_of(root, step):
    top = os.path.join(root, workdir.CHECKPOINTS, str(step))
    return sorted(
        os.path.relpath(os.path.join(folder, name), top)
        for folder, _, names in os.walk(top)
        for name in names
    )


def damage_file(path, how, rng):
    content = open(path, "rb").read()
    if how == "deleted":
        os.remove(path)
        return
    if how == "truncated":
        damaged = content[: len(content) // 2]
    elif how == "empty":
        damaged = b""
    elif how == "zeros":
        damaged = b"\0" * len(content)
    else:
        at = int(rng.integers(len(content)))
        flipped = bytes([content[at] ^ (1 << int(rng.integers(8)))])
        damaged = content[:at] + flipped + content[at + 1 :]
    with open(path, "wb") as file:
        file.write(damaged)


@pytest.mark.parametrize("how", ["deleted", "truncated", "empty", "zeros", "one bit"])
def test_damaged_checkpoint_is_reported_and_the_previous_one_restored(
    written, tmp_path, capsys, how
):
    rng = np.random.default_rng(hash(how) % 2**32)
    num_detected, num_undetected = 0, 0
    for number, name in enumerate(files_of(written, 6)):
        root = tmp_path / str(number)
        shutil.copytree(written, root)
        damage_file(root / workdir.CHECKPOINTS / "6" / name, how, rng)
        capsys.readouterr()
        checkpoints = open_checkpoints(root)
        step = checkpoints.latest_step()
        checkpoints.close()
        output = capsys.readouterr().out
        moved = root / "checkpoints.damaged" / "6"
        if step == 6:  # The damaged bytes are not needed.
            assert not output and not moved.exists(), name
            num_undetected += 1
        else:
            assert output.count("\n") == 1 and "the checkpoint of step 6 is damaged" in output
            file_name = os.path.basename(name)
            assert file_name in output and str(moved) in output, (name, output)
            assert "from step 4" in output and moved.is_dir(), (name, output)
            num_detected += 1
        assert_newest_is(root, step)
    # Only Orbax's own notes, which are never read, and spaces between digests may change.
    assert num_detected >= 10 and num_undetected <= 3, (num_detected, num_undetected)


def test_repeatedly_damaged_step_is_moved_under_new_names(tmp_path, capsys):
    write(tmp_path, [4, 6])
    for _ in range(2):
        os.remove(tmp_path / workdir.CHECKPOINTS / "6" / "position" / "metadata")
        assert_newest_is(tmp_path, 4)
        write(tmp_path, [6])
        assert_newest_is(tmp_path, 6)
    assert sorted(os.listdir(tmp_path / "checkpoints.damaged")) == ["6", "6.2"]
    assert "position/metadata is missing" in capsys.readouterr().out


def test_all_damaged_checkpoints_are_an_error_and_are_not_moved(tmp_path):
    write(tmp_path, [2, 4, 6])
    for step in (6, 4):
        (tmp_path / workdir.CHECKPOINTS / str(step) / "model" / "_METADATA").write_text("")
    assert_newest_is(tmp_path, 2)
    (tmp_path / workdir.CHECKPOINTS / "2" / digests.NAME).write_text('{"a":' * 99999)
    assert "unreadable content" in digests.damage(str(tmp_path / workdir.CHECKPOINTS / "2"))
    (tmp_path / workdir.CHECKPOINTS / "2" / digests.NAME).write_text("{}")
    with pytest.raises(InputError, match=r"all checkpoints are damaged \(step 2: digests.json has"):
        open_checkpoints(tmp_path)
    assert os.listdir(tmp_path / workdir.CHECKPOINTS) == ["2"]


def test_evaluation_skips_a_damaged_checkpoint_without_moving_it(tmp_path, capsys):
    write(tmp_path, [4, 6])
    damage_file(
        tmp_path / workdir.CHECKPOINTS / "6" / "model" / "manifest.ocdbt", "truncated", None
    )
    assert tiny.saved(tmp_path).path == str(tmp_path / workdir.CHECKPOINTS / "4")
    assert "step 6 is damaged (model/manifest.ocdbt has" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path / workdir.CHECKPOINTS)) == ["4", "6"]
    damage_file(tmp_path / workdir.CHECKPOINTS / "4" / "model" / "manifest.ocdbt", "deleted", None)
    with pytest.raises(InputError, match=r"step 4 is damaged .*manifest.ocdbt is missing"):
        tiny.saved(tmp_path)


def test_damaged_best_model_is_reported_and_selected_again(tmp_path, capsys):
    best = str(tmp_path / workdir.BEST)
    checkpoints = open_checkpoints(tmp_path, best=best)
    state = make_state(1, 4, seed=4)
    checkpoints.save_best(state, state.labels)
    with_best = position(4, best=3.0, best_step=4, waited=1)
    checkpoints.save(state, np.zeros(QUERIES, np.int32), with_best)
    checkpoints.close()
    reopened = open_checkpoints(tmp_path, best=best)
    assert reopened.restore(make_state(1), np.zeros(QUERIES, np.int32))[2] == with_best
    reopened.close()
    assert tiny.saved(tmp_path).path == os.path.join(best, "4")
    damage_file(tmp_path / workdir.BEST / "4" / "model" / "_METADATA", "empty", None)
    with pytest.raises(InputError, match=r"best: step 4, .* is damaged \(model/_METADATA has 0"):
        tiny.saved(tmp_path)
    reopened = open_checkpoints(tmp_path, best=best)
    capsys.readouterr()
    assert reopened.restore(make_state(1), np.zeros(QUERIES, np.int32))[2] == position(4)
    assert "the best model (step 4) is damaged (model/_METADATA" in capsys.readouterr().out
    reopened.drop_best_but(None)
    reopened.save_best(state, state.labels)
    reopened.close()
    assert digests.damage(str(tmp_path / workdir.BEST / "4")) is None
    assert os.listdir(tmp_path / "best.damaged") == ["4"]


@pytest.mark.parametrize("before,after", [(8, 1), (8, 2), (8, 3), (8, 4), (1, 8), (3, 2), (2, 3)])
def test_checkpoint_is_restored_on_another_number_of_devices(tmp_path, before, after):
    """Padding differs: 13 queries are 16 rows on 8 devices, 15 on 3, 13 on one."""
    write(tmp_path, [2], num_devices=before)
    assert_newest_is(tmp_path, 2, num_devices=after)


def test_half_written_checkpoints_are_deleted(tmp_path):
    write(tmp_path, [2])
    for name in ("4.orbax-checkpoint-tmp", "4.orbax-checkpoint-tmp-17"):
        shutil.copytree(
            tmp_path / workdir.CHECKPOINTS / "2" / "model", tmp_path / workdir.CHECKPOINTS / name
        )
    checkpoints = open_checkpoints(tmp_path)
    assert checkpoints.latest_step() == 2
    checkpoints.save(make_state(1, 4, seed=4), np.arange(QUERIES, dtype=np.int32) + 4, position(4))
    checkpoints.close()
    assert sorted(os.listdir(tmp_path / workdir.CHECKPOINTS)) == ["2", "4"]
    assert_newest_is(tmp_path, 4)


@pytest.mark.parametrize("killed", ["", "set aside", "while written", "written"])
def test_checkpoint_of_the_same_step_is_replaced(tmp_path, monkeypatch, killed):
    """One of the two checkpoints is complete wherever the process is killed."""
    root = tmp_path / "run"
    checkpoints = open_checkpoints(root, max_to_keep=1)
    clusters = np.arange(QUERIES, dtype=np.int32)
    checkpoints.save(make_state(1, 6, seed=6), clusters, position(6))
    checkpoints.wait()

    class Killed(Exception):
        pass

    def kill(*_, **__):
        raise Killed

    save = checkpoints._manager.save
    target = {
        "set aside": (checkpoints._manager, "save", kill),
        "while written": (checkpoints._manager, "save", lambda *a, **k: (save(*a, **k), kill())),
        "written": (checkpoints_lib, "_finish_replacement", kill),
    }.get(killed)
    with monkeypatch.context() as patched:
        if target:
            patched.setattr(*target)
            with pytest.raises(Killed):
                checkpoints.save(make_state(1, 6, seed=7), clusters + 1, position(6, epoch=7))
        else:
            checkpoints.save(make_state(1, 6, seed=7), clusters + 1, position(6, epoch=7))
    if killed in ("set aside", "while written"):
        # The write in the background is finished first, so that the test has one outcome.
        checkpoints._manager.wait_until_finished()
    reopened = open_checkpoints(root, max_to_keep=1)
    assert reopened.latest_step() == 6 and sorted(os.listdir(root)) == ["checkpoints"]
    epoch = reopened.restore(make_state(1), clusters)[2]["epoch"]
    assert epoch == (6 if killed == "set aside" else 7)
    reopened.close()
    checkpoints._manager.close()


def test_due_by_steps_and_minutes_but_not_during_a_write(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    checkpoints = open_checkpoints(tmp_path, every=10, minutes=2.0)

    def save(step):
        checkpoints.save(make_state(1, step), np.zeros(QUERIES, np.int32), position(step))
        checkpoints.wait()

    assert [step for step in range(1, 25) if checkpoints.due(step) and not save(step)] == [10, 20]
    now[0] += 119.0
    assert not checkpoints.due(21)
    now[0] += 2.0
    assert checkpoints.due(22)
    checkpoints.save(make_state(1, 22), np.zeros(QUERIES, np.int32), position(22))
    monkeypatch.setattr(checkpoints._manager, "is_saving_in_progress", lambda: True)
    assert [step for step in range(23, 33) if checkpoints.due(step)] == []
    monkeypatch.undo()
    checkpoints.wait()
    assert checkpoints.due(33)  # Due since step 30.
    checkpoints.close()


def test_disk_space_is_checked(tmp_path, monkeypatch):
    checkpoints = open_checkpoints(tmp_path, max_to_keep=1)
    state = make_state(1)
    size = sum(np.asarray(x).nbytes for x in jax.tree.leaves(state))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2 * size))
    line = checkpoints.check_disk_space(state)
    assert "checkpoints: up to 0.00 MiB each, at most 2 on disk; 0.00 MiB free" in line
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2 * size - 1))
    message = rf"{2 * size:,} bytes needed, 0 used by this run so far and {2 * size - 1:,} free"
    with pytest.raises(InputError, match=message):
        checkpoints.check_disk_space(state)
    checkpoints.save(make_state(1, 1), np.zeros(QUERIES, np.int32), position(1))
    checkpoints.wait()
    checkpoints.check_disk_space(state)  # What the run uses already counts as available.
    checkpoints.close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_disk_faults_are_recognised_by_error_number(number):
    text = f"RESOURCE_EXHAUSTED: Failed to write 9 bytes [os_error_code='{number}']"
    assert errors.disk_fault(ValueError(text)) == os.strerror(number)
    assert errors.disk_fault(OSError(number, "no")) == os.strerror(number)
    assert errors.disk_fault(ValueError("x [os_error_code='2']")) is None
    assert errors.disk_fault(OSError(errno.ENOENT, "no")) is None


def test_later_steps_do_not_change_a_checkpoint_being_written(tmp_path):
    """Steps reuse the memory of the donated state while it is still being written."""
    checkpoints = open_checkpoints(tmp_path)
    step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    for number in range(1, 9):
        expected = np.random.default_rng().normal(size=2**23).astype(np.float32)
        state = make_state(1, number)._replace(params={"large": jax.numpy.array(expected)})
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        checkpoints.save(state, np.zeros(QUERIES, np.int32), position(number))
        for _ in range(3):
            state = step(state)
        jax.block_until_ready(state)
        was_writing = not checkpoints.due(number)
        checkpoints.wait()
        restored, _, _ = checkpoints.restore(like, np.zeros(QUERIES, np.int32))
        np.testing.assert_array_equal(restored.params["large"], expected)
        assert int(restored.step) == number
        if was_writing:  # Otherwise the write ended before the steps did, which tests nothing.
            break
    assert was_writing
    checkpoints.close()


def test_damaged_frozen_parameters_are_written_again(tmp_path):
    frozen = {"tower": {"kernel": jax.numpy.arange(12.0).reshape(3, 4)}}
    directory = tmp_path / frozen_weights.DIRECTORY / "0"
    frozen_weights.save(str(tmp_path), frozen)
    assert digests.damage(str(directory)) is None
    before = (directory / digests.NAME).stat().st_mtime_ns
    frozen_weights.save(str(tmp_path), frozen)
    assert (directory / digests.NAME).stat().st_mtime_ns == before  # Written once.
    damage_file(directory / "manifest.ocdbt", "truncated", None)
    assert "manifest.ocdbt" in digests.damage(str(directory))
    frozen_weights.save(str(tmp_path), frozen)
    restored = digests.read(str(tmp_path / frozen_weights.DIRECTORY), **{"0": frozen})["0"]
    assert digests.damage(str(directory)) is None
    np.testing.assert_array_equal(restored["tower"]["kernel"], frozen["tower"]["kernel"])
