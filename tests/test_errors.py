"""Errors about the disk."""

import errno
import os

import pytest

from vixml_jax import errors


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EISDIR])
def test_disk_errors_while_writing_become_input_errors(number):
    with pytest.raises(errors.InputError) as error, errors.writing("--out=DIR"):
        raise OSError(number, os.strerror(number))
    assert str(error.value).startswith(f"--out=DIR: {os.strerror(number)} while writing")


def test_other_errors_while_writing_are_raised_unchanged():
    with pytest.raises(ConnectionResetError), errors.writing("--out=DIR"):
        raise ConnectionResetError(errno.ECONNRESET, "reset")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "full"), os.strerror(errno.ENOSPC)),
        (ValueError("a write failed [os_error_code='30']"), os.strerror(errno.EROFS)),
        (OSError(errno.ENOENT, "missing"), None),
        (ValueError("no number"), None),
    ],
)
def test_disk_faults(error, message):
    assert errors.disk_fault(error) == message
