"""Program of one of several processes, which exchange arrays that depend only on their index."""

import sys
import time

import numpy as np
from absl import flags

from vixml_jax import command_line, errors
from vixml_jax.parallel import distributed


def array_of(index, rows, dtype):
    rng = np.random.default_rng(index)
    return (1000 * rng.normal(size=(rows, 3))).astype(dtype)


def main(argv):
    values = flags.FLAGS
    distributed.start(values.coordinator, values.num_processes, values.process_index)
    group = distributed.world()
    assert group.count == values.num_processes and group.index == values.process_index
    distributed._MAX_BYTES = 1 << 13  # So that long arrays are sent in several chunks.
    for dtype in (np.int64, np.float32, np.float64, np.uint8):
        found = group.gather(array_of(group.index, 4 * group.index, dtype))  # Empty on process 0.
        for index, x in enumerate(found):
            assert x.dtype == dtype
            np.testing.assert_array_equal(x, array_of(index, 4 * index, dtype))

        same = group.gather(array_of(group.index, 3000, dtype), [3000] * group.count)
        for index, x in enumerate(same):
            np.testing.assert_array_equal(x, array_of(index, 3000, dtype))

        def part(sender, receiver, dtype=dtype):
            return array_of(10 * sender + receiver, 700 * ((sender * receiver) % 3), dtype)

        found = group.exchange([part(group.index, to) for to in range(group.count)])
        for sender, x in enumerate(found):
            assert x.dtype == dtype
            np.testing.assert_array_equal(x, part(sender, group.index))
    entered = []
    with distributed.first_process_first("a test"):
        entered.append(group.index)
    assert distributed.broadcast_from_first(7 + group.index) == 7
    print("all checks passed")  # Shown by process 0 only.
    print(f"process {group.index} is ready", file=sys.stderr)
    if values.fail:
        if group.index == 1 and values.fail == "hang":
            time.sleep(600)
        elif group.index == 1:
            raise {"input": errors.InputError, "bug": RuntimeError}[values.fail]("process 1 failed")
        distributed.barrier("never reached by process 1")


def define_flags():
    distributed.define_flags()
    flags.DEFINE_string("fail", "", "How process 1 ends: hang, input or bug; empty: normally.")


if __name__ == "__main__":
    command_line.launch(main, define_flags)
