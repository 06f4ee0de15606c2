"""One of several processes: what each gives is a function of its number, so all know it."""

import sys
import time

import numpy as np
from absl import flags

from vixml_jax import errors
from vixml_jax.parallel import distributed


def given(index, rows, dtype):
    rng = np.random.default_rng(index)
    return (1000 * rng.normal(size=(rows, 3))).astype(dtype)


def main(argv):
    values = flags.FLAGS
    distributed.start(values.coordinator, values.num_processes, values.process_index)
    group = distributed.world()
    assert group.count == values.num_processes and group.index == values.process_index
    distributed._UNDER_WAY = 1 << 13  # Long arrays in pieces.
    for dtype in (np.int64, np.float32, np.float64, np.uint8):
        found = group.gather(given(group.index, 4 * group.index, dtype))  # None of the first.
        for index, x in enumerate(found):
            assert x.dtype == dtype
            np.testing.assert_array_equal(x, given(index, 4 * index, dtype))

        same = group.gather(given(group.index, 3000, dtype), [3000] * group.count)
        for index, x in enumerate(same):
            np.testing.assert_array_equal(x, given(index, 3000, dtype))

        def part(sender, receiver, dtype=dtype):
            return given(10 * sender + receiver, 700 * ((sender * receiver) % 3), dtype)

        found = group.exchange([part(group.index, to) for to in range(group.count)])
        for sender, x in enumerate(found):
            assert x.dtype == dtype
            np.testing.assert_array_equal(x, part(sender, group.index))
    made = []
    with distributed.first_alone("a test"):
        made.append(group.index)
    assert distributed.first_says(7 + group.index) == 7
    print("all is as it should be")  # By the first one alone.
    print(f"process {group.index} was here", file=sys.stderr)
    if values.fail:
        if group.index == 1 and values.fail == "asleep":
            time.sleep(600)
        elif group.index == 1:
            raise {"input": errors.InputError, "fault": RuntimeError}[values.fail]("of the second")
        distributed.meet("where the other never comes")


if __name__ == "__main__":
    distributed.define_flags()
    flags.DEFINE_string("fail", "", "How the second process ends.")
    errors.launch(main)
