"""The memory of devices, and how this process keeps what XLA allocates anew in every step."""

import ctypes
import os
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
