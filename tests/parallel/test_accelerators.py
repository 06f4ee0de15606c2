"""The table of accelerators: device kinds of JAX, and consistency of the figures."""

import os
import sys
import types

import jax
import pytest

from vixml_jax.errors import InputError
from vixml_jax.parallel import absent_devices, accelerators


def kinds(*names):
    return [types.SimpleNamespace(device_kind=name) for name in names]


@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_tpu_names_are_device_kinds_of_jax(name, monkeypatch):
    pytest.importorskip("libtpu")
    jax.devices()  # Has read the flags of XLA.
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_not_known_to_libtpu=1 --xla_dump_to=")
    device = absent_devices.find(name)[0]
    assert os.environ["XLA_FLAGS"] == "--xla_dump_to="
    kind = accelerators.TPUS[name.split(":")[0]][0]
    assert device.device_kind == kind and device.platform == "tpu"
    assert f"/{name.split(':')[0]}" in accelerators.find(kind).source


@pytest.mark.parametrize("name", accelerators.GPUS)
def test_absent_gpus_are_those_of_the_table(name):
    pytest.importorskip("jax_cuda12_plugin", reason="the CUDA compiler (extra gpu-plan) is missing")
    gpu = accelerators.GPUS[name]
    devices = absent_devices.find(f"{name}:8")
    assert len(devices) == 8 and {device.device_kind for device in devices} == {gpu.kind}
    assert devices[0].platform == "gpu"
    assert devices[0].compute_capability == ".".join(map(str, gpu.capability))


def test_gpu_units_and_clocks_add_up_to_published_speeds():
    """Each unit has a multiplication and an addition a clock."""
    for gpu in accelerators.GPUS.values():
        speed = 2 * gpu.cores * gpu.float32_units * gpu.clock * 1e9
        assert speed == pytest.approx(accelerators.KNOWN[gpu.kind].float32_flops[2], rel=0.01)


def test_the_target_of_a_gpu_has_the_published_figures():
    text = absent_devices.gpu_target(accelerators.GPUS["l40s"])
    for line in (
        "major: 8 minor: 9", "core_count: 142", "memory_bandwidth: 864000000000",
        "device_memory_size: 48000000000", "shared_memory_per_block_optin: 101376",
        'device_description_str: "NVIDIA L40S"',
    ):  # fmt: skip
        assert line in text


@pytest.mark.parametrize("name", ["v5e", "v9:2x2", "h100", "h100:9", "h100:0", "h100:2x4", "v5e:8"])
def test_unknown_devices_are_refused(name):
    with pytest.raises(InputError, match=f"^--plan_devices={name}: expected a TPU slice "):
        absent_devices.find(name)


def test_a_missing_gpu_compiler_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_cuda12_plugin", None)
    with pytest.raises(InputError) as refused:
        absent_devices.find("h100:8")
    assert str(refused.value) == (
        "--plan_devices=h100:8: the GPU compiler is missing; pip install 'vixml_jax[gpu-plan]'"
    )


def test_interconnects_add_up_to_published_totals():
    """Published totals count all links of a chip in both directions, in GB/s."""
    published = {
        "TPU v5 lite": 400, "TPU v6 lite": 800, "TPU v5": 1200, "NVIDIA H100 80GB HBM3": 900,
        "NVIDIA H200": 900, "NVIDIA B200": 1800, "NVIDIA A100-SXM4-80GB": 600, "NVIDIA L40S": 64,
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
