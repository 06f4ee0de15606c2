"""The clustering benchmark on a few vectors."""

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from vixml_jax.benchmarks import clustering


@pytest.mark.parametrize("noise", [False, True])
def test_prints_a_table_for_each_leaf(noise, capsys):
    clustering.define_flags()
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(n=300, width=8, leaf=["16", "100"], rounds=1, noise=noise):
        clustering.main([])
    printed = capsys.readouterr().out
    assert "300 x 8 into 19 clusters of 16" in printed
    assert "300 x 8 into 3 clusters of 100" in printed
    assert printed.count("ours") == 2 and printed.count("plain, one thread") == 2


def test_similarity_against_loops():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 3)).astype(np.float32)
    clusters = rng.permutation(np.repeat([0, 1, 3, 7], 5))
    expected = []
    for i in range(20):
        members = [x[j] / np.linalg.norm(x[j]) for j in range(20) if clusters[j] == clusters[i]]
        centre = np.sum(members, axis=0)
        expected.append(x[i] @ centre / np.linalg.norm(x[i]) / np.linalg.norm(centre))
    np.testing.assert_allclose(
        clustering.mean_similarity(x, clusters), np.mean(expected), rtol=1e-5
    )


@pytest.mark.parametrize("num_clusters", [1, 4, 7])
def test_reference_makes_as_many_clusters_of_near_equal_size(num_clusters):
    x = clustering.synthetic_embeddings(200, 8, seed=0)
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1.0, rtol=1e-5)
    sizes = np.bincount(clustering.plain_clusters(x, num_clusters, seed=0))
    assert len(sizes) == num_clusters and np.ptp(sizes) <= 3
