"""Labels of the queries of a batch: against loops over the relevance matrix."""

import numpy as np
import pytest
from scipy import sparse

from vixml_jax.data import input_pipeline, sampling


def random_relevance(rng, queries=60, labels=40):
    counts = rng.integers(1, 9, queries)
    rows = np.repeat(np.arange(queries), counts)
    columns = np.concatenate([rng.choice(labels, n, replace=False) for n in counts])
    return sparse.csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), (queries, labels))


def pairs_of(query_ids, relevance):
    """(index of a query in the batch, label) of all pairs, from the relevance matrix."""
    return {
        (index, int(label))
        for index, row in enumerate(query_ids)
        if row >= 0
        for label in relevance[row].indices
    }


@pytest.mark.parametrize("shards", [1, 4])
def test_positives_are_all_labels_of_the_queries(shards):
    rng = np.random.default_rng(shards)
    relevance = random_relevance(rng)
    for usual in (8, 64):
        query_ids = rng.choice(60, 16, replace=False).astype(np.int32)
        query_ids[[3, 14]] = -1
        found = sampling.positives_of(relevance, query_ids, usual, shards)
        queries, labels = (x.reshape(shards, -1) for x in found)
        np.testing.assert_array_equal(queries >= 0, labels >= 0)
        real = queries >= 0
        assert set(zip(queries[real], labels[real], strict=True)) == pairs_of(query_ids, relevance)
        assert real.sum() == relevance[query_ids[query_ids >= 0]].nnz
        # Each shard has the labels of its own queries; the size is the usual one, doubled.
        part = 16 // shards
        shard = np.broadcast_to(np.arange(shards)[:, None], queries.shape)
        np.testing.assert_array_equal(queries[real] // part, shard[real])
        size = queries.shape[1]
        assert size % usual == 0 and (size // usual).bit_count() == 1
        assert size == usual or real.sum(axis=1).max() > size // 2
        # A process that reads some shards gets just their parts.
        some = sampling.positives_of(relevance, query_ids, usual, shards, [shards - 1])
        np.testing.assert_array_equal(some.labels, labels[-1])
        np.testing.assert_array_equal(some.queries, queries[-1])
        # Only some labels are listed: in the same order, in the smallest size that fits.
        among = rng.integers(-1, 40, 12)
        few = sampling.positives_of(relevance, query_ids, 8, shards, among=among)
        few = np.stack(few).reshape(2, shards, -1)
        kept = np.isin(labels, among) & real
        for shard in range(shards):
            pairs = np.stack([queries[shard], labels[shard]])[:, kept[shard]]
            np.testing.assert_array_equal(few[:, shard, : pairs.shape[1]], pairs)
            assert (few[:, shard, pairs.shape[1] :] == -1).all()
        assert few.shape[2] == 8 or kept.sum(axis=1).max() > few.shape[2] // 2


def test_few_batches_have_more_positives_than_usual():
    rng = np.random.default_rng(0)
    relevance = random_relevance(rng, 2000, 300)
    counts = np.diff(relevance.indptr)
    usual = sampling.usual_positives(counts, 256, 8)
    assert usual % 8 == 0 and counts.mean() * 32 < usual < 1.6 * counts.mean() * 32
    sizes = {
        len(sampling.positives_of(relevance, rng.permutation(2000)[:256], usual, 8).labels)
        for _ in range(100)
    }
    assert sizes == {8 * usual}


def test_head_batches_hold_every_query_once_and_resume():
    rng = np.random.default_rng(1)
    relevance, order = random_relevance(rng), rng.permutation(60)

    def batches():
        return input_pipeline.head_batches(
            relevance, order, batch_size=22, positives=24, shards=4, num_threads=2
        )

    found = list(batches())
    assert [len(batch.query_ids) for batch in found] == [24] * 3  # Padded to four shards.
    ids = np.concatenate([batch.query_ids for batch in found])
    np.testing.assert_array_equal(ids[ids >= 0], order)
    for batch in found:
        real = batch.positives.queries >= 0
        pairs = set(zip(batch.positives.queries[real], batch.positives.labels[real], strict=True))
        assert pairs == pairs_of(batch.query_ids, relevance)
    iterator = batches()
    next(iterator)
    state = iterator.get_state()
    resumed = batches()
    resumed.set_state(state)
    for batch, same in zip(found[1:], resumed, strict=True):
        np.testing.assert_array_equal(batch.query_ids, same.query_ids)
        np.testing.assert_array_equal(batch.positives.labels, same.positives.labels)
    read = input_pipeline.head_batches(
        relevance, order, batch_size=22, positives=24, shards=4, read=[1, 3]
    )
    for batch, part in zip(found, read, strict=True):
        own = batch.query_ids.reshape(4, -1)[[1, 3]].reshape(-1)
        np.testing.assert_array_equal(part.query_ids, own)
        expected = batch.positives.labels.reshape(4, -1)[[1, 3]].reshape(-1)
        np.testing.assert_array_equal(part.positives.labels, expected)
