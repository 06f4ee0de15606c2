"""Labels added without training: how well their queries find them.

    python -m vixml_jax.benchmarks.withheld --source=RAW --make=DIR [--share=0.1]
    (prepare and train DIR, and RAW, with the same settings)
    python -m vixml_jax.benchmarks.withheld --workdir=RUN --full=RUN_ON_ALL --rows=DIR/withheld.txt

The first command removes a fraction of the labels from a source in the XML repository's layout, and
training queries that have no other label. The second adds those labels to the run that never saw
them (`serving/cold_start.py`), by their texts only and with example queries, and evaluates all test
queries, beside the run that was trained on all labels. Of runs with a label head, it evaluates the
prototypes alone, the head alone, and both fused with the weights of the run.
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags
from jaxtyping import Float, Int
from scipy import sparse

from vixml_jax import command_line
from vixml_jax import workdir as workdir_lib
from vixml_jax.data.store import Items
from vixml_jax.errors import InputError
from vixml_jax.evaluation import metrics
from vixml_jax.search.exact import ExactIndex
from vixml_jax.search.fusion import Fusion, query_vectors
from vixml_jax.serving import cold_start
from vixml_jax.serving.predictor import Predictor
from vixml_jax.storage import atomic
from vixml_jax.structs import Queries

K = 100
ROWS = "withheld.txt"
# Example queries per label; None: all.
_NAMES = {0: "text only", 1: "1 example", 5: "5 examples", None: "all examples"}


def make(source: str, out: str, share: float, seed: int) -> Int[np.ndarray, " w"]:
    """Writes a source without some of its labels; returns and writes their rows.

    Args:
      source: Directory with lbl.raw.txt, and trn and tst with .raw.txt and _X_Y.txt.
      out: Directory to write.
      share: Fraction of the labels to remove.
      seed: Of the random choice.
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
            kept_labels = [
                row_of[[int(pair.split(":")[0]) for pair in row.split()]] for row in pairs
            ]
            kept_labels = [row[row >= 0] for row in kept_labels]
            kept = [i for i, row in enumerate(kept_labels) if len(row) or split == "tst"]
            _write(directory, f"{split}.raw.txt", [texts[i] for i in kept])
            rows = [" ".join(f"{label}:1" for label in kept_labels[i]) for i in kept]
            _write(directory, f"{split}_X_Y.txt", [f"{len(kept)} {len(stay)}", *rows])
        filters = os.path.join(source, "filter_labels_test.txt")
        if os.path.exists(filters):
            raise InputError(
                f"{filters}: this benchmark does not support sources with filter pairs"
            )
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
    """At most `most` training queries of a label, drawn at random."""
    rows = relevance.indices[relevance.indptr[label] : relevance.indptr[label + 1]]
    return rows if most is None else np.sort(rng.permutation(rows)[:most])


def measure(
    vectors: Float[np.ndarray, "l w"],
    queries: Float[np.ndarray, "q w"],
    relevance: sparse.csr_matrix,
    gone: Int[np.ndarray, " w"],
) -> tuple[float, float, float, float]:
    """R@100 and P@1 with only the withheld labels as true labels, then R@100 and P@5 with all.

    All labels are searched in either case. The values with all labels fall where withheld labels
    displace others.

    Args:
      vectors: Vectors of all labels, as they are searched.
      queries: Vectors of the test queries, likewise.
      relevance: [test queries, labels].
      gone: Rows of the withheld labels.
    """
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
    return found[name], found["P@1"], everywhere[name], everywhere["P@5"]


def compare(
    workdir: str, full: str, gone: Int[np.ndarray, " w"], seed: int, data: Sequence[str] = ("", "")
) -> dict[str, tuple[float, float, float, float]]:
    """The results of `measure`, by how the withheld labels were added and what is searched.

    Args:
      workdir: Run trained without the labels.
      full: Run trained with them.
      gone: Their rows among all labels.
      seed: Of the choice of examples.
      data: Prepared data of both runs, if they have moved.

    Raises:
      InputError: If the runs do not have the same labels.
    """
    complete = workdir_lib.open_dataset(workdir_lib.read_config(full, data=data[1]))
    predictor = Predictor.load(workdir, data=data[0], warm=False)
    everything = Predictor.load(full, data=data[1], warm=False)
    total = complete.num_labels
    if len(predictor.artifacts.ids) != total - len(gone) or gone.max(initial=0) >= total:
        raise InputError(
            f"--workdir={workdir}: has {len(predictor.artifacts.ids)} labels, expected "
            f"{total - len(gone)}: those of --full={full} without {len(gone)} withheld ones"
        )
    stay = np.setdiff1d(np.arange(total), gone)
    relevance, by_label = complete.test_relevance, complete.train_relevance.tocsc()
    queries, train = (
        encode(predictor, items, title)
        for items, title in ((complete.test, "test queries"), (complete.train, "training queries"))
    )
    texts = [complete.labels.texts[row] for row in gone]
    alone, rng, found = predictor.encode(texts), np.random.default_rng(seed), {}

    def measure_all(name: str, one: Predictor, vectors: Any, queries: Any) -> None:
        for how, searched in search_vectors(one, queries).items():
            found[name + how] = measure(vectors, searched, relevance, gone)

    for most in _NAMES:
        chosen = [train.at(examples_of(by_label, label, most, rng)) for label in gone]
        vectors = np.empty((total, predictor.label_width), np.float32)
        vectors[stay] = predictor.label_vectors(np.arange(len(stay)))
        vectors[gone] = cold_start.with_examples(predictor, texts, None, alone, chosen)
        measure_all(_NAMES[most], predictor, vectors, queries)
    queries = encode(everything, complete.test, "test queries")
    vectors = everything.label_vectors(np.arange(total))
    measure_all("trained on all", everything, vectors, queries)
    return found


def encode(predictor: Predictor, items: Items, title: str) -> Queries:
    """Encodes items of the prepared data as queries."""
    vectors = predictor.model.encode_queries(predictor.params, items, block=512, title=title).values
    if predictor.fusion is None:
        return Queries(vectors)
    return Queries(vectors, predictor.head_queries(vectors, items.tokens))


def search_vectors(predictor: Predictor, queries: Queries) -> dict[str, Float[np.ndarray, "q w"]]:
    """Returns the vectors that queries are searched with, by the suffix of the row's name.

    Args:
      predictor: Of the run. If it has a label head, prototypes and head are also searched alone.
      queries: From `encode`.
    """
    if predictor.fusion is None:
        return {"": queries.vectors}
    weights = {
        ", prototypes": Fusion(1.0, 0.0), ", head": Fusion(0.0, 1.0), ", fused": predictor.fusion,
    }  # fmt: skip
    return {name: query_vectors(*queries, x) for name, x in weights.items()}


def main(argv: Sequence[str]) -> None:
    """Writes the source, or prints the table."""
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
    width = max(20, *map(len, found))
    print(f"{'withheld labels':{width}}{'R@100':>8}{'P@1':>8}{'R@100, P@5, all labels':>24}")
    for name, (recall, precision, all_recall, all_precision) in found.items():
        print(f"{name:{width}}{recall:8.2f}{precision:8.2f}{all_recall:16.2f}{all_precision:8.2f}")


def define_flags() -> None:
    """The flags of this benchmark."""
    text = flags.DEFINE_string
    text("source", "", "Source to withhold labels from.")
    text("make", "", "Directory to write the reduced source to; empty: compare runs.")
    flags.DEFINE_float(
        "share", 0.1, "Fraction of the labels to withhold.", lower_bound=0, upper_bound=1
    )
    flags.DEFINE_integer("seed", 0, "Seed of the choice of labels and examples.")
    text("workdir", "", "Run trained without the withheld labels.")
    text("full", "", "Run trained on all labels.")
    text("rows", "", "File with the rows of the withheld labels, one per line.")
    text("data", "", "Prepared data of --workdir, if they have moved.")
    text("full_data", "", "Prepared data of --full, if they have moved.")


if __name__ == "__main__":
    command_line.launch(main, define_flags)
