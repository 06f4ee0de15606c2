"""The table of accelerators: device kinds of JAX, and consistency of the figures."""

import types

import pytest
from jax.experimental import topologies

from vixml_jax.parallel import accelerators


def kinds(*names):
    return [types.SimpleNamespace(device_kind=name) for name in names]


@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_tpu_names_are_device_kinds_of_jax(name, monkeypatch):
    pytest.importorskip("libtpu")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    device = topologies.get_topology_desc(name, platform="tpu").devices[0]
    assert f"/{name.split(':')[0]}" in accelerators.find(device.device_kind).source


def test_interconnects_add_up_to_published_totals():
    """Published totals count all links of a chip in both directions, in GB/s."""
    published = {
        "TPU v5 lite": 400, "TPU v6 lite": 800, "TPU v5": 1200, "NVIDIA H100 80GB HBM3": 900,
        "NVIDIA H200": 900, "NVIDIA A100-SXM4-80GB": 600,
    }  # fmt: skip
    for kind, total in published.items():
        spec = accelerators.find(kind)
        assert 2 * spec.links * spec.link_bandwidth == total * 1e9


def test_speeds_add_up_to_published_pods():
    """v5e: 50.63 PFLOP/s and v6e: 234.9 PFLOP/s with 256 chips, v4: 1.1 EFLOP/s with 4,096."""
    assert accelerators.peak_flops(kinds("TPU v5 lite") * 256) == pytest.approx(50.63e15, rel=0.005)
    assert accelerators.peak_flops(kinds("TPU v6 lite") * 256) == pytest.approx(234.9e15, rel=0.005)
    assert accelerators.peak_flops(kinds("TPU v4") * 4096) == pytest.approx(1.1e18, rel=0.03)
    assert accelerators.find("TPU v5 lite").memory == 16 * 2**30


def test_unknown_devices():
    assert accelerators.find("cpu") is None
    assert accelerators.peak_flops(kinds("cpu", "TPU v4")) == 0.0
