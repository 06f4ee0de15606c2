"""Each test of a benchmark defines that benchmark's flags; they are gone after it."""

import pytest
from absl import flags


@pytest.fixture(autouse=True)
def _own_flags():
    before = set(flags.FLAGS)
    yield
    for name in set(flags.FLAGS) - before:  # Libraries define some as they are imported.
        if flags.FLAGS.find_module_defining_flag(name).startswith("vixml_jax"):
            delattr(flags.FLAGS, name)
