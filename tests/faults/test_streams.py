"""Standard output that is full, closed, or a pipe without a reader: one line, and a status."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
from vixml_jax import command_line
from vixml_jax.runtime import console
def main(argv):
    "Prints."
    for number in range({count}):
        print("line", number)
    {then}
command_line.launch(main, lambda: None)
"""


def run(redirection, *, count=9, then="pass", arguments=""):
    command = f'"$0" -c "$1" {arguments} {redirection}'
    program = PROGRAM.format(count=count, then=then)
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}", sys.executable, program],
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "redirection, count, status, message",
    [
        ("> /dev/full", 9, 2, "standard output: No space left on device"),
        ("> /dev/full", 99_999, 2, "standard output: No space left on device"),
        ("| head -n 1", 99_999, 141, "standard output: its reader has ended"),
        (">&-", 9, 2, "standard output is closed"),
    ],
)
def test_an_output_that_takes_nothing_ends_a_command_in_one_line(
    redirection, count, status, message
):
    done = run(redirection, count=count)
    assert done.returncode == status, done.stderr
    assert done.stderr.count("\n") == 1 and message in done.stderr


def test_help_and_version():
    for arguments in ("--help", "--version", "--help=all"):
        full = run("> /dev/full", arguments=arguments)
        assert full.returncode == 2 and full.stderr.count("\n") == 1, full.stderr
        assert "No space left" in full.stderr


def test_standard_error_may_be_closed_or_full():
    for redirection in ("2>&-", "2> /dev/full", "2>&- > /dev/full"):
        failed = run(redirection, then="raise command_line.InputError('x')")
        assert (failed.returncode, failed.stderr) == (2, ""), redirection
    assert run("2>&-").returncode == 0


def test_other_files_never_get_the_descriptors_of_closed_streams(tmp_path):
    path = tmp_path / "file"
    then = f"open({os.fspath(path)!r}, 'w'); import os; os.write(2, b'lost')"
    assert run("2>&- <&-", then=then).returncode == 0
    assert path.read_text() == ""
