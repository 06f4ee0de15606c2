"""What a user would take instead: XR-Linear, Parabel, Bonsai and kNN, evaluated as a run is.

    python -m vixml_jax.benchmarks.baselines --data=DATA [--pecos_python=PATH --workdir=RUN]

The linear learners are trained on TF-IDF of the texts of a prepared data set, with the settings
that their authors recommend. All are evaluated with the metrics and filter pairs of `evaluate`,
beside a run on the same data. Each trains and predicts in a process of its own, one after another,
on all cores; its memory is that of the whole process at its peak.

Parabel and Bonsai need `pip install 'vixml_jax[benchmark]'`. XR-Linear needs libpecos, whose numpy
is older than that of this package, in an environment of its own:

    python -m venv pecos && pecos/bin/pip install libpecos==1.2.8
    python -m vixml_jax.benchmarks.baselines --data=DATA --pecos_python=pecos/bin/python
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags
from scipy import sparse

from vixml_jax import command_line, evaluator
from vixml_jax import workdir as workdir_lib
from vixml_jax.benchmarks.baselines import features, learners
from vixml_jax.data.store import PreparedDataset
from vixml_jax.errors import InputError
from vixml_jax.report import tables
from vixml_jax.runtime import console
from vixml_jax.search import index as index_lib
from vixml_jax.storage import json_files
from vixml_jax.structs import SearchResult

K = 100
ROWS = {
    "knn_text": "kNN baseline, text",
    "knn_image": "kNN baseline, image",
    "knn_both": "kNN baseline, both",
    "xr_linear": "XR-Linear, text",
    "parabel": "Parabel, text",
    "bonsai": "Bonsai, text",
}
COST = ("train s", "predict s", "peak GiB")
COLUMNS = ("P@1", "P@3", "P@5", "PSP@1", "PSP@3", "PSP@5", "R@100", *COST)
BASELINES = ("knn", "xr_linear", "parabel", "bonsai")
_OMIKUJI = ("parabel", "bonsai")


def chosen(names: Sequence[str], dataset: PreparedDataset, pecos_python: str) -> list[str]:
    """The learners to run, in the order of the table; a line names those that are left out.

    Args:
      names: Of `BASELINES`.
      dataset: Prepared data.
      pecos_python: Interpreter with libpecos; empty: there is none.

    Raises:
      InputError: If a name is unknown, the interpreter has no libpecos, or no learner is left.
    """
    unknown = [name for name in names if name not in BASELINES]
    if unknown:
        raise InputError(f"--baselines={unknown[0]}: expected some of {', '.join(BASELINES)}")
    found = []
    if "knn" in names:
        found += ["knn_text", "knn_image", "knn_both"] if dataset.image_width else ["knn_text"]
    if "xr_linear" in names:
        if pecos_python:
            _check_pecos(pecos_python)
            found.append("xr_linear")
        else:
            print(
                f"XR-Linear is left out: add --pecos_python=PATH, made by: {learners.INTERPRETER}"
            )
    trees = [name for name in _OMIKUJI if name in names]
    if trees and importlib.util.find_spec("omikuji") is None:
        left = " and ".join(ROWS[name].removesuffix(", text") for name in trees)
        print(f"{left} need omikuji: pip install 'vixml_jax[benchmark]'; left out")
        trees = []
    if not found + trees:
        raise InputError(f"--baselines={','.join(names)}: none of them can run")
    return found + trees


def _check_pecos(pecos_python: str) -> None:
    command = [pecos_python, "-I", "-c", "import pecos.xmc"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        fault = done.stderr.strip().rpartition("\n")[2] if done.returncode else ""
    except OSError as error:
        fault = error.strerror or str(error)
    if fault:
        raise InputError(
            f"--pecos_python={pecos_python}: {fault}; expected an interpreter with libpecos, made "
            f"by: {learners.INTERPRETER}"
        )


def write_inputs(directory: str, dataset: PreparedDataset, split: str, fetched: int) -> None:
    """Writes what `learners` reads.

    Args:
      directory: To write to.
      dataset: Prepared data.
      split: 'test' or 'valid'.
      fetched: Labels found per query, filter pairs among them.
    """
    made = features.tfidf(dataset, split)
    for name, matrix in {
        "train_features": made.train,
        "train_labels": dataset.train_relevance,
        "features": made.queries,
    }.items():
        path = os.path.join(directory, f"{name}.npz")
        sparse.save_npz(path, sparse.csr_matrix(matrix), compressed=False)
    settings = {"data": os.path.abspath(dataset.path), "split": split, "k": fetched}
    json_files.write(os.path.join(directory, "settings.json"), settings)


def run(name: str, directory: str, pecos_python: str) -> dict[str, Any] | None:
    """Runs one learner in a process of its own.

    Returns:
      The fields of `learners.Found` and `peak_bytes`; None if the process failed, which a warning
      with its last words says.
    """
    interpreter = [pecos_python, "-I"] if name == "xr_linear" else [sys.executable]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    log = os.path.join(directory, f"{name}.log")
    with open(log, "wb") as file:
        done = subprocess.run(
            [*interpreter, learners.__file__, name, directory],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            check=False,
        )
    if done.returncode:
        with open(log, encoding="utf-8", errors="replace") as file:
            last = file.read().strip().rpartition("\n")[2]
        print(f"warning: {ROWS[name]}: ended with status {done.returncode}: {last}", flush=True)
        return None
    with np.load(os.path.join(directory, f"{name}.npz"), allow_pickle=False) as found:
        return {key: found[key] if key == "ids" else found[key].item() for key in found}


def row_of(found: dict[str, Any], dataset: PreparedDataset, split: str, k: int) -> dict[str, float]:
    """Metrics and cost of what a learner found, by column.

    Args:
      found: Of `run`.
      dataset: Prepared data.
      split: 'test' or 'valid'.
      k: Labels per query after filtering.
    """
    ids = found["ids"]
    scores = np.where(ids < 0, -np.inf, -np.arange(ids.shape[1])).astype(np.float32)
    result = index_lib.drop_filtered(SearchResult(scores, ids), dataset.split(split)[2], k)
    row = evaluator.measure(result, dataset, split)
    row |= {"predict s": found["predict_s"], "peak GiB": found["peak_bytes"] / 2**30}
    return row | ({"train s": found["train_s"]} if found["train_s"] else {})


def rows_of_run(workdir: str, dataset: PreparedDataset, split: str) -> dict[str, dict[str, float]]:
    """Results of a run, by row, from the files that `evaluate` and `train` wrote.

    The seconds of training are those of its steps, without what is done between epochs.

    Raises:
      InputError: If the run was trained on other data or not evaluated on this split.
    """
    if workdir_lib.content_hash(workdir) != dataset.content_hash:
        raise InputError(f"--workdir={workdir}: the run was trained on other data than --data")
    paths = [
        os.path.join(workdir, "evaluation", f"{split}-{search}.json")
        for search in ("exact", "scann")
    ]
    path = next(filter(os.path.exists, paths), None)
    if path is None:
        raise InputError(
            f"{paths[0]}: not found; run: python -m vixml_jax.evaluate --workdir={workdir} "
            f"--split={split}"
        )
    remedy = "evaluate the run again"
    results = json_files.read(path, dict[str, Any], remedy)
    cost = _cost_of_training(os.path.join(workdir, "metrics.jsonl"))
    seconds = results["seconds"]
    phases = [seconds[name] for name in ("encode_queries", "search") if name in seconds]
    row = {**results, **cost, "predict s": sum(phases)}
    rows = {"this run": {column: row[column] for column in COLUMNS if column in row}}
    if "with_neighbours" in results:
        mixed = results["with_neighbours"]
        rows["this run" + evaluator.NEIGHBOURS] = {
            column: mixed[column] for column in COLUMNS if column in mixed
        }
    return rows


def _cost_of_training(path: str) -> dict[str, float]:
    """Seconds of all steps, and peak memory, from the lines of `metrics.jsonl`."""
    seconds, peak, last = 0.0, 0.0, 0
    try:
        with open(path, encoding="utf-8") as file:
            lines = [json.loads(line) for line in file]
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}; expected the metrics of a run") from None
    for line in lines:
        if "step_time/step_s" in line:
            seconds += (line["step"] - last) * line["step_time/step_s"]
            peak, last = max(peak, line["step_time/peak_memory_gib"]), line["step"]
    return {"train s": seconds, "peak GiB": peak}


def main(argv: Sequence[str]) -> None:
    """Runs the baselines and prints the table."""
    del argv
    values = flags.FLAGS
    if not values.data:
        raise InputError("--data: missing; expected the directory of a prepared data set")
    dataset = PreparedDataset.open(values.data)
    queries, _, pairs = dataset.split(values.split)
    names = chosen(values.baselines, dataset, values.pecos_python)
    of_run = rows_of_run(values.workdir, dataset, values.split) if values.workdir else {}
    k = min(K, dataset.num_labels)
    fetched = min(k + index_lib.over_fetch(pairs), dataset.num_labels)
    rows, notes = {}, []
    with tempfile.TemporaryDirectory(prefix="vixml-baselines-") as directory:
        start = time.perf_counter()
        write_inputs(directory, dataset, values.split, fetched)
        seconds = time.perf_counter() - start
        for name in names:
            console.status(f"{ROWS[name]}: training and predicting")
            found = run(name, directory, values.pecos_python)
            if found is not None:
                rows[ROWS[name]] = row_of(found, dataset, values.split, k)
                notes.append(f"{ROWS[name]}: {found['about']}")
    print(tables.format_table(rows | of_run, COLUMNS))
    print(
        f"{dataset.name}, {values.split}: {len(queries):,} queries, {dataset.num_labels:,} labels, "
        f"{len(dataset.train):,} training queries; TF-IDF of words and pairs of words took "
        f"{seconds:.1f} s more for the linear learners"
    )
    print("\n".join(notes))


def define_flags() -> None:
    """The flags of this benchmark."""
    text = flags.DEFINE_string
    text("data", "", "Directory of the prepared data set.")
    flags.DEFINE_enum("split", "test", ["test", "valid"], "Split to evaluate on.")
    flags.DEFINE_list("baselines", list(BASELINES), f"Baselines to run, of {', '.join(BASELINES)}.")
    text("pecos_python", "", "Python interpreter that has libpecos; empty: XR-Linear is left out.")
    text("workdir", "", "Run on the same data, whose results are shown beside the baselines.")


if __name__ == "__main__":
    command_line.launch(main, define_flags)
