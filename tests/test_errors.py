"""How a door is left: one line and a status."""

import signal
import subprocess
import sys

import pytest

PROGRAM = """
import os, signal
from vixml_jax import errors

def main(argv):
    {what}

errors.launch(main)
"""


@pytest.mark.parametrize(
    "what,status,line",
    [
        ("raise errors.InputError('a\\nb')", 2, "error: a b"),
        ("raise errors.NotFiniteError('no number')", 1, "error: no number"),
        ("os.kill(os.getpid(), signal.SIGINT)", 128 + signal.SIGINT, "interrupted"),
        ("print('done')", 0, ""),
    ],
)
def test_a_door_is_left_in_one_line(what, status, line):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(what=what)], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr.strip()) == (status, line)
