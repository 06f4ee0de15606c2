"""Tests of inverse propensities against published values and a loop in plain Python."""

import math

import numpy as np

from vixml_jax.data import propensity


def test_published_values():
    found = propensity.inverse_propensity(np.array([1, 10, 1000]), 294_805, 0.6, 2.6)
    np.testing.assert_allclose(found, [12.59, 6.47, 1.40], atol=0.005)
    assert found.dtype == np.float32


def test_matches_a_plain_loop():
    counts = np.random.default_rng(0).integers(0, 10_000, 50)
    for a, b in ((0.55, 1.5), (0.5, 0.4), (0.0, 1.0)):
        c = (math.log(5000) - 1) * (b + 1) ** a
        expected = [1 + c * math.exp(-a * math.log(int(n) + b)) for n in counts]
        found = propensity.inverse_propensity(counts, 5000, a, b)
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_weights_are_one_for_tiny_data_sets():
    assert np.all(propensity.inverse_propensity(np.array([0, 1, 2]), 1, 0.6, 2.6) == 1.0)
