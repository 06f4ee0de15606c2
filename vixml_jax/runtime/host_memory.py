"""The memory of host and devices; how this process keeps what XLA allocates anew in every step."""

import ctypes
import os
import pathlib
import resource
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jax

# https://man7.org/linux/man-pages/man3/mallopt.3.html
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_pages() -> None:
    """Has glibc keep freed memory instead of returning it to the system.

    On a CPU, XLA takes the temporaries of a step from malloc and frees them after it; returned
    pages come back one fault at a time, which can cost as long as the step itself. Peak memory is
    the same. Does nothing where the C library is another.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)  # Never.
        mallopt(_M_ARENA_MAX, 1)


def available(root: str = "/") -> int | None:
    """Bytes that this process may still take on the host; None: the system does not say.

    The least of what the machine has left and of what the control groups that the process is in
    (containers, batch systems) leave it; pages of files that could be dropped count as left.

    Args:
      root: Where /proc and /sys lie, for tests.
    """
    try:
        lines = pathlib.Path(root, "proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        left = [int(fields["MemAvailable"].split()[0]) * 1024]
    except (OSError, KeyError, ValueError):
        return None
    return max(0, min(left + _left_by_groups(pathlib.Path(root))))


def _left_by_groups(root: pathlib.Path) -> list[int]:
    """What each control group with a limit leaves, from the process's own up to the root's."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    left = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # https://docs.kernel.org/admin-guide/cgroup-v2.html
            top, limit, used, droppable = "", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, limit, used = "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            droppable = "total_inactive_file"
        else:
            continue
        place = pathlib.PurePosixPath(path.lstrip("/"))
        for group in (place, *place.parents):
            directory = root / "sys/fs/cgroup" / top / group
            try:
                most, now = (int((directory / name).read_text()) for name in (limit, used))
                stat = dict(x.split() for x in (directory / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # Not to be seen from here, or "max": no limit.
                continue
            left.append(most - now + int(stat.get(droppable, 0)))
    return left


def of_a_device(device: "jax.Device | None" = None) -> int:
    """Bytes that a device has for arrays, by default one of this process; 0: it does not say.

    The devices of a CPU share what the machine has.
    """
    import jax

    device = device or jax.local_devices()[0]
    if device.platform == "cpu":
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return pages // jax.local_device_count()
    return (device.memory_stats() or {}).get("bytes_limit", 0)


def peak_of_a_device() -> int:
    """The most bytes that arrays have taken so far of any one device of this process.

    Where devices do not say, as those of a CPU: the most that the process has held at once.
    """
    import jax

    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peak = max(one.get("peak_bytes_in_use", 0) for one in stats)
    if peak:
        return peak
    # https://man7.org/linux/man-pages/man2/getrusage.2.html
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
