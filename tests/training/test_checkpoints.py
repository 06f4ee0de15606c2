"""Checkpoints on disk: damaged in every way, restored on other devices, a disk that is full."""

import errno
import os
import shutil
import time

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vixml_jax import errors, workdir
from vixml_jax.errors import InputError
from vixml_jax.parallel import sharding
from vixml_jax.storage import digests
from vixml_jax.structs import LabelState, TrainState
from vixml_jax.training import checkpoints as checkpoints_lib
from vixml_jax.training.checkpoints import Checkpoints

QUERIES, LABELS, FREE, WIDTH = 13, 17, 5, 6


def make_state(num_devices, step=0, seed=0):
    """A state over some devices; rows that stand for nothing are zero, and how many are real."""
    mesh = sharding.create_mesh(devices=jax.devices()[:num_devices])
    rng = np.random.default_rng(seed)
    rows = sharding.rows_sharding(mesh)

    def spread(num_rows, *shape, dtype=np.float32):
        x = np.zeros((sharding.pad_rows(num_rows, mesh), *shape), dtype)
        x[:num_rows] = rng.integers(1, 1000, (num_rows, *shape)).astype(dtype)
        return jax.device_put(x, rows)

    def whole(*shape):
        x = rng.normal(size=shape).astype(np.float32)
        return jax.device_put(x, NamedSharding(mesh, P()))

    return TrainState(
        step=jax.device_put(np.int32(step), NamedSharding(mesh, P())),
        params={"free": spread(FREE, WIDTH), "tower": {"kernel": whole(4, 5)}},
        frozen={},
        opt_state=({"mu": spread(FREE, WIDTH), "nu": spread(FREE, WIDTH)}, {"count": whole()}),
        labels=LabelState(spread(LABELS, WIDTH), spread(LABELS, dtype=np.int32)),
        bank=spread(QUERIES, WIDTH),
    )


def position(step, **more):
    return {"epoch": step, "best": None, "best_step": None, "waited": 0} | more


def open_checkpoints(root, **settings):
    settings = {"keep": 3, "every": 1} | settings
    return Checkpoints(str(root / workdir.CHECKPOINTS), **settings)


def write(root, steps, num_devices=1, **settings):
    """Checkpoints of these steps, all different; the last one of each directory is returned."""
    kept = open_checkpoints(root, **settings)
    for step in steps:
        clusters = np.arange(QUERIES, dtype=np.int32) + step
        kept.save(make_state(num_devices, step, seed=step), clusters, position(step))
    kept.close()


def assert_is(root, step, num_devices=1):
    """Restores what is there and holds it against what was saved under the step."""
    kept = open_checkpoints(root)
    assert kept.latest_step() == step
    like = make_state(num_devices)
    found, clusters, there = kept.restore(like, np.zeros(QUERIES, np.int32))
    kept.close()
    expected = make_state(num_devices, step, seed=step)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.sharding.is_equivalent_to(other.sharding, one.ndim)
    np.testing.assert_array_equal(clusters, np.arange(QUERIES) + step)
    assert there == position(step)


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


def spoil(path, how, rng):
    was = open(path, "rb").read()
    if how == "deleted":
        os.remove(path)
        return
    if how == "cut":
        now = was[: len(was) // 2]
    elif how == "empty":
        now = b""
    elif how == "zeros":
        now = b"\0" * len(was)
    else:
        at = int(rng.integers(len(was)))
        now = was[:at] + bytes([was[at] ^ (1 << int(rng.integers(8)))]) + was[at + 1 :]
    with open(path, "wb") as file:
        file.write(now)


@pytest.mark.parametrize("how", ["deleted", "cut", "empty", "zeros", "one bit"])
def test_damage_of_any_file_is_told_and_the_one_before_is_taken(written, tmp_path, capsys, how):
    rng = np.random.default_rng(hash(how) % 2**32)
    told = {True: 0, False: 0}
    for number, name in enumerate(files_of(written, 6)):
        root = tmp_path / str(number)
        shutil.copytree(written, root)
        spoil(root / workdir.CHECKPOINTS / "6" / name, how, rng)
        capsys.readouterr()
        kept = open_checkpoints(root)
        step = kept.latest_step()
        kept.close()
        said = capsys.readouterr().out
        aside = root / "checkpoints.damaged" / "6"
        if step == 6:  # What was spoilt is not needed.
            assert not said and not aside.exists(), name
        else:
            assert said.count("\n") == 1 and "the checkpoint of step 6 is damaged" in said
            named = os.path.basename(name)
            assert named in said and str(aside) in said and "from step 4" in said, (name, said)
            assert aside.is_dir()
        assert_is(root, step)
        told[step == 4] += 1
    # Orbax's own notes, read by nobody, and spaces between digests are all that may be other.
    assert told[True] >= 10 and told[False] <= 3, told


def test_after_damage_it_goes_on_and_damage_of_the_same_step_is_kept_beside(tmp_path, capsys):
    write(tmp_path, [4, 6])
    for _ in range(2):
        os.remove(tmp_path / workdir.CHECKPOINTS / "6" / "position" / "metadata")
        assert_is(tmp_path, 4)
        write(tmp_path, [6])
        assert_is(tmp_path, 6)
    assert sorted(os.listdir(tmp_path / "checkpoints.damaged")) == ["6", "6.2"]
    assert "position/metadata is missing" in capsys.readouterr().out


def test_several_damaged_ones_are_passed_and_if_all_are_nothing_is_moved(tmp_path):
    write(tmp_path, [2, 4, 6])
    for step in (6, 4):
        (tmp_path / workdir.CHECKPOINTS / str(step) / "model" / "_METADATA").write_text("")
    assert_is(tmp_path, 2)
    (tmp_path / workdir.CHECKPOINTS / "2" / digests.NAME).write_text("{}")
    with pytest.raises(InputError, match=r"no checkpoint is whole \(step 2: digests.json has"):
        open_checkpoints(tmp_path)
    assert os.listdir(tmp_path / workdir.CHECKPOINTS) == ["2"]


def test_evaluation_passes_damage_over_and_moves_nothing(tmp_path, capsys):
    write(tmp_path, [4, 6])
    spoil(tmp_path / workdir.CHECKPOINTS / "6" / "model" / "manifest.ocdbt", "cut", None)
    assert workdir.find_model(str(tmp_path)) == (str(tmp_path / workdir.CHECKPOINTS), 4)
    assert "step 6 is damaged (model/manifest.ocdbt has" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path / workdir.CHECKPOINTS)) == ["4", "6"]
    spoil(tmp_path / workdir.CHECKPOINTS / "4" / "model" / "manifest.ocdbt", "deleted", None)
    with pytest.raises(InputError, match=r"step 4 is damaged .*manifest.ocdbt is missing"):
        workdir.find_model(str(tmp_path))


def test_a_best_model_that_is_damaged_is_chosen_anew(tmp_path, capsys):
    best = str(tmp_path / workdir.BEST)
    kept = open_checkpoints(tmp_path, best=best)
    state = make_state(1, 4, seed=4)
    kept.save_best(state, state.labels)
    named = position(4, best=3.0, best_step=4, waited=1)
    kept.save(state, np.zeros(QUERIES, np.int32), named)
    kept.close()
    again = open_checkpoints(tmp_path, best=best)
    assert again.restore(make_state(1), np.zeros(QUERIES, np.int32))[2] == named
    again.close()
    assert workdir.find_model(str(tmp_path)) == (best, 4)
    spoil(tmp_path / workdir.BEST / "4" / "model" / "_METADATA", "empty", None)
    with pytest.raises(InputError, match=r"best: step 4, .* is damaged \(model/_METADATA has 0"):
        workdir.find_model(str(tmp_path))
    again = open_checkpoints(tmp_path, best=best)
    capsys.readouterr()
    assert again.restore(make_state(1), np.zeros(QUERIES, np.int32))[2] == position(4)
    assert "step 4, the best model, is damaged (model/_METADATA" in capsys.readouterr().out
    again.drop_best_but(None)
    again.save_best(state, state.labels)
    again.close()
    assert digests.damage(str(tmp_path / workdir.BEST / "4")) is None
    assert os.listdir(tmp_path / "best.damaged") == ["4"]


@pytest.mark.parametrize("before,after", [(8, 1), (8, 2), (8, 3), (8, 4), (1, 8), (3, 2), (2, 3)])
def test_rows_are_right_on_any_number_of_devices(tmp_path, before, after):
    """Padding differs: 13 queries are 16 rows on 8 devices, 15 on 3, 13 on one."""
    write(tmp_path, [2], num_devices=before)
    assert_is(tmp_path, 2, num_devices=after)


def test_what_a_kill_left_half_written_goes(tmp_path):
    write(tmp_path, [2])
    for name in ("4.orbax-checkpoint-tmp", "4.orbax-checkpoint-tmp-17"):
        shutil.copytree(
            tmp_path / workdir.CHECKPOINTS / "2" / "model", tmp_path / workdir.CHECKPOINTS / name
        )
    kept = open_checkpoints(tmp_path)
    assert kept.latest_step() == 2
    kept.save(make_state(1, 4, seed=4), np.arange(QUERIES, dtype=np.int32) + 4, position(4))
    kept.close()
    assert sorted(os.listdir(tmp_path / workdir.CHECKPOINTS)) == ["2", "4"]
    assert_is(tmp_path, 4)


@pytest.mark.parametrize("killed", ["", "set aside", "while written", "written"])
def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path, monkeypatch, killed):
    """Killed at any point, one of the two stands."""
    root = tmp_path / "run"
    kept = open_checkpoints(root, keep=1)
    clusters = np.arange(QUERIES, dtype=np.int32)
    kept.save(make_state(1, 6, seed=6), clusters, position(6))
    kept.wait()

    class Killed(Exception):
        pass

    def kill(*_, **__):
        raise Killed

    saved = kept._manager.save
    target = {
        "set aside": (kept._manager, "save", kill),
        "while written": (kept._manager, "save", lambda *a, **k: (saved(*a, **k), kill())),
        "written": (checkpoints_lib, "_put_back", kill),
    }.get(killed)
    with monkeypatch.context() as patched:
        if target:
            patched.setattr(*target)
            with pytest.raises(Killed):
                kept.save(make_state(1, 6, seed=7), clusters + 1, position(6, epoch=7))
        else:
            kept.save(make_state(1, 6, seed=7), clusters + 1, position(6, epoch=7))
    if killed in ("set aside", "while written"):
        # The write that is under way may end or not: both are taken.
        kept._manager.wait_until_finished()
    again = open_checkpoints(root, keep=1)
    assert again.latest_step() == 6 and sorted(os.listdir(root)) == ["checkpoints"]
    epoch = again.restore(make_state(1), clusters)[2]["epoch"]
    assert epoch == (6 if killed == "set aside" else 7)
    again.close()
    kept._manager.close()


def test_due_by_steps_and_by_minutes_but_never_while_one_is_written(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    kept = open_checkpoints(tmp_path, every=10, minutes=2.0)

    def save(step):
        kept.save(make_state(1, step), np.zeros(QUERIES, np.int32), position(step))
        kept.wait()

    assert [step for step in range(1, 25) if kept.due(step) and not save(step)] == [10, 20]
    now[0] += 119.0
    assert not kept.due(21)
    now[0] += 2.0
    assert kept.due(22)
    kept.save(make_state(1, 22), np.zeros(QUERIES, np.int32), position(22))
    monkeypatch.setattr(kept._manager, "is_saving_in_progress", lambda: True)
    assert [step for step in range(23, 33) if kept.due(step)] == []
    monkeypatch.undo()
    kept.wait()
    assert kept.due(33)  # Of step 30, late.
    kept.close()


def test_room_is_asked_for_before_anything_is_done(tmp_path, monkeypatch):
    kept = open_checkpoints(tmp_path, keep=1)
    state = make_state(1)
    size = sum(np.asarray(x).nbytes for x in jax.tree.leaves(state))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2 * size))
    assert "checkpoints: up to 0.00 MiB each, 2 at a time" in kept.check_room(state)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2 * size - 1))
    with pytest.raises(InputError, match=rf"{2 * size:,} bytes, and {2 * size - 1:,} are free"):
        kept.check_room(state)
    kept.save(make_state(1, 1), np.zeros(QUERIES, np.int32), position(1))
    kept.wait()
    kept.check_room(state)  # What is there of it already counts.
    kept.close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_an_error_of_the_disk_is_told_from_others(number):
    text = f"RESOURCE_EXHAUSTED: Failed to write 9 bytes [os_error_code='{number}']"
    assert errors.disk_fault(ValueError(text)) == os.strerror(number)
    assert errors.disk_fault(OSError(number, "no")) == os.strerror(number)
    assert errors.disk_fault(ValueError("x [os_error_code='2']")) is None
    assert errors.disk_fault(OSError(errno.ENOENT, "no")) is None


def test_what_is_saved_is_the_state_when_it_was_saved(tmp_path):
    """The step after it takes over its arrays while they are still written."""
    kept = open_checkpoints(tmp_path)
    step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    for number in range(1, 9):
        expected = np.random.default_rng().normal(size=2**23).astype(np.float32)
        state = make_state(1, number)._replace(params={"large": jax.numpy.array(expected)})
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        kept.save(state, np.zeros(QUERIES, np.int32), position(number))
        for _ in range(3):
            state = step(state)
        jax.block_until_ready(state)
        was_under_way = not kept.due(number)
        kept.wait()
        found, _, _ = kept.restore(like, np.zeros(QUERIES, np.int32))
        np.testing.assert_array_equal(found.params["large"], expected)
        assert int(found.step) == number
        if was_under_way:  # Else the disk was faster than the steps, and nothing is shown.
            break
    assert was_under_way
    kept.close()


def test_frozen_weights_that_are_damaged_are_written_again(tmp_path):
    frozen = {"tower": {"kernel": jax.numpy.arange(12.0).reshape(3, 4)}}
    kept = tmp_path / workdir.FROZEN / "0"
    workdir.save_frozen(str(tmp_path), frozen)
    assert digests.damage(str(kept)) is None
    before = (kept / digests.NAME).stat().st_mtime_ns
    workdir.save_frozen(str(tmp_path), frozen)
    assert (kept / digests.NAME).stat().st_mtime_ns == before  # Written once.
    spoil(kept / "manifest.ocdbt", "cut", None)
    assert "manifest.ocdbt" in digests.damage(str(kept))
    workdir.save_frozen(str(tmp_path), frozen)
    found = digests.read(str(tmp_path / workdir.FROZEN), **{"0": frozen})["0"]
    assert digests.damage(str(kept)) is None
    np.testing.assert_array_equal(found["tower"]["kernel"], frozen["tower"]["kernel"])
