"""Deterministic programs on GPUs, without which a run does not resume bit for bit there."""

import os

# Excludes operations whose result depends on the order of threads, as
# xla_gpu_exclude_nondeterministic_ops does. It also turns off autotuning, which measures kernels in
# each process and may choose others, with other rounding, when a run is resumed.
_FLAG = "--xla_gpu_deterministic_ops=true"


def enable() -> None:
    """Makes XLA compile deterministic programs for GPUs; programs for other devices always are.

    Must be called before JAX starts its devices, when it reads `XLA_FLAGS`.
    """
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}".strip()
