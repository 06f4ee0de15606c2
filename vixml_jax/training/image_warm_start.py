"""Initial image projection, regressed onto the token embeddings of the images' labels."""

import numpy as np
from jaxtyping import Float
from scipy import sparse

from vixml_jax.data.store import PreparedDataset, Ragged


def regress_images(
    dataset: PreparedDataset,
    token_embeddings: Float[np.ndarray, "w d"],
    *,
    ridge: float = 0.3,
    block: int = 8192,
) -> tuple[Float[np.ndarray, "v d"], Float[np.ndarray, " d"]] | None:
    """Kernel and bias that map an image embedding to the mean token embedding of its labels.

    The outputs of a random projection are noise to a pretrained tower, larger than its token
    embeddings. A ridge regression from each image of the training queries to the mean embedding of
    the tokens of their labels starts the projection inside the tower's input space. Predictions of
    a regression lie close to their mean, where all images look alike. So their deviations from the
    mean are scaled up to the size of those of token embeddings.

    Args:
      dataset: Training queries with images, and labels with tokens.
      token_embeddings: The tower's input embeddings.
      ridge: Penalty, as a fraction of the mean over image dimensions of the sum of squares.
      block: Images processed at a time.

    Returns:
      float32 kernel and bias; None if no training query has an image.
    """
    images = dataset.train.images
    if images is None or not len(images.values):
        return None
    labels = _mean_rows(dataset.labels.tokens, token_embeddings)
    counts = np.maximum(np.diff(dataset.train_relevance.indptr), 1)[:, None]
    targets = (dataset.train_relevance @ labels / counts).astype(np.float32)
    owners = np.repeat(np.arange(len(dataset.train)), np.diff(images.offsets))
    width, depth = images.values.shape[1], token_embeddings.shape[1]
    # Sums over images of [x, 1]^T [x, 1] and [x, 1]^T y, in float64.
    square, product = np.zeros((width + 1, width + 1)), np.zeros((width + 1, depth))
    for start in range(0, len(owners), block):
        x = np.asarray(images.values[start : start + block], np.float32)
        x = np.concatenate([x, np.ones((len(x), 1), np.float32)], axis=1)
        square += x.T @ x
        product += x.T @ targets[owners[start : start + block]]
    penalty = np.full(width + 1, ridge * np.trace(square[:-1, :-1]) / width)
    penalty[-1] = 0.0  # No penalty on the bias.
    solution = np.linalg.solve(square + np.diag(penalty), product)
    kernel, bias = solution[:-1], solution[-1]
    mean = square[-1, :-1] / square[-1, -1]  # Mean image embedding.
    covariance = square[:-1, :-1] / square[-1, -1] - np.outer(mean, mean)
    predicted_std = np.sqrt(max(np.trace(kernel.T @ covariance @ kernel), 1e-12))
    token_std = np.sqrt(np.var(token_embeddings, axis=0, dtype=np.float64).sum())
    scale = token_std / predicted_std
    bias = bias + mean @ kernel * (1.0 - scale)  # Keeps the mean prediction.
    return (kernel * scale).astype(np.float32), bias.astype(np.float32)


def _mean_rows(tokens: Ragged, rows: Float[np.ndarray, "w d"]) -> Float[np.ndarray, "n d"]:
    """Mean over each item's tokens of their rows.

    The first and the last token, which are special, are left out of items of more than two tokens.
    """
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
