"""The run directory: its files, and how a trained model is restored from it."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, Literal, TypedDict, get_type_hints

import jax
import jax.numpy as jnp
import msgspec
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
from vixml_jax.models.decoder import DecoderConfig
from vixml_jax.models.tower import Tower, TowerConfig
from vixml_jax.parallel import distributed, sharding
from vixml_jax.runtime import tree_utils
from vixml_jax.storage import atomic, digests, json_files, object_store
from vixml_jax.structs import LabelState

CONFIG = "config.json"
TOWER = "tower.json"
CHECKPOINTS = "checkpoints"
BEST = "best"
FROZEN = "frozen"
# Flags whose values may change when a run is resumed.
FREE_FLAGS = ("workdir", "mesh", "loop.save_every", "loop.save_minutes", "loop.max_to_keep")
FAMILIES = {"encoder": BertConfig, "decoder": DecoderConfig}
_NOT_A_RUN = "expected a run directory written by train"

_LayoutFields = TypedDict("_LayoutFields", get_type_hints(Layout), total=False)


class _TowerFile(msgspec.Struct):
    """Contents of tower.json.

    Attributes:
      family: A key of `FAMILIES`.
      tower: Fields of the tower's config.
      layout: Fields of the layout of items.
      content_hash: Content hash of the prepared data.
      shards: Number of shards in which batches are packed.
      shares: Name of `shards` in version 0.1.
    """

    family: Literal["encoder", "decoder"]
    tower: dict[str, Any]
    layout: _LayoutFields
    content_hash: str
    shards: int = 0
    shares: int = 0


def open_run(
    config: Config, tower: TowerConfig, layout: Layout, content_hash: str, mesh: Mesh
) -> int:
    """Creates the run directory, or checks that an existing one belongs to the same run.

    Args:
      config: The flags of the run.
      tower: Sizes of the tower.
      layout: Layout of items.
      content_hash: Content hash of the prepared data.
      mesh: The mesh of this start of the run.

    Returns:
      The number of shards in which batches are packed; see `sharding.num_shards`.

    Raises:
      InputError: If the directory holds a run with another configuration or other data.
    """
    path = os.path.join(config.workdir, CONFIG)
    family = next(name for name, kind in FAMILIES.items() if isinstance(tower, kind))
    contents = {
        "family": family,
        "tower": dataclasses.asdict(tower),
        "layout": layout._asdict(),
        "content_hash": content_hash,
        "shards": sharding.num_shards(mesh),
    }
    if epath.Path(path).exists():
        differences = config_lib.differences(config_lib.load(path), config)
        free = tuple(f"--{name}:" for name in FREE_FLAGS)
        changed = [line for line in differences if not line.startswith(free)]
        recorded = _read_tower(config.workdir)
        if not changed and recorded.content_hash != content_hash:
            changed = [f"--data={config.data} has other content than the run was started on"]
        if changed:
            raise InputError(
                f"--workdir={config.workdir} holds a run with another configuration "
                f"({'; '.join(changed)}): use the same flags to resume it, or another --workdir"
            )
        if differences and jax.process_index() == 0:
            atomic.write_text(path, config.to_json())
        shards = sharding.num_shards(mesh, recorded.shards)
        if shards != recorded.shards:
            print(
                f"warning: batches are packed in {shards} shards from here on instead of "
                f"{recorded.shards}, which is no multiple of the {sharding.num_row_shards(mesh)} "
                "row shards of this mesh; dropout differs from a run on the former mesh"
            )
        return shards
    if (epath.Path(config.workdir) / CHECKPOINTS).is_dir():
        raise InputError(
            f"{path}: not found, although the directory holds checkpoints; use another --workdir"
        )
    epath.Path(config.workdir).mkdir(parents=True, exist_ok=True)
    json_files.write(os.path.join(config.workdir, TOWER), contents)
    atomic.write_text(path, config.to_json())
    return contents["shards"]


def _read_tower(workdir: str) -> _TowerFile:
    contents = json_files.read(os.path.join(workdir, TOWER), _TowerFile, _NOT_A_RUN)
    contents.shards = contents.shards or contents.shares
    if "word_scale" in contents.tower:  # Its name in version 0.1.
        contents.tower["embedding_scale"] = contents.tower.pop("word_scale")
    return contents


def path_of(directory: str, name: str, name_0_1: str) -> str:
    """Path of a file or directory by its name, or by that of version 0.1 if only that exists."""
    path, path_0_1 = (os.path.join(directory, x) for x in (name, name_0_1))
    return path_0_1 if os.path.exists(path_0_1) and not os.path.exists(path) else path


def content_hash(workdir: str) -> str:
    """Content hash of the data that the run was started on.

    Raises:
      InputError: If the directory holds no run.
    """
    return _read_tower(workdir).content_hash


def read_config(workdir: str, *, data: str = "", mesh: str = "") -> Config:
    """The flags of a run, with the paths that it has now.

    Args:
      workdir: Run directory, which may have been moved.
      data: Directory of its data; empty for the one used in training.
      mesh: Mesh to use; empty for the one used in training.

    Raises:
      InputError: If the directory holds no run.
    """
    config = config_lib.load(os.path.join(workdir, CONFIG))
    return dataclasses.replace(
        config, workdir=workdir, data=data or config.data, mesh=mesh or config.mesh
    )


def read_tower(workdir: str) -> tuple[TowerConfig, Layout]:
    """Sizes of the tower and layout of items of a run.

    Raises:
      InputError: If the directory holds no run.
    """
    contents = _read_tower(workdir)
    try:
        tower = msgspec.convert(contents.tower, FAMILIES[contents.family])
    except msgspec.ValidationError as error:
        path = os.path.join(workdir, TOWER)
        raise InputError(f"{path}: tower: {error}; {_NOT_A_RUN}") from None
    return tower, Layout(**contents.layout)


def open_dataset(config: Config, cache: str = object_store.CACHE) -> PreparedDataset:
    """The prepared data of a run; the built-in data set is prepared on first use.

    Args:
      config: The flags of the run.
      cache: Local directory for copies of data from an object store. If the run directory is in an
        object store, the built-in data set is prepared there too, and in the run directory
        otherwise.
    """
    object_store.check(config.workdir, "workdir")
    object_store.check(config.data, "data")
    if not object_store.is_local(config.data):
        content = store.read_info(config.data)["content_hash"]
        name = f"{os.path.basename(config.data.rstrip('/'))}-{content}"
        copy = object_store.local_copy(config.data, name, cache)
        return PreparedDataset.open(copy)
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
    """The mesh of `--mesh` over the given devices, by default all.

    Raises:
      InputError: If its size is not the number of devices.
    """
    try:
        return sharding.create_mesh(**config_lib.mesh_sizes(config.mesh), devices=devices)
    except ValueError as error:
        raise InputError(f"--mesh={config.mesh}: {error}") from None


def build_model(
    config: Config, tower: TowerConfig, layout: Layout, num_labels: int, mesh: Mesh
) -> Model:
    """The model described by the flags, without parameters."""
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
        microbatch_rows=config.batch.microbatch_rows,
    )


def split_params(params: Any, tower: TowerConfig) -> tuple[Any, Any]:
    """Splits parameters into trained and frozen ones.

    If the tower has adapters, all its parameters are frozen except for the adapters and the image
    projection. Otherwise nothing is frozen.
    """

    def trained(path: tree_utils.Path) -> bool:
        adapted = getattr(tower, "lora_rank", 0) and path[0] == "tower"
        return not adapted or path[-1] in ("lora_a", "lora_b") or "image_projection" in path

    return tree_utils.partition(params, trained)


def as_frozen(frozen: Any, dtype: str) -> Any:
    """Abstract frozen parameters with the dtype in which they are stored."""
    return jax.tree.map(lambda x: x.update(dtype=jnp.dtype(dtype)), frozen)


def save_frozen(workdir: str, frozen: Any) -> None:
    """Writes the frozen parameters to the run directory, unless an intact copy is there.

    With them the run directory does not depend on the pretrained checkpoint.
    """
    import orbax.checkpoint as ocp

    path = object_store.absolute(os.path.join(workdir, FROZEN, "0"))
    if not frozen or distributed.broadcast_from_first(digests.damage(path) is None):
        return
    options = digests.async_options(os.path.dirname(path))
    with ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler(), async_options=options) as saver:
        saver.save(path, args=ocp.args.StandardSave(frozen), force=True)


def find_model(workdir: str) -> tuple[str, int]:
    """Directory and step of the model to evaluate: the best so far, or else the newest.

    Damaged checkpoints are skipped with a warning and left in place.

    Raises:
      InputError: If there is no intact checkpoint, or the best model is damaged.
    """
    directory, best = (object_store.absolute(os.path.join(workdir, d)) for d in (CHECKPOINTS, BEST))
    if not epath.Path(directory).is_dir():
        raise InputError(f"{directory}: not found; {_NOT_A_RUN}")
    step, damaged = newest_checkpoint(directory)
    listed = "; ".join(f"the checkpoint of step {n} is damaged ({damaged[n]})" for n in damaged)
    if step is None:
        raise InputError(f"{directory}: {listed or 'no checkpoint has been written yet'}")
    if damaged:
        print(f"warning: {directory}: {listed}; reading step {step} instead")
    position = digests.read(os.path.join(directory, str(step)), position=None)["position"]
    best_step = position["best_step"]
    if best_step is None:
        return directory, step
    if not (epath.Path(best) / str(best_step)).is_dir():
        raise InputError(f"{best}: step {best_step}, the best model, is missing")
    damage = digests.damage(os.path.join(best, str(best_step)))
    if damage:
        raise InputError(f"{best}: step {best_step}, the best model, is damaged ({damage})")
    return best, best_step


def newest_checkpoint(directory: str) -> tuple[int | None, dict[int, str]]:
    """The newest intact step, and what is wrong with later ones; see `digests.newest_intact`.

    Process 0 verifies the checkpoints; the other processes get the step, but no descriptions.
    """
    step, damaged = None, {}
    if jax.process_index() == 0:
        step, damaged = digests.newest_intact(directory)
    step = distributed.broadcast_from_first(-1 if step is None else step)
    return (None if step < 0 else step), damaged


def restore_model(workdir: str, model: Model) -> tuple[Any, LabelState, int]:
    """Parameters, label state and step of the model that `find_model` returns, on its mesh.

    Raises:
      InputError: If there is no intact checkpoint.
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
        abstract_frozen = sharding.stored_tree(as_frozen(frozen, dtype), model.mesh)
        path = object_store.absolute(os.path.join(workdir, FROZEN))
        damage = digests.damage(os.path.join(path, "0"))
        if damage:
            raise InputError(f"{path}: damaged ({damage}); resume training to write it again")
        params = tree_utils.merge(params, digests.read(path, **{"0": abstract_frozen})["0"])
    return params, LabelState(*restored["labels"]), step
