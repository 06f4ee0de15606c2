"""Estimated memory against the peak that the kernel counts, each measured in its own process."""

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

def reset_peak():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")

kind, n, width = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rng = np.random.default_rng(0)
x = rng.normal(size=(n // 50, width)).astype(np.float32)[rng.integers(n // 50, size=n)]
x += rng.standard_normal(x.shape, dtype=np.float32)
x /= np.linalg.norm(x, axis=1, keepdims=True)
few = x[:10_000].copy()
if kind == "exact":  # Compile first, so that the memory of the compiler is not counted.
    ExactIndex(few, query_block=512, label_block=16384).search(few[:600], 10)
else:
    scann.ScannIndex.build(few[:4000]).search(few[:600], 10)
reset_peak()
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


@pytest.mark.parametrize(
    "n,width", [(30_000, 256), pytest.param(60_000, 128, marks=pytest.mark.slow)]
)
def test_build_uses_the_estimated_memory(n, width):
    found = measured("scann", n, width)
    assert found["peak"] <= cost_lib.build_bytes(n, width) <= 1.6 * found["peak"]
    assert found["after"] <= 1.1 * cost_lib.search_bytes(n, width)


@pytest.mark.parametrize("n,width", [(100_000, 192), (60_000, 384)])
def test_exact_search_uses_the_estimated_memory(n, width):
    found = measured("exact", n, width)["peak"]
    estimated = cost_lib.exact_bytes(n, width, query_block=512, label_block=16384)
    assert found <= estimated <= 1.6 * found


def test_more_leaves_or_candidates_cost_more():
    settings = {"leaves": 300, "dimensions_per_block": 2}

    def cost(searched, reordered, settings=settings):
        return cost_lib.search_cost(
            settings, 90_000, 128, leaves_searched=searched, reordered=reordered
        )

    assert cost(10, 100) < cost(20, 100) < cost(20, 200)
    # A leaf holds 300 labels, so searching one never scores more candidates.
    assert cost(1, 300) == cost(1, 3000)
    assert cost(10, 100) < cost(10, 100, settings | {"dimensions_per_block": 1})


def test_check_memory_reports_needed_and_available_memory(monkeypatch):
    monkeypatch.setattr(cost_lib.host_memory, "available", lambda: 2 * 10**9)
    cost_lib.check_memory(2 * 10**9, "nine labels", "use fewer labels")
    with pytest.raises(InputError) as error:
        cost_lib.check_memory(3 * 10**9, "nine labels", "use fewer labels")
    assert str(error.value) == (
        "nine labels need about 3.00 GB of memory, but 2.00 GB are free on this machine: use fewer "
        "labels"
    )
    with pytest.raises(InputError, match=r"1.00 GB are allowed by --search.memory_gb: use fewer"):
        cost_lib.check_memory(2 * 10**9, "nine labels", "use fewer labels", limit=10**9)
    monkeypatch.setattr(cost_lib.host_memory, "available", lambda: None)
    cost_lib.check_memory(2**60, "nine labels", "use fewer labels")
