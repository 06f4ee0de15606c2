"""The directory of a new run: what an earlier run has left there is not taken for its own."""

import os

import pytest

from tests import tiny
from vixml_jax import workdir
from vixml_jax.data.store import PreparedDataset
from vixml_jax.errors import InputError
from vixml_jax.parallel import sharding
from vixml_jax.training import build


@pytest.fixture
def start(tmp_path):
    """Starts a run in a directory."""
    dataset = PreparedDataset.open(tiny.make_data(tmp_path))

    def start(directory):
        config = tiny.configuration(dataset.path, directory)
        parts = build.make_tower(config, dataset)
        workdir.open_run(config, *parts, dataset.content_hash, sharding.create_mesh())

    return start


@pytest.mark.parametrize(
    "left",
    [
        *("checkpoints", "best", "frozen", "vectors", "evaluation", "serving", "label_updates"),
        *("answers", "changes"),
    ],
)
def test_a_run_is_not_started_among_files_of_another(start, tmp_path, left):
    run = tmp_path / "run"
    (run / left).mkdir(parents=True)
    with pytest.raises(InputError, match=rf"holds {left}/ of a run; use another --workdir"):
        start(run)
    assert os.listdir(run) == [left]


def test_files_of_the_user_do_not_matter(start, tmp_path):
    run = tmp_path / "run"
    (run / "notes").mkdir(parents=True)
    (run / "notes.txt").write_text("mine")
    start(run)
    assert (run / workdir.CONFIG).exists()
    start(run)  # As when it is resumed.
