"""Training batches of an epoch, prepared ahead by grain's threads; resumable at any batch."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from vixml_jax.data import packing, sampling
from vixml_jax.data.store import PreparedDataset
from vixml_jax.structs import Batch, HeadBatch

# From rows of the training set [b] to the tokens of their texts [b t]; -1 in both is padding.
ReadWords = Callable[[Int[np.ndarray, " b"]], Int[np.ndarray, "b t"]]


def epoch_batches(
    dataset: PreparedDataset,
    order: Int[np.ndarray, " n"],
    *,
    epoch: int,
    seed: int,
    batch_size: int,
    width: int,
    layout: packing.Layout,
    weights: Float[np.ndarray, " l"] | None,
    rows: packing.RowSizes,
    all_positives: bool = False,
    read_words: ReadWords | None = None,
    image_dropout: float = 0.0,
    shards: int = 1,
    read: Sequence[int] | None = None,
    num_threads: int = 1,
    prefetch: int = 4,
) -> Any:
    """Returns a grain iterator over the batches of one epoch, with `get_state` and `set_state`.

    A batch is a pure function of seed, epoch, its index and the order. The last batch is padded
    with ids -1.

    Args:
      dataset: Training queries, labels and relevance. Its `train_weights` are used when positives
        are sampled.
      order: Rows of the queries, in the order in which they are read.
      epoch: Number of the epoch, for the random draws.
      seed: Seed of the random draws.
      batch_size: Queries of a batch, and labels of a batch.
      width: Positions of a packed row.
      layout: How an item is written.
      weights: Weight of each label when positives are sampled; None: all weights are equal.
      rows: Possible numbers of rows of a shard, queries and labels together.
      all_positives: Whether batches hold all labels of their queries, because steps train a label
        head; otherwise those among the labels of the batch.
      read_words: Returns the tokens of queries that the label head reads; None: it reads none.
      image_dropout: Probability that the images of an item are left out of a batch.
      shards: Number of shards of a batch. Each has the same number of items, about the same number
        of tokens, and rows of its own; the batch is padded with ids -1 to a multiple. Batches
        depend on the number of shards, not on the number of devices.
      read: The shards to return, ascending; None: all. Of the others only lengths and labels are
        read.
      num_threads: Threads that prepare batches.
      prefetch: Batches kept ready ahead.
    """
    read = range(shards) if read is None else read
    size = -(-batch_size // shards) * shards
    counts = np.diff(dataset.train_relevance.indptr)
    usual = sampling.usual_positives(counts, batch_size, shards)

    def make(index: int) -> Batch:
        rng = np.random.default_rng((seed, epoch, index))
        query_ids = np.full(size, -1, np.int32)
        real = order[index * batch_size : (index + 1) * batch_size]
        query_ids[: len(real)] = real
        label_ids = sampling.sample_positives(
            dataset.train_relevance, query_ids, weights, rng, dataset.train_weights
        )
        hidden = rng.random((2, size)) < image_dropout
        sides = (dataset.train, dataset.labels)
        lengths = (
            packing.item_lengths(items, ids, width=width, layout=layout, hidden=hide)
            for items, ids, hide in zip(sides, (query_ids, label_ids), hidden, strict=True)
        )
        balanced = packing.balance(sum(lengths), shards)
        query_ids, label_ids, hidden = query_ids[balanced], label_ids[balanced], hidden[:, balanced]
        queries, labels = (
            packing.pack(
                items, ids, width=width, layout=layout, blocks=shards, read=read, hidden=hide
            )
            for items, ids, hide in zip(sides, (query_ids, label_ids), hidden, strict=True)
        )
        items = packing.join(queries, labels, size, rows=rows, blocks=len(read))
        local = np.arange(size).reshape(shards, -1)[np.asarray(read)].reshape(-1)
        among = None if all_positives else label_ids
        positives = sampling.positives_of(
            dataset.train_relevance, query_ids, usual, shards, read, among
        )
        tokens = read_words and read_words(query_ids[local])
        return Batch(items, query_ids[local], label_ids[local], positives, tokens)

    return _iterator(make, -(-len(order) // batch_size), num_threads, prefetch)


def head_batches(
    relevance: sparse.csr_matrix,
    order: Int[np.ndarray, " n"],
    *,
    batch_size: int,
    positives: int,
    read_words: ReadWords | None = None,
    shards: int = 1,
    read: Sequence[int] | None = None,
    num_threads: int = 1,
    prefetch: int = 4,
) -> Any:
    """Returns an iterator over the batches of an epoch of the label head, as `epoch_batches` does.

    Args:
      relevance: Relevance matrix of the training queries.
      order: Rows of the queries, in the order in which they are read.
      batch_size: Queries of a batch.
      positives: Usual number of labels of all queries of a shard; see `sampling.positives_of`.
      read_words, shards: See `epoch_batches`, also for the other arguments.
    """
    read = range(shards) if read is None else read
    size = -(-batch_size // shards) * shards

    def make(index: int) -> HeadBatch:
        query_ids = np.full(size, -1, np.int32)
        real = order[index * batch_size : (index + 1) * batch_size]
        query_ids[: len(real)] = real
        local = query_ids.reshape(shards, -1)[np.asarray(read)].reshape(-1)
        labels = sampling.positives_of(relevance, query_ids, positives, shards, read)
        return HeadBatch(local, labels, read_words and read_words(local))

    return _iterator(make, -(-len(order) // batch_size), num_threads, prefetch)


def _iterator(make: Callable[[int], Any], num_batches: int, num_threads: int, prefetch: int) -> Any:
    """A grain iterator over the batches that `make` returns by index, prepared ahead."""
    import grain

    batches = grain.MapDataset.range(num_batches).map(make)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
    return iter(batches.to_iter_dataset(options))
