"""The learners of the comparison with baselines: each trains and predicts in a process of its own.

    python learners.py NAME DIRECTORY

is what the comparison starts for each of them. PECOS needs an older numpy than this package, so
its interpreter is another, and nothing of this package is imported above the functions.

DIRECTORY has `settings.json` and, as sparse matrices of scipy, `train_features.npz`,
`train_labels.npz` and `features.npz` of the queries to predict. The labels found, and what they
cost, are written to `NAME.npz` in it.
"""

import importlib.metadata
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse

BEAM = 20  # Clusters kept per level in prediction; half of it costs Bonsai 4 points of R@100.
INTERPRETER = "python -m venv pecos && pecos/bin/pip install libpecos==1.2.8"


class Found(NamedTuple):
    """What a learner found for the queries.

    Attributes:
      ids: Labels of each query [q, k] int32, best first; short rows end in -1.
      train_s: Seconds of training; 0 if nothing is trained.
      predict_s: Seconds of predicting all queries.
      about: Version and settings, in words.
    """

    ids: np.ndarray
    train_s: float
    predict_s: float
    about: str


def xr_linear(directory: str, settings: dict[str, Any]) -> Found:
    """XR-Linear of PECOS (arXiv 2010.05878), with the defaults of its training command."""
    from pecos.xmc import Indexer, LabelEmbeddingFactory
    from pecos.xmc.xlinear.model import XLinearModel

    train, labels, queries = _matrices(directory)
    start = time.perf_counter()
    by_label = labels.tocsc()
    clusters = Indexer.gen(LabelEmbeddingFactory.create(by_label, train, method="pifa"))
    model = XLinearModel.train(train, by_label, C=clusters)
    trained = time.perf_counter()
    ranked = model.predict(queries, beam_size=BEAM, only_topk=settings["k"])
    predicted = time.perf_counter()
    version = importlib.metadata.version("libpecos")
    about = f"libpecos {version}, default settings, beam {BEAM}"
    return Found(_rank(ranked.tocsr(), settings["k"]), trained - start, predicted - trained, about)


def _rank(scores: sparse.csr_matrix, k: int) -> np.ndarray:
    """The columns of the largest entries of each row [q, k], best first, ties by column."""
    rows = np.repeat(np.arange(scores.shape[0]), np.diff(scores.indptr))
    order = np.lexsort((scores.indices, -scores.data, rows))
    rank = np.arange(len(order)) - scores.indptr[rows]  # `order` sorts within rows only.
    ids = np.full((scores.shape[0], k), -1, np.int32)
    ids[rows[rank < k], rank[rank < k]] = scores.indices[order][rank < k]
    return ids


def parabel(directory: str, settings: dict[str, Any]) -> Found:
    """Parabel (WWW 2018) as in omikuji: three balanced binary trees, its default."""
    return _omikuji(directory, settings["k"], {})


def bonsai(directory: str, settings: dict[str, Any]) -> Found:
    """Bonsai (arXiv 1904.08249) as in omikuji: three shallow trees of unbalanced clusters."""
    shape = {"cluster_balanced": False, "cluster_k": 100, "max_depth": 3}
    return _omikuji(directory, settings["k"], shape)


def _omikuji(directory: str, k: int, shape: dict[str, Any]) -> Found:
    import omikuji

    train, labels, queries = _matrices(directory)
    path = os.path.join(directory, "train.txt")
    _write_text(path, train, labels)
    parameters = omikuji.Model.default_hyper_param()
    for name, value in shape.items():
        setattr(parameters, name, value)
    start = time.perf_counter()
    model = omikuji.Model.train_on_data(path, parameters)
    trained = time.perf_counter()
    ids = np.full((queries.shape[0], k), -1, np.int32)
    for row in range(queries.shape[0]):
        entries = slice(queries.indptr[row], queries.indptr[row + 1])
        pairs = zip(queries.indices[entries].tolist(), queries.data[entries].tolist(), strict=True)
        found = [label for label, _ in model.predict(pairs, BEAM, k)]
        ids[row, : len(found)] = found
    predicted = time.perf_counter()
    settings = ", ".join(f"{name} {value}" for name, value in shape.items()) or "default settings"
    about = f"omikuji {importlib.metadata.version('omikuji')}, {settings}, beam {BEAM}"
    return Found(ids, trained - start, predicted - trained, about)


def _write_text(path: str, features: sparse.csr_matrix, labels: sparse.csr_matrix) -> None:
    """Writes the XML repository's sparse format, which omikuji reads."""
    with open(path, "w", encoding="ascii") as file:
        file.write(f"{features.shape[0]} {features.shape[1]} {labels.shape[1]}\n")
        for row in range(features.shape[0]):
            true = labels.indices[labels.indptr[row] : labels.indptr[row + 1]]
            entries = slice(features.indptr[row], features.indptr[row + 1])
            pairs = zip(features.indices[entries], features.data[entries], strict=True)
            words = [f"{column}:{value:.9g}" for column, value in pairs]
            # Without a space at the end, which omikuji does not accept.
            file.write(" ".join([",".join(map(str, true)), *words]) + "\n")


def knn_text(directory: str, settings: dict[str, Any]) -> Found:
    """The kNN baseline by text."""
    return _knn(settings, "text")


def knn_image(directory: str, settings: dict[str, Any]) -> Found:
    """The kNN baseline by images."""
    return _knn(settings, "image")


def knn_both(directory: str, settings: dict[str, Any]) -> Found:
    """The kNN baseline by text and images."""
    return _knn(settings, "both")


def _knn(settings: dict[str, Any], by: str) -> Found:
    from vixml_jax.data.store import PreparedDataset
    from vixml_jax.evaluation import knn_baseline

    dataset = PreparedDataset.open(settings["data"])
    start = time.perf_counter()
    found = knn_baseline.predict(dataset, split=settings["split"], by=by, k=settings["k"])
    about = f"labels of the 20 nearest training queries by {by}"
    return Found(found.ids, 0.0, time.perf_counter() - start, about)


LEARNERS: dict[str, Callable[[str, dict[str, Any]], Found]] = {
    "xr_linear": xr_linear,
    "parabel": parabel,
    "bonsai": bonsai,
    "knn_text": knn_text,
    "knn_image": knn_image,
    "knn_both": knn_both,
}


def _matrices(directory: str) -> list[sparse.csr_matrix]:
    """Training features, training labels and features of the queries, float32."""
    names = ("train_features", "train_labels", "features")
    paths = [os.path.join(directory, f"{name}.npz") for name in names]
    return [sparse.csr_matrix(sparse.load_npz(path), dtype=np.float32) for path in paths]


def _peak_bytes() -> int:
    """Peak memory of this process."""
    try:
        # Not getrusage, where a process counts the memory of the one that started it.
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main(name: str, directory: str) -> None:
    """Trains and predicts as `name`, and writes what was found."""
    with open(os.path.join(directory, "settings.json"), encoding="utf-8") as file:
        settings = json.load(file)
    found = LEARNERS[name](directory, settings)
    path = os.path.join(directory, f"{name}.npz")
    np.savez(path, peak_bytes=_peak_bytes(), **found._asdict())


if __name__ == "__main__":
    main(*sys.argv[1:])
