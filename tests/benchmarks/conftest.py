"""Each test of a benchmark defines that benchmark's flags; they are gone after it."""

import pytest
from absl import flags


@pytest.fixture(autouse=True)
def _own_flags():
    before = set(flags.FLAGS)
    yield
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)
