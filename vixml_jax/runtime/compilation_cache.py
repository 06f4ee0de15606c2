"""Persistent cache of compiled programs, so that a command compiles them only once."""

import os

from absl import flags

_DEFAULT = os.path.join("~", ".cache", "vixml_jax", "programs")


def define_flag(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines `--compile_cache`, which may differ between starts of the same run."""
    flags.DEFINE_string(
        "compile_cache",
        os.environ.get("JAX_COMPILATION_CACHE_DIR", _DEFAULT),
        "Directory (local or gs://) for compiled programs, so that later starts do not compile "
        "them again; empty disables the cache.",
        flag_values=values,
    )


def enable(directory: str) -> None:
    """Makes JAX cache compiled programs in a directory; an empty name disables the cache.

    Must be called before anything is compiled.
    """
    import jax

    # JAX would take an empty string for the working directory.
    path = os.path.expanduser(directory) if directory else None
    jax.config.update("jax_compilation_cache_dir", path)
