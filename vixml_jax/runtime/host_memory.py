"""Available and peak memory of host and devices, and the allocator settings of a process."""

import ctypes
import os
import pathlib
import resource
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jax

# https://man7.org/linux/man-pages/man3/mallopt.3.html
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_LARGE = 32 << 20  # Bytes; the largest threshold that glibc takes.
_KEPT = 128 << 20  # Bytes of freed small blocks that stay with the process.


def bound_freed_pages() -> None:
    """Makes glibc return the pages of large freed blocks, and keep those of small ones.

    On a CPU, XLA allocates the temporaries of each step with malloc, in one block, and frees it
    afterwards. In the heap such a block leaves a hole that a batch or a program soon splits, and
    the next step needs as much again: the process comes to twice the memory that it uses. Blocks
    above the threshold are mapped on their own instead, so that peak memory is what is in use; that
    costs a page fault per page and step. Does nothing with other C libraries.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE)  # Otherwise glibc moves it.
        mallopt(_M_TRIM_THRESHOLD, _KEPT)
        mallopt(_M_ARENA_MAX, 1)


def available(root: str = "/") -> int | None:
    """Bytes of host memory that this process can still allocate; None if unknown.

    This is the minimum over the machine's available memory and the remaining limits of the
    process's control groups (containers, batch systems). Reclaimable file pages count as available.

    Args:
      root: Directory that contains proc and sys, for tests.
    """
    try:
        lines = pathlib.Path(root, "proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        left = [int(fields["MemAvailable"].split()[0]) * 1024]
    except (OSError, KeyError, ValueError):
        return None
    return max(0, min(left + _left_in_groups(pathlib.Path(root))))


def _left_in_groups(root: pathlib.Path) -> list[int]:
    """Bytes left in each control group with a limit, from the process's own up to the root."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    left = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # https://docs.kernel.org/admin-guide/cgroup-v2.html
            top, limit, used, reclaimable = "", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, limit, used = "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            reclaimable = "total_inactive_file"
        else:
            continue
        own_group = pathlib.PurePosixPath(path.lstrip("/"))
        for group in (own_group, *own_group.parents):
            directory = root / "sys/fs/cgroup" / top / group
            try:
                most, now = (int((directory / name).read_text()) for name in (limit, used))
                stat = dict(x.split() for x in (directory / "memory.stat").read_text().splitlines())
            except (
                OSError,
                ValueError,
            ):  # Not visible in this container, or "max", which is no limit.
                continue
            left.append(most - now + int(stat.get(reclaimable, 0)))
    return left


def device_memory(device: "jax.Device | None" = None) -> int:
    """Bytes available for arrays on a device, by default a local one; 0 if unknown.

    The devices of a CPU share equally what the process holds and what it can still allocate.
    """
    import jax

    device = device or jax.local_devices()[0]
    if device.platform == "cpu":
        left = available()
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if left is not None:
            total = min(total, left + resident())
        return total // jax.local_device_count()
    return (device.memory_stats() or {}).get("bytes_limit", 0)


def peak_device_memory() -> int:
    """Peak bytes of arrays on any local device so far.

    For devices that do not report it, such as CPUs, this is the peak memory of the process.
    """
    import jax

    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max(stat.get("peak_bytes_in_use", 0) for stat in stats) or peak_host_memory()


def resident() -> int:
    """Bytes of memory that this process holds now; its peak where the system reports no other."""
    try:
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return peak_host_memory()
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_host_memory() -> int:
    """Peak bytes of memory of this process so far."""
    # https://man7.org/linux/man-pages/man2/getrusage.2.html
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
