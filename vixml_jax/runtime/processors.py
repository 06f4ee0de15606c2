"""How many processors this process may use."""

import os


def usable() -> int:
    """Returns the number of processors that this process may use; 1 where systems do not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
