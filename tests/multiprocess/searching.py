"""Program of one of several processes, which search labels whose rows are sharded over them."""

import numpy as np
import scipy.special
from absl import flags

from vixml_jax import command_line
from vixml_jax.parallel import distributed, sharding
from vixml_jax.search import index
from vixml_jax.search.exact import ExactIndex
from vixml_jax.structs import Shard


def main(argv):
    values = flags.FLAGS
    distributed.start(values.coordinator, values.num_processes, values.process_index)
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(203, 8)).astype(np.float32)
    queries = rng.normal(size=(11, 8)).astype(np.float32)
    mesh = sharding.create_mesh()
    ids = sharding.row_ids(len(vectors), mesh)
    assert len(ids) < len(vectors)
    searched = ExactIndex(
        Shard(ids, vectors[ids]), num_labels=len(vectors), label_block=16, mesh=mesh
    )
    found = searched.search_normalised(queries, 20)
    scores = queries.astype(np.float64) @ vectors.T.astype(np.float64)
    p = scipy.special.softmax(scores, axis=1)
    order = np.argsort(-p, axis=1)[:, :20]
    np.testing.assert_array_equal(found.best.ids, order)
    np.testing.assert_allclose(
        found.log_sum, scipy.special.logsumexp(scores, axis=1), rtol=0, atol=1e-5
    )
    expected = np.take_along_axis(p, order, axis=1)
    np.testing.assert_allclose(index.probabilities(found).scores, expected, rtol=1e-5)
    print("all checks passed")  # Shown by process 0 only.


if __name__ == "__main__":
    command_line.launch(main, distributed.define_flags)
