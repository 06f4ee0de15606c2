"""Prediction with Ray Data: one answer a row, those of a predictor."""

import json
import os
import pathlib
import re
import runpy
import shlex
import subprocess
import sys

import numpy as np
import pytest

from tests.service.conftest import unpack
from vixml_jax.serving.predictor import Predictor

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "ray_predict.py"
COUNT, TIMEOUT = 3000, 500
ENV = {**os.environ, "RAY_worker_niceness": "0"}  # Else workers starve on a busy machine.
# Runs the script in a cluster of as many CPUs as an argument says, which the machine need not have.
RUN = (
    "import runpy, sys, ray; ray.init(num_cpus=int(sys.argv.pop(1)), include_dashboard=False); "
    f"sys.argv[0] = {str(SCRIPT)!r}; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
)


def test_the_commands_of_the_guide_parse():
    parse = runpy.run_path(str(SCRIPT))["parse"]
    text = (ROOT / "docs/serving.md").read_text().replace("\\\n", " ") + SCRIPT.read_text()
    commands = re.findall(r"python launch/ray_predict\.py (.*)", text)
    assert len(commands) >= 2
    for command in commands:
        assert parse(shlex.split(command)).workdir == "runs/shop"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return unpack(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng()
    texts = [f"a{a} b{b}" for a, b in rng.integers(10, size=(COUNT, 2))]
    texts[5], texts[17] = "", "  "
    texts[99] = 'a1, "b2"'
    return {"id": [f"q{i}" for i in range(COUNT)], "text": texts}


def write(kind, rows, path):
    """Writes the rows to three files, so that actors share them."""
    import pyarrow as pa
    from pyarrow import csv, parquet

    path.mkdir()
    for part in range(3):
        table = pa.table(rows).take(list(range(part, COUNT, 3)))
        if kind == "parquet":
            parquet.write_table(table, path / f"{part}.parquet")
        elif kind == "csv":
            csv.write_csv(table, path / f"{part}.csv")
        else:
            lines = (json.dumps(row) + "\n" for row in table.to_pylist())
            (path / f"{part}.jsonl").write_text("".join(lines))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_each_row_has_the_answer_of_a_predictor(workdir, rows, tmp_path, kind):
    pytest.importorskip("ray", reason="no ray: pip install 'ray[data]'")
    from pyarrow import parquet

    write(kind, rows, tmp_path / "queries")
    command = [sys.executable, "-c", RUN, "3", f"--workdir={workdir}",
               f"--queries={tmp_path}/queries", f"--out={tmp_path}/out", f"--format={kind}",
               "--k=3", "--actors=2"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=ENV)
    assert done.returncode == 0, done.stderr[-4000:]
    found = parquet.read_table(tmp_path / "out").to_pylist()
    assert sorted(row["id"] for row in found) == sorted(rows["id"])
    answers = {row["id"]: row for row in found}
    expected = iter(
        Predictor.load(workdir, warm=False)([text for text in rows["text"] if text.strip()], k=3)
    )
    for name, text in zip(rows["id"], rows["text"], strict=True):
        row = answers[name]
        if not text.strip():
            assert (row["labels"], row["scores"], row["error"]) == ([], [], "no text")
            continue
        labels = next(expected)
        assert row["labels"] == [label.id for label in labels] and row["error"] is None
        np.testing.assert_allclose(row["scores"], [x.score for x in labels], atol=1e-5)


def test_wrong_flags_are_refused_in_a_line(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--workdir=missing", "--queries=q", f"--out={tmp_path}/out"],
        capture_output=True, text=True, timeout=TIMEOUT,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "error: --workdir=missing: no run directory\n")
    script = runpy.run_path(str(SCRIPT))
    flags = ["--workdir=a", "--queries=b", "--out=c", "--actors=3", "--cpus_per_actor=0.5"]
    values = script["parse"](flags)
    script["check_cpus"](values, 2.5)
    with pytest.raises(ValueError, match=r"need 2\.5 CPUs, one of them"):
        script["check_cpus"](values, 2.0)


@pytest.mark.slow
@pytest.mark.parametrize("flag,message", [
    ("--text_column=title", "no column 'title' among id, text"),
    ("--out={}", "exists"),
])  # fmt: skip
def test_wrong_input_is_refused(workdir, tmp_path, flag, message):
    pytest.importorskip("ray", reason="no ray: pip install 'ray[data]'")
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"id": [1, 2], "text": ["a1", "b2"]}), tmp_path / "q.parquet")
    arguments = [f"--workdir={workdir}", f"--queries={tmp_path}/q.parquet", f"--out={tmp_path}/out"]
    done = subprocess.run(
        [sys.executable, "-c", RUN, "3", *arguments, flag.format(tmp_path)],
        capture_output=True, text=True, timeout=TIMEOUT, env=ENV,
    )  # fmt: skip
    assert done.returncode == 1 and [path.name for path in tmp_path.iterdir()] == ["q.parquet"]
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert message in line and "Traceback" not in done.stderr
