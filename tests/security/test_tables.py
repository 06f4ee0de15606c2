"""Damaged tables and files of the XML repository: prepared or refused in a line.

See `tests/data/sources/test_broken_input.py` for what is prepared then.
"""

import pytest

from tests.security import tables, worker

MODULE = "tests.security.tables"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("tables")
    tables.make(path)
    return path


def test_damaged_tables_are_prepared_or_refused(root):
    counts = worker.run(MODULE, root, 0, 60)
    assert sum(outcomes.get("refused", 0) for outcomes in counts.values()) > 20, counts
    assert sum(outcomes.get("other", 0) for outcomes in counts.values()) > 0, counts


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 4))
def test_many_damaged_tables_are_prepared_or_refused(seed, root):
    worker.run(MODULE, root, seed, 1000)
