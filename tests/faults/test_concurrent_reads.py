"""A thousand reads of a run in this process, while another one trains it or updates its labels."""

import subprocess
import sys
from concurrent import futures

import numpy as np
import pytest

from vixml_jax import saved_model
from vixml_jax import workdir as workdir_lib
from vixml_jax.benchmarks import fault_injection
from vixml_jax.serving import label_updates
from vixml_jax.serving.predictor import Predictor

pytestmark = pytest.mark.slow
READS = 1000
# Adds two labels that only come together, and takes them back, until its input is closed.
UPDATES = """
import sys, threading
from vixml_jax.serving import label_updates
from vixml_jax.serving.predictor import Predictor
workdir = sys.argv[1]
predictor = Predictor.load(workdir, warm=False)
texts = ["label a1", "label b1"]
vectors = predictor.encode(texts)
over = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
count = 0
while not over.is_set():
    label_updates.add(workdir, predictor.artifacts, ["x", "y"], texts, vectors)
    label_updates.undo(workdir)
    count += 1
print(count)
"""


def test_predictions_beside_updates_of_another_process(tmp_path):
    fault_injection.make_jobs(str(tmp_path / "jobs"))
    workdir = str(tmp_path / "jobs" / "run")
    predictor = Predictor.load(workdir, warm=False)
    before = answers(predictor)
    texts = ["label a1", "label b1"]
    vectors = predictor.encode(texts)
    label_updates.add(workdir, predictor.artifacts, ["x", "y"], texts, vectors)
    predictor.refresh()
    after = answers(predictor)
    label_updates.undo(workdir)
    assert before != after
    writer = subprocess.Popen(
        [sys.executable, "-c", UPDATES, workdir],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )

    def read(_):
        predictor.refresh()
        return answers(predictor)

    with futures.ThreadPoolExecutor(8) as pool:
        found = [*pool.map(read, range(READS))]
        while after not in found[-READS:]:  # Until the writer has started.
            assert writer.poll() is None
            found += pool.map(read, range(READS))
    output, errors = writer.communicate()
    assert writer.returncode == 0, errors
    assert int(output) > 0
    assert all(one in (before, after) for one in found)
    predictor.refresh()
    assert answers(predictor) == before


def answers(predictor):
    """Labels and rounded scores, which are those of one version of the labels or of another."""
    rows = predictor(["a1 b1", "a3 b7"], k=22)
    return [[(label.id, round(float(label.score), 4)) for label in row] for row in rows]


def test_models_are_read_while_checkpoints_come_and_go(tmp_path):
    """Training keeps one checkpoint and saves after each short epoch."""
    data = fault_injection.make_data(str(tmp_path))
    flags = {"loop.max_to_keep": 1, "loop.epochs": 2000, "loop.eval_every": 2000}
    run = fault_injection.Run(data, str(tmp_path / "run"), **flags)
    process = run.start()
    try:
        assert fault_injection.wait_for(process, lambda: len(run.saved()) > 0)
        config = workdir_lib.read_config(run.workdir)
        sizes = workdir_lib.read_tower(run.workdir)
        model = workdir_lib.build_model(config, *sizes, 20, workdir_lib.make_mesh(config))
        steps = set()
        for number in range(READS):
            with saved_model.opened(run.workdir) as saved:
                step = saved.step
            if number % 5 == 0:
                params, _, restored = saved_model.restore(run.workdir, model)
                assert restored >= step
                assert all(np.isfinite(x).all() for x in _leaves(params))
            steps.add(step)
        assert process.poll() is None, process.stdout.read()
    finally:
        process.kill()
        process.communicate()
    assert len(steps) > 50


def _leaves(params):
    import jax

    return [np.asarray(x) for x in jax.tree.leaves(params)]
