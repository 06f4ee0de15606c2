"""A gentle start for the image projection: pictures first speak in the words of their labels."""

import numpy as np
from jaxtyping import Float
from scipy import sparse

from vixml_jax.data.store import PreparedDataset, Ragged


def regress_images(
    dataset: PreparedDataset,
    word_embeddings: Float[np.ndarray, "w d"],
    *,
    ridge: float = 0.3,
    block: int = 8192,
) -> tuple[Float[np.ndarray, "v d"], Float[np.ndarray, " d"]] | None:
    """Kernel and bias that map an image embedding to the mean word embedding of its labels.

    A freshly drawn projection is noise to a pretrained tower, and its loudest tokens. The ridge
    regression from each picture of the training queries to the mean word embedding of their
    labels' tokens starts it inside the space that the tower reads. What a regression predicts lies
    close to its mean, where all pictures look alike: deviations are scaled up to be as large as
    those of words.

    Args:
      dataset: Training queries with pictures, and labels with tokens.
      word_embeddings: The tower's input embeddings.
      ridge: Penalty, as a share of the mean variance of an image dimension.
      block: Pictures taken at a time.

    Returns:
      float32 kernel and bias; None if no training query has a picture.
    """
    images = dataset.train.images
    if images is None or not len(images.values):
        return None
    labels = _mean_rows(dataset.labels.tokens, word_embeddings)
    counts = np.maximum(np.diff(dataset.train_relevance.indptr), 1)[:, None]
    targets = (dataset.train_relevance @ labels / counts).astype(np.float32)
    owners = np.repeat(np.arange(len(dataset.train)), np.diff(images.offsets))
    width, depth = images.values.shape[1], word_embeddings.shape[1]
    # Sums over pictures of [x, 1]^T [x, 1] and [x, 1]^T y, in float64.
    square, product = np.zeros((width + 1, width + 1)), np.zeros((width + 1, depth))
    for start in range(0, len(owners), block):
        x = np.asarray(images.values[start : start + block], np.float32)
        x = np.concatenate([x, np.ones((len(x), 1), np.float32)], axis=1)
        square += x.T @ x
        product += x.T @ targets[owners[start : start + block]]
    penalty = np.full(width + 1, ridge * np.trace(square[:-1, :-1]) / width)
    penalty[-1] = 0.0  # The bias is free.
    solution = np.linalg.solve(square + np.diag(penalty), product)
    kernel, bias = solution[:-1], solution[-1]
    mean = square[-1, :-1] / square[-1, -1]  # Of the pictures.
    covariance = square[:-1, :-1] / square[-1, -1] - np.outer(mean, mean)
    spread = np.sqrt(max(np.trace(kernel.T @ covariance @ kernel), 1e-12))
    wanted = np.sqrt(np.var(word_embeddings, axis=0, dtype=np.float64).sum())
    bias = bias + mean @ kernel * (1.0 - wanted / spread)  # The mean stays where it is.
    return (kernel * (wanted / spread)).astype(np.float32), bias.astype(np.float32)


def _mean_rows(tokens: Ragged, rows: Float[np.ndarray, "w d"]) -> Float[np.ndarray, "n d"]:
    """Mean row of each item's tokens, without its first and last (special) token where it has
    more than two."""
    offsets = np.asarray(tokens.offsets)
    lengths = np.diff(offsets)
    keep = np.ones(len(tokens.values), bool)
    inner = lengths > 2
    keep[offsets[:-1][inner]] = False
    keep[offsets[1:][inner] - 1] = False
    owner = np.repeat(np.arange(len(lengths)), lengths)[keep]
    counts = sparse.csr_matrix(
        (np.ones(len(owner), np.float32), (owner, np.asarray(tokens.values)[keep])),
        shape=(len(lengths), len(rows)),
    )
    return (counts @ rows) / np.maximum(np.asarray(counts.sum(axis=1)), 1.0)
