"""Several processes on this machine: arrays from each to each, and how they end together."""

import pathlib
import signal

import numpy as np
import pytest

from tests.multiprocess import spawn
from vixml_jax.errors import InputError
from vixml_jax.parallel import distributed
from vixml_jax.structs import Share

EXCHANGE = str(pathlib.Path(__file__).parent / "exchange.py")


@pytest.mark.parametrize("count", [2, 4])
def test_what_each_gives_reaches_all(count):
    done = spawn.finish(spawn.start(EXCHANGE, [], num_processes=count, devices=2))
    assert [status for status, *_ in done] == [0] * count, done
    assert [spawn.printed(words) for _, words, _ in done] == [
        ["all is as it should be"],
        *[[]] * (count - 1),
    ]


@pytest.mark.parametrize(("how", "status"), [("input", 2), ("fault", 1)])
def test_all_leave_when_one_fails(how, status):
    children = spawn.start(EXCHANGE, [f"--fail={how}"], num_processes=2, devices=1)
    (first, _, told), (second, _, own) = spawn.finish(children, timeout=60)
    assert (first, second) == (status, status)
    assert "of the second" in own
    said = "RuntimeError: of the second" if how == "fault" else "error: of the second"
    assert f"process 1: {said}\n" in told


def test_none_waits_for_the_dead():
    children = spawn.start(EXCHANGE, ["--fail=asleep"], num_processes=3, devices=1)
    while "was here" not in children[1].stderr.readline():
        assert children[1].poll() is None
    children[1].send_signal(signal.SIGKILL)
    done = spawn.finish(children, timeout=90)
    assert all(status != 0 for status, *_ in done)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("host:1", None, 0), "needs both"),
        (("", 2, 0), "one process neither"),
        (("auto", 2, 0), "one process neither"),
        (("host:1", 2, 2), "expected 0 to 1"),
        (("here", None, None), "expected HOST:PORT or 'auto'"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags, said):
    with pytest.raises(InputError, match=said):
        distributed.start(*flags)


def test_alone_nothing_is_copied():
    group, x = distributed.world(), np.ones((3, 2))
    assert group is distributed.ALONE
    assert group.gather(x)[0] is x and group.exchange([x])[0] is x
    assert distributed.whole(Share(np.arange(3), x), 3, group) is x
