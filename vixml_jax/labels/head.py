"""The label head: a trained vector and bias for every label, scored against all labels at once.

It goes beyond the paper, whose training compares a query with the labels of its batch alone. One
linear layer over all labels is what Renée (one-versus-all) and DEXML (arXiv 2310.10636) train.

With q a unit query vector, g = unit(q + MLP(q)) and w_l, b_l the vector and the bias of label l,
the logit of the label is s_l = SCALE * g.w_l + b_l. A head that reads words adds those of the query
to q + MLP(q) (`head_words`).

With `widths`, the loss is the mean over these widths W and the full one, where the logits of W are
SCALE * unit(g[:W]).w_l[:W] + b_l (Matryoshka representation learning, arXiv 2205.13147). Such a
prefix, padded with zeros, is one more query of the batch with the same labels, so nothing else
changes. The biases are the same for all widths.

Logits are computed in blocks of labels (`blocked_logits`), so memory grows with the size of a batch
times that of a block, never with the number of labels. On a mesh, each device holds the rows of its
labels and scores them against all queries of the batch. Devices exchange the vectors of the batch's
queries, their gradients and one statistic per query; rows and logits stay where they are.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from vixml_jax.labels import head_words
from vixml_jax.labels.blocked_logits import ABSENT, Labels, Pairs, scores
from vixml_jax.models.layers import prefix, unit
from vixml_jax.parallel import sharding
from vixml_jax.parallel.sharding import ROWS
from vixml_jax.structs import Positives

SCALE = 20.0  # Of the inner products: the inverse temperature at the start, when w_l is unit.


class Selection(NamedTuple):
    """The labels that one step scores, where it does not score all; sharded over the row shards.

    Attributes:
      rows: Row within its shard of each selected label, ascending in each shard; the number of
        rows of a shard where fewer labels are selected.
      log_weight: Logarithm of the number of labels that each selected one stands for; `ABSENT` at
        missing ones.
    """

    rows: Int[Array, " s"]
    log_weight: Float[Array, " s"]


class ScoredBatch(NamedTuple):
    """A batch of queries and the labels that it is scored against; sharded over the row shards."""

    positives: Positives
    row_mask: Bool[Array, " b"]
    selection: Selection


@dataclasses.dataclass(frozen=True, eq=False)
class LabelHead:
    """The label head without its parameters.

    Parameters are {"vectors": [n, e], "bias": [n], "mlp": {"up", "down"}, "words": [v, e]},
    float32. Rows of labels are sharded over (replica, fsdp) and padded as those of the label table;
    the MLP and the table of words are replicated, and absent if `mlp_width` or `num_words` is 0.

    Attributes:
      mesh: Mesh over which the rows are sharded.
      num_labels: Number of labels without padding.
      width: Embedding width.
      mlp_width: Hidden width of the MLP; 0: g is the query vector itself.
      loss: "softmax", "decoupled_softmax" or "bce".
      label_block: Labels of one device that are scored at a time.
      num_sampled: Labels, over all devices, that a step scores beside those of its queries; 0: it
        scores all labels.
      num_words: Rows of the table of words, v; 0: the head reads no words.
      widths: Widths below `width` for which it is trained as well.
    """

    mesh: Mesh
    num_labels: int
    width: int
    mlp_width: int
    loss: str
    label_block: int = 8192
    num_sampled: int = 0
    num_words: int = 0
    widths: tuple[int, ...] = ()

    def init_params(self, key: Array) -> Any:
        """Parameters boxed with logical axes: zero vectors and biases, and an MLP that returns 0.

        With zero vectors the head has no effect; `with_labels` sets those it starts from.
        """
        params: dict[str, Any] = {
            "vectors": sharding.boxed(jnp.zeros((self.num_labels, self.width)), "ne"),
            "bias": sharding.boxed(jnp.zeros((self.num_labels,)), "n"),
        }
        if self.mlp_width:
            bound = self.width**-0.5
            kernel = jax.random.uniform(
                key, (self.width, self.mlp_width), minval=-bound, maxval=bound
            )
            params["mlp"] = {
                "up": {"kernel": kernel, "bias": jnp.zeros((self.mlp_width,))},
                "down": {
                    "kernel": jnp.zeros((self.mlp_width, self.width)),
                    "bias": jnp.zeros((self.width,)),
                },
            }
        if self.num_words:
            params["words"] = jnp.zeros((self.num_words, self.width))
        return params

    def with_labels(
        self, params: Any, vectors: Float[Array, "n e"], frequency: Float[Array, " n"]
    ) -> Any:
        """The parameters that training starts from.

        Args:
          params: Parameters as stored, padded and without boxes.
          vectors: The tower's unit vectors of the labels, rows padded and sharded as stored.
          frequency: Fraction of the training queries that have each label, likewise. With the
            loss "bce", its logarithm (at least that of 1e-7) is the initial bias, which is 0 with
            the other losses.
        """
        bias = jnp.zeros_like(params["bias"])
        if self.loss == "bce":
            bias = jnp.where(jnp.arange(len(bias)) < self.num_labels,
                             jnp.log(jnp.maximum(frequency, 1e-7)), bias)  # fmt: skip
        return {**params, "vectors": vectors, "bias": bias}

    def queries(
        self,
        params: Any,
        queries: Float[Array, "b e"],
        tokens: Int[Array, "b t"] | None = None,
    ) -> Float[Array, "b e"]:
        """g = unit(q + MLP(q) + words) of unit query vectors q.

        Args:
          params: Those of `query_params` are used.
          queries: Unit vectors.
          tokens: Of the queries' texts, as `packing.text_tokens` returns them; None if the head
            reads no words.
        """
        g = queries
        if "mlp" in params:
            up, down = params["mlp"]["up"], params["mlp"]["down"]
            hidden = jax.nn.gelu(queries @ up["kernel"] + up["bias"], approximate=False)
            g = g + hidden @ down["kernel"] + down["bias"]
        if "words" in params:
            g = g + head_words.add_up(params["words"], tokens)
        return unit(g)

    def select(self, positives: Positives, key: Array) -> Selection | None:
        """Draws the labels that a step scores; None: it scores all.

        Those of the batch's queries are selected, each for itself. Every shard also draws its part
        of `num_sampled`, all labels with the same probability; one that is drawn stands for the
        inverse of this probability, so that sums over labels are unbiased (logQ correction).

        Args:
          positives: Of the batch.
          key: Random key of the step.
        """
        if not self.num_sampled:
            return None
        per_shard = self._rows_per_shard
        drawn = min(per_shard, -(-self.num_sampled // sharding.num_row_shards(self.mesh)))

        def local(labels: Int[Array, " p"], key: Array) -> Selection:
            shard = jax.lax.axis_index(ROWS)
            labels = _all_rows(labels) - shard * per_shard
            is_held = (labels >= 0) & (labels < per_shard)
            own = jnp.where(is_held, labels, per_shard)
            real = jnp.clip(self.num_labels - shard * per_shard, 0, per_shard)
            # Distinct labels at equal distances from a random start, so that none is drawn twice.
            offset = jax.random.uniform(jax.random.fold_in(key, shard))
            spread = (jnp.arange(drawn) + offset) * (jnp.maximum(real, 1) / drawn)
            spread = jnp.where(real > 0, spread.astype(jnp.int32) % jnp.maximum(real, 1), per_shard)
            rows = jnp.unique(
                jnp.concatenate([own, spread]), size=len(own) + drawn, fill_value=per_shard
            )
            is_own = jnp.zeros(per_shard + 1, bool).at[own].set(True).at[per_shard].set(False)
            weight = jnp.where(is_own[rows], 1.0, jnp.maximum(real / drawn, 1.0))
            return Selection(rows, jnp.where(rows < per_shard, jnp.log(weight), ABSENT))

        select = jax.shard_map(local, mesh=self.mesh, in_specs=(P(ROWS), P()), out_specs=P(ROWS))
        return select(positives.labels, key)

    def take(self, rows: Float[Array, "n ..."], selection: Selection) -> Float[Array, "s ..."]:
        """The selected rows of an array sharded as the vectors are; zero at missing ones."""
        local = lambda rows, at: rows.at[at].get(mode="fill", fill_value=0)  # noqa: E731
        return self._per_shard(local)(rows, selection.rows)

    def put(
        self, rows: Float[Array, "n ..."], selection: Selection, values: Float[Array, "s ..."]
    ) -> Float[Array, "n ..."]:
        """`rows` with the values of the selected rows; missing ones are dropped."""
        local = lambda rows, at, values: rows.at[at].set(values, mode="drop")  # noqa: E731
        return self._per_shard(local)(rows, selection.rows, values)

    def loss_of(
        self,
        params: Any,
        queries: Float[Array, "b e"],
        positives: Positives,
        row_mask: Bool[Array, " b"],
        selection: Selection | None = None,
        tokens: Int[Array, "b t"] | None = None,
    ) -> Float[Array, ""]:
        """Mean loss of the real queries of a batch over all labels.

        - softmax: mean over the positives of -log softmax(s).
        - decoupled_softmax: the same, but in the denominator of a positive the other positives of
          its query are left out (DEXML, arXiv 2310.10636).
        - bce: sum over all labels of the binary cross-entropy, divided by the mean number of
          positives of a query, so that its size is that of the others.

        A query without positives has the loss 0 in the first two.

        Args:
          params: As stored; with a selection, `vectors` and `bias` hold the selected rows only.
          queries: Unit vectors; b is a multiple of the row shards.
          positives: All labels of the queries.
          row_mask: True for real queries.
          selection: The labels that are scored; None: all.
          tokens: See `queries`.
        """

        def local(g: Array, vectors: Array, bias: Array, batch: ScoredBatch) -> Array:
            g, labels, pairs, loss_of = self.on_device(g, vectors, bias, batch)
            return loss_of(*scores(g, labels, pairs, self.loss, self.label_block))

        sharded = jax.shard_map(local, mesh=self.mesh, in_specs=P(ROWS), out_specs=P())
        batch = self.scored_batch(positives, row_mask, selection)
        g = self.scaled(params, queries, tokens)
        return sharded(g, params["vectors"], params["bias"], batch)

    def scaled(
        self,
        params: Any,
        queries: Float[Array, "b e"],
        tokens: Int[Array, "b t"] | None = None,
    ) -> Float[Array, "p e"]:
        """SCALE * g of the queries: of each its prefixes of `widths`, padded with zeros, and it.

        Arguments are as of `queries`. Without `widths`, p is b.
        """
        g = self.queries(params, queries, tokens)
        if self.widths:
            prefixes = [
                jnp.pad(prefix(g, width), ((0, 0), (0, self.width - width)))
                for width in (*self.widths, self.width)
            ]
            g = jnp.stack(prefixes, axis=1).reshape(-1, self.width)
        return SCALE * g

    def scored_batch(
        self, positives: Positives, row_mask: Bool[Array, " b"], selection: Selection | None
    ) -> ScoredBatch:
        """What `on_device` needs; arguments as of `loss_of`.

        The queries are those that `scaled` returns.
        """
        if count := len(self.widths):
            query, label = (jnp.repeat(x, count + 1) for x in positives)
            copy = jnp.arange(len(query), dtype=query.dtype) % (count + 1)
            query = jnp.where(query >= 0, query * (count + 1) + copy, query)
            positives, row_mask = Positives(query, label), jnp.repeat(row_mask, count + 1)
        if selection is None:
            at = jnp.arange(sharding.pad_rows(self.num_labels, self.mesh), dtype=jnp.int32)
            absent = jnp.where(at < self.num_labels, 0.0, ABSENT)
            selection = Selection(at % self._rows_per_shard, absent)
        return ScoredBatch(positives, row_mask, selection)

    def on_device(
        self,
        g: Float[Array, "b e"],
        vectors: Float[Array, "n e"],
        bias: Float[Array, " n"],
        batch: ScoredBatch,
    ) -> tuple[Float[Array, "all_b e"], Labels, Pairs, Callable[[Array, Array], Array]]:
        """Within `shard_map`: what a device scores for the whole batch.

        Args:
          g: Scaled vectors of this device's queries, from `scaled`.
          vectors, bias: Rows of its labels.
          batch: Its part.

        Returns:
          Scaled vectors of all queries, the labels, the positives among them, and a function from
          the results of `scores` to the loss of the whole batch.
        """
        num_real = jax.lax.psum(jnp.sum(batch.row_mask), ROWS)
        g, row_mask, query, label = map(_all_rows, (g, batch.row_mask, *batch.positives))
        label -= jax.lax.axis_index(ROWS) * self._rows_per_shard
        held = (query >= 0) & (label >= 0) & (label < self._rows_per_shard)
        pairs = Pairs(
            query=jnp.where(held, query, len(g)),
            label=jnp.searchsorted(batch.selection.rows, jnp.where(held, label, 0)),
        )
        at = jnp.where(query >= 0, query, len(g))
        share = 1.0 / jnp.maximum(jnp.zeros(len(g)).at[at].add(1.0, mode="drop"), 1.0)

        def loss_of(statistic: Array, s_positive: Array) -> Array:
            if self.loss == "bce":
                total = jnp.sum(statistic, where=row_mask) - jnp.sum(s_positive, where=held)
                num_pairs = jnp.sum(held)
                return jax.lax.psum(total, ROWS) / jnp.maximum(jax.lax.psum(num_pairs, ROWS), 1)
            # Each device has the sum over its own labels.
            largest = jax.lax.pmax(jax.lax.stop_gradient(statistic), ROWS)
            log_sum = largest + jnp.log(jax.lax.psum(jnp.exp(statistic - largest), ROWS))
            costs = log_sum[query] - s_positive
            if self.loss == "decoupled_softmax":
                costs = jax.nn.softplus(costs)
            total = jnp.sum(costs * share[query], where=held)
            return jax.lax.psum(total, ROWS) / jnp.maximum(num_real, 1)

        labels = Labels(vectors, bias, batch.selection.log_weight)
        return g, labels, pairs, loss_of

    @property
    def _rows_per_shard(self) -> int:
        shards = sharding.num_row_shards(self.mesh)
        return sharding.pad_rows(self.num_labels, self.mesh) // shards

    def _per_shard(self, local: Any) -> Any:
        return jax.shard_map(local, mesh=self.mesh, in_specs=P(ROWS), out_specs=P(ROWS))


def query_params(params: Any) -> Any:
    """The parameters of the head that turn query vectors into g: its MLP and its words."""
    return {name: value for name, value in params.items() if name in ("mlp", "words")}


def is_row(path: tuple[Any, ...]) -> bool:
    """Whether a leaf of parameters {"head": ...}, or of their moments, has one row per label."""
    names = [getattr(key, "key", None) for key in path]
    return "head" in names and "mlp" not in names and names[-1] in ("vectors", "bias")


def _all_rows(x: Array) -> Array:
    return jax.lax.all_gather(x, ROWS, tiled=True)
