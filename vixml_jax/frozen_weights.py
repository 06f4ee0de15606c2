"""Weights that training leaves as they are: which they are, and their copy in the run directory."""

import os
from typing import Any

import jax
import jax.numpy as jnp

from vixml_jax.config import Config
from vixml_jax.errors import InputError
from vixml_jax.models.tower import TowerConfig
from vixml_jax.parallel import distributed
from vixml_jax.runtime import tree_utils
from vixml_jax.storage import digests, object_store

DIRECTORY = "frozen"  # In a run directory.


def split(
    params: Any, tower: TowerConfig, *, head_only: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits parameters into trained and frozen ones.

    If the tower has adapters, all its parameters are frozen except for the adapters and the image
    projection. Otherwise nothing is frozen.

    Args:
      params: All parameters.
      tower: Sizes of the tower.
      head_only: Whether everything but the label head is frozen (`--head.only`).
    """

    def trained(path: tree_utils.Path) -> bool:
        if head_only:
            return path[0] == "head"
        adapted = getattr(tower, "lora_rank", 0) and path[0] == "tower"
        return not adapted or path[-1] in ("lora_a", "lora_b") or "image_projection" in path

    return tree_utils.partition(params, trained)


def as_stored(frozen: Any, dtype: str) -> Any:
    """Abstract frozen parameters with the dtype in which they are stored."""
    return jax.tree.map(lambda x: x.update(dtype=jnp.dtype(dtype)), frozen)


def dtype(config: Config) -> str:
    """Data type of the frozen weights: that of the flag under adapters, else float32."""
    return config.lora.base_dtype if config.lora.rank else "float32"


def save(workdir: str, frozen: Any) -> None:
    """Writes the frozen parameters to the run directory, unless an intact copy is there.

    With them the run directory does not depend on the pretrained checkpoint.
    """
    import orbax.checkpoint as ocp

    path = object_store.absolute(os.path.join(workdir, DIRECTORY, "0"))
    if not frozen or distributed.broadcast_from_first(digests.damage(path) is None):
        return
    options = digests.async_options(os.path.dirname(path))
    with ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler(), async_options=options) as saver:
        saver.save(path, args=ocp.args.StandardSave(frozen), force=True)


def load(workdir: str, like: Any) -> Any:
    """Reads what `save` wrote.

    Args:
      workdir: The run directory.
      like: Abstract arrays with shardings.

    Raises:
      InputError: If a file is damaged.
    """
    path = object_store.absolute(os.path.join(workdir, DIRECTORY))
    damage = digests.damage(os.path.join(path, "0"))
    if damage:
        raise InputError(f"{path}: damaged ({damage}); resume training to write it again")
    return digests.read(path, **{"0": like})["0"]
