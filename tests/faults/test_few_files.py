"""A process that may open few files says so, and does not take good data for damaged."""

import os
import resource

import numpy as np
import pytest

from vixml_jax.errors import InputError
from vixml_jax.storage import npy_files, regular_files


@pytest.fixture
def no_more_files():
    """All descriptors that the limit allows are taken."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = [os.open(os.devnull, os.O_RDONLY)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken[0] + 3, hard))
    try:
        while True:
            taken.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        pass
    yield taken
    for descriptor in taken:
        os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("spare", [0, 1])
def test_too_many_open_files_are_named(tmp_path, no_more_files, spare):
    for _ in range(spare):  # The file is opened, but cannot be mapped.
        os.close(no_more_files.pop())
    try:
        with pytest.raises(InputError, match=r"too many files are open.*ulimit -n") as error:
            npy_files.open_mapped(str(tmp_path / "array.npy"), "prepare again")
    finally:
        message = str(error.value)
    assert "prepare again" not in message


@pytest.fixture(autouse=True)
def array(tmp_path):
    np.save(tmp_path / "array.npy", np.arange(3))
    regular_files.check(tmp_path / "array.npy")
