"""New labels without training: how many of their queries find them.

    python -m vixml_jax.benchmarks.withheld --source=RAW --make=DIR [--share=0.1]
    (prepare and train DIR, and RAW, with the same settings)
    python -m vixml_jax.benchmarks.withheld --workdir=RUN --full=RUN_ON_ALL --rows=DIR/withheld.txt

The first takes a share of the labels out of a source in the files of the Extreme Classification
Repository, and training queries that have no other. The second adds those labels to the run that
never saw them (`serving.placing`), by their texts alone and with examples, training queries that
were theirs, and asks all test queries; beside it the run that was trained on all labels.
"""

import os
from collections.abc import Sequence

import numpy as np
from absl import flags
from jaxtyping import Float, Int
from scipy import sparse

from vixml_jax import errors
from vixml_jax import workdir as workdir_lib
from vixml_jax.errors import InputError
from vixml_jax.evaluation import metrics
from vixml_jax.search.exact import ExactIndex
from vixml_jax.serving import cold_start
from vixml_jax.serving.predictor import Predictor
from vixml_jax.storage import atomic

K = 100
ROWS = "withheld.txt"
# Of a label; None: all.
_NAMES = {0: "text only", 1: "1 example", 5: "5 examples", None: "all examples"}


def make(source: str, out: str, share: float, seed: int) -> Int[np.ndarray, " w"]:
    """Writes a source without some labels; returns and writes their rows.

    Args:
      source: Directory with lbl.raw.txt, and trn and tst with .raw.txt and _X_Y.txt.
      out: Directory to write.
      share: Of the labels.
      seed: Draws them.
    """
    labels = _lines(source, "lbl.raw.txt")
    count = round(len(labels) * share)
    gone = np.sort(np.random.default_rng(seed).permutation(len(labels))[:count])
    stay = np.setdiff1d(np.arange(len(labels)), gone)
    row_of = np.full(len(labels), -1)
    row_of[stay] = np.arange(len(stay))
    with atomic.directory(out) as directory:
        _write(directory, "lbl.raw.txt", [labels[row] for row in stay])
        _write(directory, ROWS, map(str, gone))
        for split in ("trn", "tst"):
            texts, (_, *pairs) = _lines(source, f"{split}.raw.txt"), _lines(
                source, f"{split}_X_Y.txt"
            )  # fmt: skip
            own = [row_of[[int(pair.split(":")[0]) for pair in row.split()]] for row in pairs]
            own = [row[row >= 0] for row in own]
            kept = [i for i, row in enumerate(own) if len(row) or split == "tst"]
            _write(directory, f"{split}.raw.txt", [texts[i] for i in kept])
            rows = [" ".join(f"{label}:1" for label in own[i]) for i in kept]
            _write(directory, f"{split}_X_Y.txt", [f"{len(kept)} {len(stay)}", *rows])
        filters = os.path.join(source, "filter_labels_test.txt")
        if os.path.exists(filters):
            raise InputError(f"{filters}: sources with filter pairs are not supported here")
    return gone


def _lines(directory: str, name: str) -> list[str]:
    with open(os.path.join(directory, name), encoding="utf-8") as file:
        return file.read().removesuffix("\n").split("\n")


def _write(directory: str, name: str, lines: Sequence[str]) -> None:
    with open(os.path.join(directory, name), "w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)


def examples_of(
    relevance: sparse.csc_matrix, label: int, most: int | None, rng: np.random.Generator
) -> Int[np.ndarray, " n"]:
    """Training queries of a label, so many at most, drawn at random."""
    rows = relevance.indices[relevance.indptr[label] : relevance.indptr[label + 1]]
    return rows if most is None else np.sort(rng.permutation(rows)[:most])


def measure(
    vectors: Float[np.ndarray, "l e"],
    queries: Float[np.ndarray, "q e"],
    relevance: sparse.csr_matrix,
    gone: Int[np.ndarray, " w"],
) -> tuple[float, float, float]:
    """R@100 and P@1 where the withheld labels alone are true and are searched among all; and R@100
    where all are true."""
    ids = ExactIndex(vectors).search(queries, min(K, len(vectors))).ids
    among = np.zeros(relevance.shape[1], np.float32)
    among[gone] = 1
    true = relevance.multiply(among[None]).tocsr()
    true.eliminate_zeros()
    some = np.flatnonzero(np.diff(true.indptr))
    ones = np.ones(relevance.shape[1])
    found = metrics.compute_metrics(ids[some], true[some], ones, recall_ks=(ids.shape[1],))
    everywhere = metrics.compute_metrics(ids, relevance, ones, recall_ks=(ids.shape[1],))
    name = f"R@{ids.shape[1]}"
    return found[name], found["P@1"], everywhere[name]


def compare(
    workdir: str, full: str, gone: Int[np.ndarray, " w"], seed: int, data: Sequence[str] = ("", "")
) -> dict[str, tuple[float, float, float]]:
    """What `measure` finds, by how the withheld labels came in.

    Args:
      workdir: Run without the labels.
      full: Run with them.
      gone: Their rows among all labels.
      seed: Draws examples.
      data: Prepared data of both, if they have moved.

    Raises:
      InputError: If the runs are not of the same labels.
    """
    complete = workdir_lib.open_dataset(workdir_lib.read_config(full, data=data[1]))
    predictor = Predictor.load(workdir, data=data[0], warm=False)
    everything = Predictor.load(full, data=data[1], warm=False)
    total = complete.num_labels
    if len(predictor.answers.ids) != total - len(gone) or gone.max(initial=0) >= total:
        raise InputError(
            f"--workdir={workdir}: has {len(predictor.answers.ids)} labels, expected "
            f"{total - len(gone)}: those of --full={full} without {len(gone)}"
        )
    stay = np.setdiff1d(np.arange(total), gone)
    queries, train = (
        predictor.model.encode_queries(predictor.params, items, block=512, title=title).values
        for items, title in ((complete.test, "test queries"), (complete.train, "training queries"))
    )
    relevance, by_label = complete.test_relevance, complete.train_relevance.tocsc()
    texts = [complete.labels.texts[row] for row in gone]
    alone, rng, found = predictor.encode(texts), np.random.default_rng(seed), {}
    for most in _NAMES:
        chosen = [train[examples_of(by_label, label, most, rng)] for label in gone]
        vectors = np.empty((total, queries.shape[1]), np.float32)
        vectors[stay] = predictor.answers.vectors
        vectors[gone] = cold_start.place_vectors(predictor, texts, None, alone, chosen)
        found[_NAMES[most]] = measure(vectors, queries, relevance, gone)
    queries = everything.model.encode_queries(
        everything.params, complete.test, block=512, title="test queries"
    ).values
    found["trained on all"] = measure(
        np.array(everything.answers.vectors), queries, relevance, gone
    )
    return found


def main(argv: Sequence[str]) -> None:
    """Makes the source, or prints the table."""
    del argv
    values = flags.FLAGS
    if values.make:
        gone = make(values.source, values.make, values.share, values.seed)
        print(f"{len(gone)} labels withheld: {values.make} ({ROWS} has their rows)")
        return
    with open(values.rows, encoding="utf-8") as file:
        gone = np.array([int(line) for line in file])
    data = values.data, values.full_data
    found = compare(values.workdir, values.full, gone, values.seed, data)
    print(f"{'withheld labels':20}{'R@100':>8}{'P@1':>8}{'R@100, all labels':>20}")
    for name, (recall, precision, everywhere) in found.items():
        print(f"{name:20}{recall:8.2f}{precision:8.2f}{everywhere:20.2f}")


def define_flags() -> None:
    """The flags of this benchmark."""
    text = flags.DEFINE_string
    text("source", "", "Source whose labels are withheld.")
    text("make", "", "Directory to write the source without them to; else runs are compared.")
    flags.DEFINE_float("share", 0.1, "Of the labels.", lower_bound=0, upper_bound=1)
    flags.DEFINE_integer("seed", 0, "Draws labels and examples.")
    text("workdir", "", "Run trained without them.")
    text("full", "", "Run trained on all.")
    text("rows", "", "Rows of the withheld labels, one a line.")
    text("data", "", "Prepared data of --workdir, if they have moved.")
    text("full_data", "", "Prepared data of --full, if they have moved.")


if __name__ == "__main__":
    define_flags()
    errors.launch(main)
