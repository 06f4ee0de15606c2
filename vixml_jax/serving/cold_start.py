"""Cold start of labels: vectors of new labels without training, from text and example queries."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from vixml_jax.errors import InputError
from vixml_jax.labels.head import SCALE
from vixml_jax.search import fusion
from vixml_jax.search.fusion import HeadRows
from vixml_jax.serving import artifacts as artifacts_lib
from vixml_jax.serving import label_updates
from vixml_jax.serving.predictor import Predictor
from vixml_jax.structs import Queries

NUM_NEAREST = 10  # Labels of the run whose mean centroid is the prior of a new label's centroid.
PRIOR_COUNT = 3.0  # Weight of what is known without examples, in example queries.
_BLOCK = 256  # New labels compared at a time.
_LARGEST_BIAS, _STEPS = 100.0, 50  # Bounds of a bias, and halvings of the interval between them.


def add_labels(
    predictor: Predictor,
    ids: Sequence[str],
    texts: Sequence[str],
    images: Sequence[Any] | None,
    examples: Sequence[Sequence[str]],
) -> str:
    """Adds labels to the run of a predictor, which finds them after its next `refresh`.

    Args:
      predictor, texts, images, examples: See `label_vectors`.
      ids: Of the labels.

    Returns:
      The directory of the label update.

    Raises:
      InputError: If the run has a label with one of these ids, or they are malformed.
    """
    vectors = label_vectors(predictor, texts, images, examples)
    return label_updates.add(predictor.workdir, predictor.artifacts, ids, texts, vectors)


def label_vectors(
    predictor: Predictor,
    texts: Sequence[str],
    images: Sequence[Any] | None = None,
    examples: Sequence[Sequence[str]] | None = None,
) -> Float[np.ndarray, "m w"]:
    """Returns vectors of new labels, which are searched together with the labels of the run.

    Args:
      predictor: Of the run.
      texts: Texts of the labels.
      images: Embeddings of their images, as a predictor takes them.
      examples: Texts of queries for which each label is relevant; may be empty. Blank ones are
        left out.

    Raises:
      InputError: If there are not as many lists of examples as texts, or one is a text.
    """
    if examples is not None and len(examples) != len(texts):
        raise InputError(f"{len(examples)} lists of example queries, expected {len(texts)}")
    for label, queries in enumerate(examples or ()):
        if isinstance(queries, str):
            raise InputError(
                f"label {label}: its example queries are the text {queries[:40]!r}, expected a "
                "list of texts"
            )
    vectors = predictor.encode(texts, images)
    given = [[x for x in queries if x.strip()] for queries in examples or [[]] * len(texts)]
    counts = [len(queries) for queries in given]
    encoded = predictor.queries([query for queries in given for query in queries])
    ends = np.cumsum(counts)
    of_label = [encoded.at(slice(a, b)) for a, b in zip(ends - counts, ends, strict=True)]
    return with_examples(predictor, texts, images, vectors, of_label)


def with_examples(
    predictor: Predictor,
    texts: Sequence[str],
    images: Sequence[Any] | None,
    vectors: Float[np.ndarray, "m e"],
    examples: Sequence[Queries],
) -> Float[np.ndarray, "m w"]:
    """Returns the vectors of new labels as they are searched.

    They are prototypes; in a run with a label head, fused with rows of the head.

    Args:
      predictor: Of the run.
      texts, images: Of the labels; see `label_vectors`.
      vectors: The tower's unit vectors of the labels.
      examples: The example queries of each label, which may have none.
    """
    found = prototypes(predictor, texts, images, vectors, examples)
    if predictor.head_rows is None:
        return found
    return fusion.label_vectors(found, head_rows(predictor, vectors, examples))


def prototypes(
    predictor: Predictor,
    texts: Sequence[str],
    images: Sequence[Any] | None,
    vectors: Float[np.ndarray, "m e"],
    examples: Sequence[Queries],
) -> Float[np.ndarray, "m e"]:
    """Returns unit prototypes of new labels; without examples, the tower's vectors.

    The combiner takes two inputs that training would have learnt: a free vector, here that of the
    nearest label's cluster, and a centroid. The centroid is the mean of the vectors of the example
    queries, as it is the mean of training queries for the run's labels, but shrunk towards the mean
    centroid of the nearest labels, the more so the fewer examples there are: hardly any other query
    lies near the vector of a single one.

    Args:
      predictor, texts, images, vectors, examples: See `with_examples`.
    """
    counts = np.array([len(queries.vectors) for queries in examples], np.float32)
    rows = np.flatnonzero(counts)
    if predictor.model.combiner is None or not len(rows):
        return vectors
    nearest = predictor.nearest_labels(vectors[rows], NUM_NEAREST)
    free, centroids = predictor.free_and_centroids(nearest)
    means = np.stack([examples[row].vectors.mean(axis=0) for row in rows])
    weights = (counts / (counts + PRIOR_COUNT))[rows, None]
    result = vectors.copy()
    result[rows] = predictor.prototypes(
        [texts[row] for row in rows],
        None if images is None else [images[row] for row in rows],
        free[:, 0],
        weights * means + (1 - weights) * centroids.mean(axis=1),
    )
    return result


def head_rows(
    predictor: Predictor,
    vectors: Float[np.ndarray, "m e"],
    examples: Sequence[Queries],
) -> HeadRows:
    """Returns what is searched of new labels beside their prototypes.

    The vector starts where training starts it, at the tower's vector of the label, and moves
    towards the vectors g of the example queries, which it is to have large inner products with. It
    is their mean, in which the tower's vector counts as `PRIOR_COUNT` examples.

    Training would then lower the logits of the label for all other queries. In its place the bias
    is set such that the mean probability of the label over the training queries is what it is for
    the labels of the run: its share of all pairs of a query and a label. The number of its pairs is
    that of its examples, but at least that of a label of the run on average. It also counts as its
    number of training queries.

    Args:
      predictor: Of a run with a label head.
      vectors, examples: See `with_examples`.
    """
    counts = np.array([len(queries.vectors) for queries in examples])
    sums = np.array([queries.head.sum(axis=0) for queries in examples]).reshape(vectors.shape)
    rows = (sums + PRIOR_COUNT * vectors) / (counts[:, None] + PRIOR_COUNT)
    pairs = predictor.artifacts.train_relevance.nnz
    own = np.maximum(counts, pairs / len(predictor.artifacts.ids))
    log_count = np.log1p(own).astype(np.float32)
    return HeadRows(rows, _biases(predictor, rows, own / (pairs + own)), log_count)


def _biases(
    predictor: Predictor, rows: Float[np.ndarray, "m e"], share: Float[np.ndarray, " m"]
) -> Float[np.ndarray, " m"]:
    """Returns the biases with which labels get a mean probability over the training queries.

    The probability of a label is that beside the labels of the run, by the head alone.

    Args:
      predictor: Of the run.
      rows: Vectors of the labels in the head.
      share: Mean probability of each label, in (0, 1).
    """
    artifacts = predictor.artifacts
    chosen = artifacts_lib.sample_rows(len(artifacts.train_vectors))
    g = predictor.head_queries(artifacts.train_vectors[chosen], artifacts.sample_tokens)
    log_sum = predictor.head_log_sum(g).astype(np.float64)
    g, rows = predictor.prefix.queries(g), rows[:, : predictor.prefix.used]  # As they are searched.
    biases = np.empty(len(rows), np.float32)
    for start in range(0, len(rows), _BLOCK):
        block = slice(start, start + _BLOCK)
        log_odds = SCALE * rows[block].astype(np.float64) @ g.T - log_sum  # With bias 0.
        low = np.full(len(log_odds), -_LARGEST_BIAS)
        high = -low
        for _ in range(_STEPS):  # The mean probability grows with the bias.
            middle = (low + high) / 2
            probability = 1.0 / (1.0 + np.exp(-(log_odds + middle[:, None])))
            is_low = probability.mean(axis=1) < share[block]
            low, high = np.where(is_low, middle, low), np.where(is_low, high, middle)
        biases[block] = low
    return biases
