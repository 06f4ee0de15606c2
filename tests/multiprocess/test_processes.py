"""Several processes on this machine: exchange of arrays, and joint exit on failure."""

import pathlib
import signal

import numpy as np
import pytest

from tests.multiprocess import spawn
from vixml_jax.errors import InputError
from vixml_jax.parallel import distributed
from vixml_jax.structs import Shard

EXCHANGE = str(pathlib.Path(__file__).parent / "exchange.py")
SEARCHING = str(pathlib.Path(__file__).parent / "searching.py")


@pytest.mark.parametrize("count", [2, 4])
def test_arrays_reach_all_processes(count):
    done = spawn.finish(spawn.start(EXCHANGE, [], num_processes=count, devices=2))
    assert [status for status, *_ in done] == [0] * count, done
    assert [spawn.printed(stdout) for _, stdout, _ in done] == [
        ["all checks passed"],
        *[[]] * (count - 1),
    ]


def test_probabilities_count_the_labels_of_all_processes():
    done = spawn.finish(spawn.start(SEARCHING, [], num_processes=2, devices=2))
    assert [status for status, *_ in done] == [0, 0], done
    assert spawn.printed(done[0][1]) == ["all checks passed"]


@pytest.mark.parametrize(("kind", "status"), [("input", 2), ("bug", 1)])
def test_all_processes_exit_when_one_fails(kind, status):
    children = spawn.start(EXCHANGE, [f"--fail={kind}"], num_processes=2, devices=1)
    (first, _, first_stderr), (second, _, second_stderr) = spawn.finish(children, timeout=60)
    assert (first, second) == (status, status)
    assert "process 1 failed" in second_stderr
    line = "RuntimeError: process 1 failed" if kind == "bug" else "error: process 1 failed"
    assert f"process 1: {line}\n" in first_stderr


def test_all_processes_exit_when_one_is_killed():
    children = spawn.start(EXCHANGE, ["--fail=hang"], num_processes=3, devices=1)
    while "is ready" not in children[1].stderr.readline():
        assert children[1].poll() is None
    children[1].send_signal(signal.SIGKILL)
    done = spawn.finish(children, timeout=90)
    assert all(status != 0 for status, *_ in done)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("host:1", None, 0), "needs both numbers"),
        (("", 2, 0), "leave both out"),
        (("auto", 2, 0), "leave both out"),
        (("host:1", 2, 2), "expected 0 to 1"),
        (("here", None, None), "expected HOST:PORT or 'auto'"),
    ],
)
def test_contradictory_flags_are_refused(flags, message):
    with pytest.raises(InputError, match=message):
        distributed.start(*flags)


def test_a_single_process_copies_nothing():
    group, x = distributed.world(), np.ones((3, 2))
    assert group is distributed.ALONE
    assert group.gather(x)[0] is x and group.exchange([x])[0] is x
    assert distributed.gather_rows(Shard(np.arange(3), x), 3, group) is x
