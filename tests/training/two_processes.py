"""One of two processes: they stop together, save, lose the newest checkpoint and restore."""

import os
import pathlib
import signal
import sys
import time

import jax

jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))

import numpy as np  # noqa: E402
import test_checkpoints  # noqa: E402

from vixml_jax import structs, workdir  # noqa: E402
from vixml_jax.errors import InputError, Preempted  # noqa: E402
from vixml_jax.parallel import distributed, sharding  # noqa: E402
from vixml_jax.storage import digests  # noqa: E402
from vixml_jax.training import preemption  # noqa: E402
from vixml_jax.training.clustering import balanced, bisecting  # noqa: E402

root, process = pathlib.Path(sys.argv[3]), jax.process_index()
directory = root / workdir.CHECKPOINTS
assert jax.process_count() == 2 and len(jax.devices()) == 4

# The second process gets a signal in its fourth step; the first process runs ahead of it.
with preemption.StopSignal().installed() as stop, stop.deferred():
    agree, actions = preemption.Agreement(sharding.create_mesh()), []
    for step in range(1, 20):
        time.sleep(0.02 * process)
        if process == 1 and step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        request = preemption.SAVE if process == 0 and step == 2 else preemption.GO_ON
        actions.append(agree(preemption.STOP if stop.requested_by else request))
        if actions[-1] == preemption.STOP:
            break
    assert actions == [0, 0, 0, preemption.SAVE, 0, preemption.STOP], actions
    try:
        with stop.interruptible():
            raise AssertionError("not interrupted")
    except Preempted as error:
        signal_name = ("SIGTERM", "a signal to another")[1 - process]
        assert str(error).startswith(f"stopped by {signal_name}")

# The first process gets a signal while both split rows together.
balanced.MAX_LOCAL_ROWS, calls = 8, []
scores = bisecting.ShardedRows.scores


def signalled_scores(rows, directions):
    calls.append(len(directions))
    if process == 0 and len(calls) == 5:
        os.kill(os.getpid(), signal.SIGTERM)
    return scores(rows, directions)


bisecting.ShardedRows.scores = signalled_scores
x = np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32)
ids = np.arange(process, 300, 2)
with preemption.StopSignal().installed() as stop, stop.deferred():
    try:
        with stop.interruptible():
            shard = structs.Shard(ids, x[ids])
            balanced.balanced_clusters(shard, 300, 60, seed=0, group=distributed.world())
        raise AssertionError("not interrupted")
    except Preempted as error:
        signal_name = ("SIGTERM", "a signal to another")[process]
        assert str(error).startswith(f"stopped by {signal_name}")
assert len(calls) == 5

test_checkpoints.write(root, [2, 4, 6], num_devices=4)
test_checkpoints.write(root, [8], num_devices=4)
distributed.barrier("written")
assert digests.steps(str(directory)) == [4, 6, 8]
distributed.barrier("looked at")
if process == 0:
    (directory / "8" / "model" / "manifest.ocdbt").write_bytes(b"")
distributed.barrier("newest damaged")

checkpoints = test_checkpoints.open_checkpoints(root)
assert checkpoints.latest_step() == 6
expected = test_checkpoints.make_state(4, 6, seed=6)
state, clusters, position = checkpoints.restore(
    test_checkpoints.make_state(4), np.zeros(test_checkpoints.QUERIES, np.int32)
)
for leaf, expected_leaf in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
    shards = zip(leaf.addressable_shards, expected_leaf.addressable_shards, strict=True)
    for shard, expected_shard in shards:
        np.testing.assert_array_equal(shard.data, expected_shard.data)
assert position == test_checkpoints.position(6) and clusters[0] == 6
# Saving the same step again replaces the checkpoint.
checkpoints.save(state, clusters + 1, position)
checkpoints.close()
reopened = test_checkpoints.open_checkpoints(root)
assert reopened.restore(state, clusters)[1][0] == 7
reopened.close()
distributed.barrier("replaced")

if process == 0:
    for path in directory.iterdir():
        (path / digests.NAME).unlink()
distributed.barrier("all damaged")
try:
    test_checkpoints.open_checkpoints(root)
    raise AssertionError("opened")
except InputError as error:
    assert "all checkpoints are damaged" in str(error)
print("passed")
