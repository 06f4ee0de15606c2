"""One of two processes: agrees with the other, saves, loses the newest, restores."""

import os
import pathlib
import signal
import sys
import time

import jax

jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))

import numpy as np  # noqa: E402
import test_checkpoints  # noqa: E402

from vixml_jax import workdir  # noqa: E402
from vixml_jax.errors import InputError, Preempted  # noqa: E402
from vixml_jax.parallel import distributed, sharding  # noqa: E402
from vixml_jax.storage import digests  # noqa: E402
from vixml_jax.training import preemption  # noqa: E402

root, me = pathlib.Path(sys.argv[3]), jax.process_index()
assert jax.process_count() == 2 and len(jax.devices()) == 4

# The second process is signalled in its fourth step, and the first one runs ahead of it.
with preemption.Stop().caught() as stop:
    agree, done = preemption.Agreement(sharding.create_mesh()), []
    for step in range(1, 20):
        time.sleep(0.02 * me)
        if me == 1 and step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        wish = preemption.SAVE if me == 0 and step == 2 else preemption.GO_ON
        done.append(agree(preemption.STOP if stop.asked else wish))
        if done[-1] == preemption.STOP:
            break
    assert done == [0, 0, 0, preemption.SAVE, 0, preemption.STOP], done
    try:
        with stop.at_once():
            raise AssertionError("went on")
    except Preempted as told:
        assert str(told).startswith("stopped by " + ("SIGTERM", "a signal to another")[1 - me])

test_checkpoints.write(root, [2, 4, 6], num_devices=4)
test_checkpoints.write(root, [8], num_devices=4)
assert test_checkpoints.sealed.steps(str(root / workdir.CHECKPOINTS)) == [4, 6, 8]
distributed.meet("written")
if me == 0:
    (root / workdir.CHECKPOINTS / "8" / "model" / "manifest.ocdbt").write_bytes(b"")
distributed.meet("spoilt")

kept = test_checkpoints.open_checkpoints(root)
assert kept.latest_step() == 6
expected = test_checkpoints.make_state(4, 6, seed=6)
found, clusters, there = kept.restore(
    test_checkpoints.make_state(4), np.zeros(test_checkpoints.QUERIES, np.int32)
)
for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    for mine, wanted in zip(one.addressable_shards, other.addressable_shards, strict=True):
        np.testing.assert_array_equal(mine.data, wanted.data)
assert there == test_checkpoints.position(6) and clusters[0] == 6
# The same step once more: it is replaced.
kept.save(found, clusters + 1, there)
kept.close()
again = test_checkpoints.open_checkpoints(root)
assert again.restore(found, clusters)[1][0] == 7
again.close()
distributed.meet("replaced")

if me == 0:
    for path in (root / workdir.CHECKPOINTS).iterdir():
        (path / digests.NAME).unlink()
distributed.meet("all spoilt")
try:
    test_checkpoints.open_checkpoints(root)
    raise AssertionError("opened")
except InputError as told:
    assert "no checkpoint is whole" in str(told)
print("fine")
