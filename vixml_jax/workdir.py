"""A run directory: where things lie in it, and how a trained model comes back from it."""

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from vixml_jax import config as config_lib
from vixml_jax.config import Config
from vixml_jax.data import preprocessing, store
from vixml_jax.data.packing import Layout
from vixml_jax.data.store import PreparedDataset
from vixml_jax.errors import InputError
from vixml_jax.labels.prototypes import Combiner
from vixml_jax.labels.table import LabelTable
from vixml_jax.modeling import Model
from vixml_jax.models.bert import BertConfig
from vixml_jax.models.decoder import DecoderConfig, Rope
from vixml_jax.models.tower import Tower, TowerConfig
from vixml_jax.parallel import distributed, sharding
from vixml_jax.runtime import tree_utils
from vixml_jax.storage import atomic, digests, object_store
from vixml_jax.structs import LabelState

CONFIG = "config.json"
TOWER = "tower.json"
CHECKPOINTS = "checkpoints"
BEST = "best"
FROZEN = "frozen"
# Flags that a run may be resumed with other values of: it is the same run.
FREE_FLAGS = ("workdir", "mesh", "loop.save_every", "loop.save_minutes", "loop.keep")
FAMILIES = {"encoder": BertConfig, "decoder": DecoderConfig}


def open_run(
    config: Config, tower: TowerConfig, layout: Layout, content_hash: str, mesh: Mesh
) -> int:
    """Makes the run directory, or checks that the one found is of the same run.

    Returns:
      In how many shares its batches are packed (see `sharding.num_shares`).

    Raises:
      InputError: If the directory holds another configuration, or other data.
    """
    path = os.path.join(config.workdir, CONFIG)
    family = next(name for name, kind in FAMILIES.items() if isinstance(tower, kind))
    about = {
        "family": family,
        "tower": dataclasses.asdict(tower),
        "layout": layout._asdict(),
        "content_hash": content_hash,
        "shares": sharding.num_shares(mesh),
    }
    if epath.Path(path).exists():
        found = config_lib.differences(config_lib.load(path), config)
        free = tuple(f"--{name}:" for name in FREE_FLAGS)
        changed = [line for line in found if not line.startswith(free)]
        recorded = _read_tower(config.workdir)
        if not changed and recorded["content_hash"] != content_hash:
            changed = [f"--data={config.data} has other content than the run was started on"]
        if changed:
            raise InputError(
                f"--workdir={config.workdir} holds a run of another configuration "
                f"({'; '.join(changed)}): use the same flags to resume it, or another --workdir"
            )
        if found and jax.process_index() == 0:
            atomic.write_text(path, config.to_json())
        shares = sharding.num_shares(mesh, recorded["shares"])
        if shares != recorded["shares"]:
            print(
                f"batches are packed in {shares} shares instead of {recorded['shares']}, of which "
                "this mesh divides no part: dropout is drawn differently from here on"
            )
        return shares
    if (epath.Path(config.workdir) / CHECKPOINTS).is_dir():
        raise InputError(
            f"{path}: not found, but there are checkpoints beside it; use another --workdir"
        )
    epath.Path(config.workdir).mkdir(parents=True, exist_ok=True)
    atomic.write_text(os.path.join(config.workdir, TOWER), json.dumps(about, indent=2) + "\n")
    atomic.write_text(path, config.to_json())
    return about["shares"]


def _read_tower(workdir: str) -> dict[str, Any]:
    path = os.path.join(workdir, TOWER)
    try:
        return json.loads(epath.Path(path).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: {error}; expected a run directory that train wrote") from None


def content_hash(workdir: str) -> str:
    """Of the data that the run was started on.

    Raises:
      InputError: If the directory is not a run's.
    """
    return _read_tower(workdir)["content_hash"]


def read_config(workdir: str, *, data: str = "", mesh: str = "") -> Config:
    """The flags of a run, where it lies now.

    Args:
      workdir: Of the run; it may have moved.
      data: Where its data are now; empty: as trained.
      mesh: On which it shall be used; empty: as trained.

    Raises:
      InputError: If the directory is not a run's.
    """
    config = config_lib.load(os.path.join(workdir, CONFIG))
    return dataclasses.replace(
        config, workdir=workdir, data=data or config.data, mesh=mesh or config.mesh
    )


def read_tower(workdir: str) -> tuple[TowerConfig, Layout]:
    """The tower's sizes, and how items are written for it, as the run was started with.

    Raises:
      InputError: If the directory is not a run's.
    """
    about = _read_tower(workdir)
    tower = dict(about["tower"])
    for name in ("rope", "local_rope"):
        if name in tower:
            tower[name] = Rope(**tower[name])
    if "lora_maps" in tower:
        tower["lora_maps"] = tuple(tower["lora_maps"])
    layout = {
        name: tuple(part if isinstance(part, str) else tuple(part) for part in value)
        if name in ("seen", "unseen")
        else tuple(value)
        if isinstance(value, list)
        else value
        for name, value in about["layout"].items()
    }
    return FAMILIES[about["family"]](**tower), Layout(**layout)


def open_dataset(config: Config, cache: str = object_store.CACHE) -> PreparedDataset:
    """The prepared data of a run; the built-in data are prepared in the run directory first.

    Args:
      config: Names them.
      cache: Where copies of data from a store of objects are kept; for a run directory there, the
        built-in data too.
    """
    object_store.check(config.workdir, "workdir")
    object_store.check(config.data, "data")
    if not object_store.is_local(config.data):
        content = store.read_info(config.data)["content_hash"]
        name = f"{os.path.basename(config.data.rstrip('/'))}-{content}"
        return PreparedDataset.open(object_store.copied(config.data, name, cache))
    if config.data != "glyphs":
        return PreparedDataset.open(config.data)
    path = os.path.join(config.workdir, "data")
    if not object_store.is_local(path):
        path = os.path.join(os.path.expanduser(cache), f"glyphs-{store.FORMAT}")
    if not os.path.exists(path):
        return preprocessing.prepare(
            preprocessing.read_source(preprocessing.GLYPHS),
            path,
            preprocessing.Settings(max_tokens=16),
        )
    return PreparedDataset.open(path)


def make_mesh(config: Config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh that `--mesh` names, over these devices; None: over all that there are.

    Raises:
      InputError: If there are not that many devices.
    """
    try:
        return sharding.create_mesh(**config_lib.mesh_sizes(config.mesh), devices=devices)
    except ValueError as error:
        raise InputError(f"--mesh={config.mesh}: {error}") from None


def build_model(
    config: Config, tower: TowerConfig, layout: Layout, num_labels: int, mesh: Mesh
) -> Model:
    """The model that the flags describe; no parameters yet."""
    labels = config.labels
    return Model(
        tower=Tower(tower),
        combiner=Combiner(labels.num_heads, labels.mlp_width, labels.dropout)
        if labels.prototypes
        else None,
        table=LabelTable(mesh, num_labels, labels.num_free, tower.width),
        mesh=mesh,
        row_width=config.batch.row_width,
        layout=layout,
        encode_chunk=config.batch.encode_chunk,
    )


def split_params(params: Any, tower: TowerConfig) -> tuple[Any, Any]:
    """What is trained, and what is frozen: a tower under adapters, but for them and pictures."""

    def trained(path: tree_utils.Path) -> bool:
        adapted = getattr(tower, "lora_rank", 0) and path[0] == "tower"
        return not adapted or path[-1] in ("lora_a", "lora_b") or "image_projection" in path

    return tree_utils.partition(params, trained)


def as_frozen(frozen: Any, dtype: str) -> Any:
    """Abstract frozen parameters, in the dtype that they are kept in."""
    return jax.tree.map(lambda x: x.update(dtype=jnp.dtype(dtype)), frozen)


def save_frozen(workdir: str, frozen: Any) -> None:
    """Writes the frozen parameters once, so that the run directory is complete by itself; again,
    where what is there is damaged."""
    import orbax.checkpoint as ocp

    path = object_store.absolute(os.path.join(workdir, FROZEN, "0"))
    if not frozen or distributed.first_says(digests.damage(path) is None):
        return
    options = digests.writer(os.path.dirname(path))
    with ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler(), async_options=options) as saver:
        saver.save(path, args=ocp.args.StandardSave(frozen), force=True)


def find_model(workdir: str) -> tuple[str, int]:
    """Directory and step of what evaluation reads: the model chosen so far, else the newest.

    A damaged checkpoint is passed over, which is said; nothing is moved.

    Raises:
      InputError: If there is no checkpoint that is whole, or the model chosen is not.
    """
    directory, best = (object_store.absolute(os.path.join(workdir, d)) for d in (CHECKPOINTS, BEST))
    if not epath.Path(directory).is_dir():
        raise InputError(f"{directory}: not found; expected a run directory that train wrote")
    step, damaged = digests.newest_whole(directory)
    listed = "; ".join(f"the checkpoint of step {n} is damaged ({damaged[n]})" for n in damaged)
    if step is None:
        raise InputError(f"{directory}: {listed or 'holds no checkpoint yet'}")
    if damaged:
        print(f"{directory}: {listed}; reading that of step {step}")
    chosen = digests.read(os.path.join(directory, str(step)), position=None)["position"][
        "best_step"
    ]
    if chosen is None:
        return directory, step
    if not (epath.Path(best) / str(chosen)).is_dir():
        raise InputError(f"{best}: lacks step {chosen}, which training chose")
    said = digests.damage(os.path.join(best, str(chosen)))
    if said:
        raise InputError(f"{best}: step {chosen}, which training chose, is damaged ({said})")
    return best, chosen


def restore_model(workdir: str, model: Model) -> tuple[Any, LabelState, int]:
    """All parameters and the label state that `find_model` finds, on the model's mesh, their step.

    Raises:
      InputError: If there is no checkpoint.
    """
    directory, step = find_model(workdir)
    trained, frozen = split_params(model.abstract_params, model.tower.config)
    abstract = {
        "params": sharding.stored_tree(trained, model.mesh),
        "labels": sharding.stored_tree(model.table.abstract_state, model.mesh),
    }
    restored = digests.read(os.path.join(directory, str(step)), model=abstract)["model"]
    params = restored["params"]
    if frozen:
        dtype = config_lib.load(os.path.join(workdir, CONFIG)).lora.base_dtype
        kept = sharding.stored_tree(as_frozen(frozen, dtype), model.mesh)
        path = object_store.absolute(os.path.join(workdir, FROZEN))
        said = digests.damage(os.path.join(path, "0"))
        if said:
            raise InputError(f"{path}: damaged ({said}); train writes it again when it is started")
        params = tree_utils.merge(params, digests.read(path, **{"0": kept})["0"])
    return params, LabelState(*restored["labels"]), step
