"""Store and order to host batches through grain: threads prepare ahead, a run can resume inside."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from vixml_jax.data import packing, sampling
from vixml_jax.data.store import PreparedDataset
from vixml_jax.structs import Batch


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
    image_dropout: float = 0.0,
    shares: int = 1,
    read: Sequence[int] | None = None,
    num_threads: int = 1,
    prefetch: int = 2,
) -> Any:
    """A grain iterator over the batches of one epoch, with `get_state` and `set_state`.

    A batch is a pure function of seed, epoch, its index and the order. The last one is filled up
    with ids -1.

    Args:
      dataset: Training queries, labels and relevance; its `train_weights` count when positives
        are drawn.
      order: The queries, in the order in which they are read.
      epoch: Goes into the draws.
      seed: Goes into the draws.
      batch_size: Queries of a batch, and labels.
      width: Positions of a packed row.
      layout: Of an item.
      weights: What positives are drawn by; None: uniform.
      rows: Of a batch's share, queries and labels together.
      image_dropout: Share of the items, drawn anew each time, whose pictures are hidden.
      shares: Equal parts of a batch, about equally long, each in rows of its own; a batch is filled
        up with ids -1 to a multiple of them. The packing hangs on them, not on the devices.
      read: The shares that are wanted, ascending; None: all. Of the others only lengths and labels
        are read.
      num_threads: That prepare batches.
      prefetch: Batches ready ahead.
    """
    import grain

    read = range(shares) if read is None else read
    size = -(-batch_size // shares) * shares

    def make(index: int) -> Batch:
        rng = np.random.default_rng((seed, epoch, index))
        query_ids = np.full(size, -1, np.int32)
        found = order[index * batch_size : (index + 1) * batch_size]
        query_ids[: len(found)] = found
        label_ids = sampling.sample_positives(
            dataset.train_relevance, query_ids, weights, rng, dataset.train_weights
        )
        hidden = rng.random((2, size)) < image_dropout
        sides = (dataset.train, dataset.labels)
        lengths = (
            packing.item_lengths(items, ids, width=width, layout=layout, hidden=hide)
            for items, ids, hide in zip(sides, (query_ids, label_ids), hidden, strict=True)
        )
        dealt = packing.deal(sum(lengths), shares)
        query_ids, label_ids, hidden = query_ids[dealt], label_ids[dealt], hidden[:, dealt]
        queries, labels = (
            packing.pack(
                items, ids, width=width, layout=layout, blocks=shares, read=read, hidden=hide
            )
            for items, ids, hide in zip(sides, (query_ids, label_ids), hidden, strict=True)
        )
        items = packing.join(queries, labels, size, rows=rows, blocks=len(read))
        mine = np.arange(size).reshape(shares, -1)[np.asarray(read)].reshape(-1)
        relevance = sampling.relevance_block(dataset.train_relevance, query_ids[mine], label_ids)
        return Batch(items, query_ids[mine], label_ids[mine], relevance)

    batches = grain.MapDataset.range(-(-len(order) // batch_size)).map(make)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
    return iter(batches.to_iter_dataset(options))
