"""The table of accelerators: names as JAX has them, figures that agree with one another."""

import types

import pytest
from jax.experimental import topologies

from vixml_jax.parallel import accelerators


def kinds(*names):
    return [types.SimpleNamespace(device_kind=name) for name in names]


@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_tpus_are_called_as_jax_calls_them(name, monkeypatch):
    pytest.importorskip("libtpu")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    found = topologies.get_topology_desc(name, platform="tpu").devices[0]
    assert f"/{name.split(':')[0]}" in accelerators.about(found.device_kind).source


def test_interconnects_add_up_to_what_is_published():
    """All links of a chip, both ways, GB/s."""
    published = {
        "TPU v5 lite": 400, "TPU v6 lite": 800, "TPU v5": 1200, "NVIDIA H100 80GB HBM3": 900,
        "NVIDIA H200": 900, "NVIDIA A100-SXM4-80GB": 600,
    }  # fmt: skip
    for kind, total in published.items():
        one = accelerators.about(kind)
        assert 2 * one.links * one.link_bandwidth == total * 1e9


def test_a_pod_has_what_is_published_of_it():
    """v5e: 50.63 PFLOP/s and v6e: 234.9 PFLOP/s in 256 chips, v4: 1.1 EFLOP/s in 4,096."""
    assert accelerators.peak_flops(kinds("TPU v5 lite") * 256) == pytest.approx(50.63e15, rel=0.005)
    assert accelerators.peak_flops(kinds("TPU v6 lite") * 256) == pytest.approx(234.9e15, rel=0.005)
    assert accelerators.peak_flops(kinds("TPU v4") * 4096) == pytest.approx(1.1e18, rel=0.03)
    assert accelerators.about("TPU v5 lite").memory == 16 * 2**30


def test_of_one_that_is_not_known_nothing_is_claimed():
    assert accelerators.about("cpu") is None
    assert accelerators.peak_flops(kinds("cpu", "TPU v4")) == 0.0
