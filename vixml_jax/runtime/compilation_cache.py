"""Compiled programs, kept on disk from one start of a door to the next."""

import os

from absl import flags

_HOME = os.path.join("~", ".cache", "vixml_jax", "programs")


def define_flag(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines `--compile_cache`. It is no part of a run: each start may have another."""
    flags.DEFINE_string(
        "compile_cache",
        os.environ.get("JAX_COMPILATION_CACHE_DIR", _HOME),
        "Directory (gs:// too) where compiled programs are kept, so that the next start does not "
        "compile them again; empty: nowhere.",
        flag_values=values,
    )


def keep_in(directory: str) -> None:
    """Has JAX keep what it compiles there, and look there first; nowhere if it is empty.

    Call it before anything is compiled.
    """
    import jax

    # None, not "": JAX would take the latter for the working directory.
    where = os.path.expanduser(directory) if directory else None
    jax.config.update("jax_compilation_cache_dir", where)
