"""Exact search: inner products in blocks with a running top-k, label rows sharded over a mesh."""

import functools
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from vixml_jax.parallel import sharding
from vixml_jax.parallel.sharding import ROWS
from vixml_jax.runtime import processors
from vixml_jax.search import index, int8, top_k
from vixml_jax.search.index import Normalised
from vixml_jax.search.int8 import Int8Vectors
from vixml_jax.structs import SearchResult, Shard


class ExactIndex:
    """Scores every label in float32; only one block of scores exists at a time.

    Attributes:
      settings: The block sizes, and how many bytes the vector of a label takes.
      log_sum: "exact": `search_normalised` sums over all labels.
    """

    log_sum = "exact"

    def __init__(
        self,
        vectors: Float[np.ndarray, "n e"] | Int8Vectors | Shard,
        *,
        num_labels: int | None = None,
        query_block: int = 1024,
        label_block: int = 65536,
        mesh: Mesh | None = None,
    ):
        """Moves the vectors to the devices.

        Args:
          vectors: Label vectors; the id of a label is its row. With a mesh, a `Shard` holds only
            the rows of this process. `Int8Vectors` stay as they are, and blocks of them are
            converted to float32 one at a time.
          num_labels: Labels of all processes together; None: `vectors` holds all of them.
          query_block: Queries searched at a time.
          label_block: Labels scored at a time on each device; a block of scores takes
            4 * query_block * label_block bytes.
          mesh: Rows are sharded over its (replica, fsdp) axes; None: the default device holds all.
        """
        self.settings: dict[str, Any] = {
            "kind": "exact",
            "query_block": query_block,
            "label_block": label_block,
        }
        if not isinstance(vectors, Shard):
            vectors = Shard(np.arange(int8.num_rows(vectors)), vectors)
        if not isinstance(vectors.values, Int8Vectors):
            vectors = vectors._replace(values=np.asarray(vectors.values, np.float32))
        count = int8.num_rows(vectors.values)
        held = sum(x.nbytes for x in jax.tree.leaves(vectors.values))
        self.settings["bytes_per_label"] = held // max(1, count)
        self._num_labels = count if num_labels is None else num_labels
        self._query_block = query_block
        device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
        self._rows: _HostRows | _DeviceRows
        if device.platform == "cpu" and (mesh is None or mesh.size == 1):
            rows = jax.tree.map(lambda x: x[: self._num_labels], vectors.values)
            self._rows = _HostRows(rows, label_block)
        else:
            self._rows = _DeviceRows(vectors, self._num_labels, label_block, mesh)

    def search(
        self,
        queries: Float[np.ndarray, "q e"],
        k: int,
        removed: Int[np.ndarray, " r"] | None = None,
    ) -> SearchResult:
        """Returns the k best labels of each query, best first, ties by the lower id.

        Where k exceeds the number of labels, rows end in id -1, score -inf.
        """
        return self._search(queries, k, with_log_sum=False, removed=removed).best

    def search_normalised(
        self,
        queries: Float[np.ndarray, "q e"],
        k: int,
        removed: Int[np.ndarray, " r"] | None = None,
    ) -> Normalised:
        """See `Index`. The sum is computed in the same pass, from the same scores."""
        return self._search(queries, k, with_log_sum=True, removed=removed)

    def _search(
        self,
        queries: Float[np.ndarray, "q e"],
        k: int,
        *,
        with_log_sum: bool,
        removed: Int[np.ndarray, " r"] | None = None,
    ) -> Normalised:
        """Without `with_log_sum`, all sums are -inf."""
        if removed is not None:  # Padded to a power of two, so that few programs are compiled.
            ids = np.full(index.padded_size(len(removed)), -1, np.int32)
            ids[: len(removed)] = removed
            removed = ids if len(removed) else None
        few = min(k, self._num_labels)
        result = index.empty_result(len(queries), few)
        log_sums = np.full(len(queries), -np.inf, np.float32)
        # All blocks have one size, so one program is compiled; few queries are padded to a power
        # of two.
        size = min(self._query_block, index.padded_size(len(queries)))
        block = np.zeros((size, queries.shape[1]), np.float32)
        for start in range(0, len(queries) if few else 0, size):
            part = slice(start, min(start + size, len(queries)))
            count = part.stop - part.start
            block[:count] = queries[part]
            found, log_sum = self._rows.best(block, count, few, with_log_sum, removed)
            result.scores[part], result.ids[part] = found
            if with_log_sum:
                log_sums[part] = log_sum
        if removed is not None:  # Perhaps fewer than k labels are left.
            result.ids[result.scores == -np.inf] = -1
        return Normalised(index.pad_columns(result, k), log_sums)


class _HostRows:
    """All rows on one CPU: XLA computes the scores and numpy selects, on all cores."""

    def __init__(self, values: Float[np.ndarray, "n e"] | Int8Vectors, label_block: int):
        self._num_labels = int8.num_rows(values)
        self._size = _round_to_groups(min(label_block, self._num_labels))

        def block(rows: np.ndarray, start: int) -> Array:
            rows = rows[start : start + self._size]
            # Copies of the last row do not change the maximum of its group.
            if missing := _round_to_groups(len(rows)) - len(rows):
                rows = np.pad(rows, ((0, missing), *[(0, 0)] * (rows.ndim - 1)), mode="edge")
            return jax.device_put(rows)

        self._blocks = [
            jax.tree.map(functools.partial(block, start=start), values)
            for start in range(0, self._num_labels, self._size)
        ]
        self._num_threads = processors.usable()
        self._threads = futures.ThreadPoolExecutor(self._num_threads)

    def best(
        self,
        queries: Float[np.ndarray, "q e"],
        count: int,
        k: int,
        with_log_sum: bool,
        removed: Int[np.ndarray, " r"] | None,
    ) -> tuple[SearchResult, Float[np.ndarray, " q"] | None]:
        """Returns the k best rows of each of the first `count` queries; the others are padding.

        With `with_log_sum` also the log of the sum of exp(score) over all rows, else None. Rows
        that are removed are neither found nor count.
        """
        each = -(-count // self._num_threads)
        parts = [slice(start, min(start + each, count)) for start in range(0, count, each)]
        best = [index.empty_result(part.stop - part.start, k) for part in parts]
        group = top_k.group_size(k, self._size)
        log_sum = np.full(count, -np.inf, np.float32) if with_log_sum else None
        for i, block in enumerate(self._blocks):
            first = i * self._size
            real = min(self._size, self._num_labels - first)
            found = _score(queries, block, removed, first, real, group=group)
            if with_log_sum:
                of_block = np.asarray(_log_sum(*found, real))[:count]
                log_sum = np.logaddexp(log_sum, of_block)
            scores, maxima = map(np.asarray, found)
            add = functools.partial(top_k.add_block, first=first, real=real)
            scores, maxima = ([x[part] for part in parts] for x in (scores, maxima))
            best = list(self._threads.map(add, best, scores, maxima))
            del found, scores, maxima  # So that the scores of two blocks never exist together.
        return SearchResult(*map(np.concatenate, zip(*best, strict=True))), log_sum


def _round_to_groups(count: int) -> int:
    """Rounds up to a multiple of the group size."""
    return -(-max(1, count) // top_k.GROUP) * top_k.GROUP


class _DeviceRows:
    """Rows sharded over the devices of a mesh, or all on one accelerator."""

    def __init__(self, vectors: Shard, num_labels: int, label_block: int, mesh: Mesh | None):
        self._num_labels, self._mesh = num_labels, mesh

        def place(values: np.ndarray) -> Array:
            if mesh is None:
                return jax.device_put(values)
            return sharding.spread_rows(vectors._replace(values=values), num_labels, mesh)

        self._vectors = jax.tree.map(place, vectors.values)
        self._num_blocks = _num_blocks(int8.num_rows(self._vectors), label_block, mesh)

    def best(
        self,
        queries: Float[np.ndarray, "q e"],
        count: int,
        k: int,
        with_log_sum: bool,
        removed: Int[np.ndarray, " r"] | None,
    ) -> tuple[SearchResult, Float[np.ndarray, " q"] | None]:
        """Like `_HostRows.best`."""
        found, log_sum = _top_k(
            self._vectors,
            queries,
            removed,
            k=k,
            num_labels=self._num_labels,
            num_blocks=self._num_blocks,
            mesh=self._mesh,
            with_log_sum=with_log_sum,
        )
        result = SearchResult(*(np.asarray(x)[:count] for x in found))
        return result, np.asarray(log_sum)[:count] if with_log_sum else None


def _num_blocks(num_rows: int, label_block: int, mesh: Mesh | None) -> int:
    """Blocks of at most `label_block` rows that each device scores."""
    devices = 1 if mesh is None else sharding.num_row_shards(mesh)
    return max(1, -(-(num_rows // devices) // label_block))


def traced(
    num_labels: int, width: int, mesh: Mesh, *, queries: int, label_block: int, k: int
) -> jax.stages.Traced:
    """The program that searches on the devices of a mesh, from shapes alone; not compiled.

    Args:
      num_labels: Number of labels.
      width: Width of the vectors.
      mesh: Devices over which the labels are sharded.
      queries: Queries searched at a time.
      label_block: Labels scored at a time on each device.
      k: Labels found of each query.
    """
    rows = sharding.pad_rows(num_labels, mesh)
    vectors = jax.ShapeDtypeStruct(
        (rows, width), jnp.float32, sharding=sharding.rows_sharding(mesh)
    )
    block = jax.ShapeDtypeStruct((queries, width), jnp.float32, sharding=sharding.replicated(mesh))
    return _top_k.trace(
        vectors,
        block,
        k=k,
        num_labels=num_labels,
        num_blocks=_num_blocks(rows, label_block, mesh),
        mesh=mesh,
    )


@functools.partial(jax.jit, static_argnames="group")
def _score(
    queries: Float[Array, "q e"],
    rows: Float[Array, "n e"] | Int8Vectors,
    removed: Int[Array, " r"] | None,
    first: Int[Array, ""] | int,
    real: Int[Array, ""] | int,
    *,
    group: int,
) -> tuple[Float[Array, "q n"], Float[Array, "q g"]]:
    """Returns all inner products and the maximum of each group of columns.

    Column 0 is label `first`; columns that are removed have score -inf.
    """
    scores = _inner_products(queries, rows)
    if removed is not None:
        # Columns from `real` on are copies of the last label, which may be removed.
        columns = jnp.arange(scores.shape[1])
        gone = _is_removed(removed, first, len(columns)) | (columns >= real)
        scores = jnp.where(gone, -jnp.inf, scores)
    return scores, jnp.max(scores.reshape(len(scores), -1, group), axis=2)


@jax.jit
def _log_sum(
    scores: Float[Array, "q n"],
    maxima: Float[Array, "q g"],
    real: Int[Array, ""] | int,
) -> Float[Array, " q"]:
    """Returns the log of the sum of exp(score) over the first `real` columns, which are labels."""
    largest = jnp.max(maxima, axis=1, keepdims=True)  # Columns of padding are copies of a label.
    largest = jnp.where(jnp.isfinite(largest), largest, 0.0)  # All labels may be removed.
    exponentials = jnp.exp(scores - largest)
    is_label = jnp.arange(scores.shape[1]) < real
    return largest[:, 0] + jnp.log(jnp.sum(exponentials, axis=1, where=is_label))


def _is_removed(
    removed: Int[Array, " r"], first: Int[Array, ""] | int, size: int
) -> Bool[Array, " n"]:
    """Tells which of `size` labels from `first` on are among `removed`, which may hold others."""
    at = removed - first
    at = jnp.where(at < 0, size, at)  # Beyond the end, where it is dropped.
    return jnp.zeros(size, bool).at[at].set(True, mode="drop")


def _inner_products(
    queries: Float[Array, "q e"], rows: Float[Array, "n e"] | Int8Vectors
) -> Float[Array, "q n"]:
    """Returns the inner products of all queries and rows, computed in float32 throughout."""
    return jnp.einsum(
        "qe,ne->qn",
        queries,
        int8.as_float(rows, queries.shape[1]),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


@functools.partial(
    jax.jit, static_argnames=("k", "num_labels", "num_blocks", "mesh", "with_log_sum")
)
def _top_k(
    vectors: Float[Array, "n e"] | Int8Vectors,
    queries: Float[Array, "q e"],
    removed: Int[Array, " r"] | None = None,
    *,
    k: int,
    num_labels: int,
    num_blocks: int,
    mesh: Mesh | None,
    with_log_sum: bool = False,
) -> tuple[SearchResult, Float[Array, " q"] | None]:
    """Returns the k best of the first `num_labels` rows; each device scores `num_blocks` blocks.

    With `with_log_sum` also the log of the sum of exp(score) over these rows, else None. Rows that
    are removed are neither found nor count.
    """
    local = functools.partial(
        _local_top_k,
        k=k,
        num_labels=num_labels,
        num_blocks=num_blocks,
        with_log_sum=with_log_sum,
    )
    if mesh is None:
        return local(vectors, queries, removed, 0)

    def search_shard(
        rows: Float[Array, "n e"] | Int8Vectors,
        queries: Float[Array, "q e"],
        removed: Int[Array, " r"] | None,
    ) -> tuple[SearchResult, Float[Array, " q"] | None]:
        first = jax.lax.axis_index(ROWS) * int8.num_rows(rows)
        found, log_sum = local(rows, queries, removed, first)
        # [q, devices * k] candidates, in the same order on every device.
        found = jax.tree.map(lambda x: jax.lax.all_gather(x, ROWS, axis=1, tiled=True), found)
        if with_log_sum:
            log_sum = jax.nn.logsumexp(jax.lax.all_gather(log_sum, ROWS), axis=0)
        return _best(found, k), log_sum

    # The results are equal on all devices, which the type of all_gather does not express.
    search = jax.shard_map(
        search_shard, mesh=mesh, in_specs=(P(ROWS), P(), P()), out_specs=P(), check_vma=False
    )
    return search(vectors, queries, removed)


def _local_top_k(
    rows: Float[Array, "n e"] | Int8Vectors,
    queries: Float[Array, "q e"],
    removed: Int[Array, " r"] | None,
    first: Int[Array, ""] | int,
    *,
    k: int,
    num_labels: int,
    num_blocks: int,
    with_log_sum: bool,
) -> tuple[SearchResult, Float[Array, " q"] | None]:
    """Returns the result of `_top_k` for one device, whose first row is label `first`."""
    num_rows = int8.num_rows(rows)
    size = -(-num_rows // num_blocks)

    def add_block(carry: Any, start: Array) -> tuple[Any, None]:
        best, log_sum = carry
        # The last block ends with the last row; rows that it shares with the block before are
        # masked, so that they count once.
        at = jnp.minimum(start, num_rows - size) + jnp.arange(size, dtype=jnp.int32)
        vectors = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, at[0], size), rows)
        scores = _inner_products(queries, vectors)
        ids = jnp.asarray(first + at, jnp.int32)
        counts = (at >= start) & (ids < num_labels)
        if removed is not None:
            counts &= ~_is_removed(removed, ids[0], size)
        scores = jnp.where(counts, scores, -jnp.inf)
        if with_log_sum:
            log_sum = jnp.logaddexp(log_sum, jax.nn.logsumexp(scores, axis=1))
        scores, chosen = _top_k_by_groups(scores, min(k, size))
        both = jax.tree.map(
            lambda a, b: jnp.concatenate([a, b], axis=1), best, SearchResult(scores, ids[chosen])
        )
        return (_best(both, k), log_sum), None

    empty = SearchResult(
        jnp.full((queries.shape[0], k), -jnp.inf, jnp.float32),
        jnp.full((queries.shape[0], k), -1, jnp.int32),
    )
    no_sum = jnp.full(queries.shape[0], -jnp.inf, jnp.float32) if with_log_sum else None
    starts = jnp.arange(num_blocks, dtype=jnp.int32) * size
    return jax.lax.scan(add_block, (empty, no_sum), starts)[0]


def _top_k_by_groups(
    scores: Float[Array, "q n"], k: int
) -> tuple[Float[Array, "q k"], Int[Array, "q k"]]:
    """Returns what `jax.lax.top_k` does, without sorting all columns.

    The k best columns are in the k groups of neighbouring columns with the largest maxima, so only
    the maxima and the columns of these groups are sorted. For k above 16, XLA sorts whole rows on a
    GPU; of 65,536 columns and k 100 it then sorts 2,048 and 3,200.
    """
    group = group_width(scores.shape[1], k)
    if group == 1:
        return jax.lax.top_k(scores, k)
    columns = scores.shape[1]
    padding = ((0, 0), (0, -columns % group))
    groups = jnp.pad(scores, padding, constant_values=-jnp.inf)
    groups = groups.reshape(len(scores), -1, group)
    _, chosen = jax.lax.top_k(groups.max(axis=2), k)
    chosen = jnp.sort(chosen, axis=1)  # So that ties go to the lower column, as in top_k.
    candidates = jnp.take_along_axis(groups, chosen[..., None], axis=1)  # [q, k, group]
    best, at = jax.lax.top_k(candidates.reshape(len(scores), -1), k)
    column = jnp.take_along_axis(chosen, at // group, axis=1) * group + at % group
    return best, jnp.minimum(column, columns - 1)  # Padding is chosen among -inf alone.


def group_width(columns: int, k: int) -> int:
    """Columns of a group, a power of two, for which the fewest columns are sorted; 1: no groups."""
    widths = [1 << n for n in range(1, 13) if k << n <= columns >> 1 and k <= columns >> n]
    return min(widths, key=lambda width: columns // width + k * width, default=1)


def _best(found: SearchResult, k: int) -> SearchResult:
    """Returns the k best columns; ties go to the earlier column, which must hold the lower id."""
    scores, at = jax.lax.top_k(found.scores, k)
    return SearchResult(scores, jnp.take_along_axis(found.ids, at, axis=1))
