"""Available memory, computed from made-up files of the kernel."""

import pytest

from vixml_jax.runtime import host_memory

MB = 2**20


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


MACHINE = {"proc/meminfo": "MemTotal: 9999999 kB\nMemFree: 1 kB\nMemAvailable: 512000 kB\n"}


def test_machine_without_groups(tmp_path):
    write(tmp_path, MACHINE)
    assert host_memory.available(str(tmp_path)) == 512_000 * 1024


@pytest.mark.parametrize("limited", ["job/step", "job", ""])
def test_limit_of_the_own_group_or_a_parent(limited, tmp_path):
    group = f"sys/fs/cgroup/{limited}".rstrip("/")
    write(
        tmp_path,
        {
            **MACHINE,
            "proc/self/cgroup": "0::/job/step\n",
            "sys/fs/cgroup/job/step/memory.max": "max\n",
            f"{group}/memory.max": f"{300 * MB}\n",
            f"{group}/memory.current": f"{250 * MB}\n",
            f"{group}/memory.stat": f"anon {100 * MB}\ninactive_file {20 * MB}\n",
        },
    )
    assert host_memory.available(str(tmp_path)) == 70 * MB


def test_control_groups_version_1(tmp_path):
    group = "sys/fs/cgroup/memory/job"
    write(
        tmp_path,
        {
            **MACHINE,
            "proc/self/cgroup": "5:cpu,cpuacct:/other\n4:memory:/job\n",
            f"{group}/memory.limit_in_bytes": f"{200 * MB}\n",
            f"{group}/memory.usage_in_bytes": f"{150 * MB}\n",
            f"{group}/memory.stat": f"total_inactive_file {MB}\n",
        },
    )
    assert host_memory.available(str(tmp_path)) == 51 * MB


def test_unlimited_groups_and_missing_files(tmp_path):
    assert host_memory.available(str(tmp_path)) is None
    write(tmp_path, {**MACHINE, "proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"})
    assert host_memory.available(str(tmp_path)) == 512_000 * 1024


def test_this_machine():
    assert 0 < host_memory.available() < 2**50
