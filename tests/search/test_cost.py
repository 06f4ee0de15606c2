"""Foreseen memory against that which the kernel counted at the peak, in processes of their own."""

import json
import os
import subprocess
import sys

import pytest

from vixml_jax.errors import InputError
from vixml_jax.search import cost as cost_lib

MEASURE = """
import json, sys
import numpy as np
from vixml_jax.search import scann
from vixml_jax.search.exact import ExactIndex

def kilobytes(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field))

def forget_the_peak():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")

kind, n, width = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rng = np.random.default_rng(0)
x = rng.normal(size=(n // 50, width)).astype(np.float32)[rng.integers(n // 50, size=n)]
x += rng.standard_normal(x.shape, dtype=np.float32)
x /= np.linalg.norm(x, axis=1, keepdims=True)
few = x[:10_000].copy()
if kind == "exact":  # What programs take once and for all is not the index's.
    ExactIndex(few, query_block=512, label_block=16384).search(few[:600], 10)
else:
    scann.ScannIndex.build(few[:4000]).search(few[:600], 10)
forget_the_peak()
before = kilobytes("VmRSS")
if kind == "exact":
    index = ExactIndex(x, query_block=512, label_block=16384)
    index.search(few[:2000], 10)
else:
    index = scann.ScannIndex.build(x)
print(json.dumps({"peak": kilobytes("VmHWM") - before, "after": kilobytes("VmRSS") - before}))
"""


def measured(kind, n, width):
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, kind, str(n), str(width)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "XLA_FLAGS": ""},
    )
    return {key: 1024 * value for key, value in json.loads(done.stdout).items()}


@pytest.mark.parametrize("n,width", [(30_000, 256), (60_000, 128)])
def test_build_takes_what_was_foreseen(n, width):
    found = measured("scann", n, width)
    assert found["peak"] <= cost_lib.build_bytes(n, width) <= 1.6 * found["peak"]
    assert found["after"] <= 1.1 * cost_lib.search_bytes(n, width)


@pytest.mark.parametrize("n,width", [(100_000, 192), (60_000, 384)])
def test_exact_takes_what_was_foreseen(n, width):
    found = measured("exact", n, width)["peak"]
    foreseen = cost_lib.exact_bytes(n, width, query_block=512, label_block=16384)
    assert found <= foreseen <= 1.6 * found


def test_more_leaves_or_candidates_cost_more():
    settings = {"leaves": 300, "dimensions_per_block": 2}

    def cost(searched, reordered, settings=settings):
        return cost_lib.search_cost(
            settings, 90_000, 128, leaves_searched=searched, reordered=reordered
        )

    assert cost(10, 100) < cost(20, 100) < cost(20, 200)
    # Leaves hold 300 labels each: there are no more candidates in one.
    assert cost(1, 300) == cost(1, 3000)
    assert cost(10, 100) < cost(10, 100, settings | {"dimensions_per_block": 1})


def test_room(monkeypatch):
    monkeypatch.setattr(cost_lib.memory, "available", lambda: 2 * 2**30)
    cost_lib.check_room(2 * 2**30, "nine labels", "go home")
    with pytest.raises(InputError) as error:
        cost_lib.check_room(3 * 2**30, "nine labels", "go home")
    assert str(error.value) == (
        "nine labels need about 3.00 GB of memory, 2.00 GB are left here: go home"
    )
    with pytest.raises(InputError, match=r"1.00 GB are allowed by --search.memory_gb: go home"):
        cost_lib.check_room(2 * 2**30, "nine labels", "go home", limit=2**30)
    monkeypatch.setattr(cost_lib.memory, "available", lambda: None)
    cost_lib.check_room(2**60, "nine labels", "go home")
