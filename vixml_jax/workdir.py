"""The run directory: its files, and the model that they describe."""

import dataclasses
import os
import re
from collections.abc import Sequence
from typing import Any, Literal, TypedDict, get_type_hints

import jax
import msgspec
from etils import epath
from jax.sharding import Mesh

from vixml_jax import config as config_lib
from vixml_jax import run_data
from vixml_jax.config import Config
from vixml_jax.data import on_demand, preprocessing, store
from vixml_jax.data.packing import Layout
from vixml_jax.data.store import PreparedDataset
from vixml_jax.errors import InputError
from vixml_jax.labels.head import LabelHead
from vixml_jax.labels.prototypes import Combiner
from vixml_jax.labels.table import LabelTable
from vixml_jax.modeling import Model
from vixml_jax.models import hf_configs
from vixml_jax.models.bert import BertConfig
from vixml_jax.models.decoder import DecoderConfig
from vixml_jax.models.modernbert import ModernBertConfig
from vixml_jax.models.tower import Tower, TowerConfig
from vixml_jax.parallel import sharding
from vixml_jax.runtime import console
from vixml_jax.storage import object_store, sealed

CONFIG = "config.json"
TOWER = "tower.json"
CHECKPOINTS = "checkpoints"
BEST = "best"
# What depends on a trained model. It would be taken for that of another run in the same directory.
# The last two are names of version 0.1.
_OF_A_MODEL = (
    CHECKPOINTS, BEST, "frozen", "vectors", "evaluation", "serving", "label_updates", "answers",
    "changes",
)  # fmt: skip
# Flags whose values may change when a run is resumed. The data may move; their content may not
# change, which their content hash says.
FREE_FLAGS = ("data", "workdir", "mesh", "loop.save_every", "loop.save_minutes", "loop.max_to_keep")
# --head.loss=auto is bce from these numbers on, else decoupled_softmax: of labels per training
# query, and of training queries per label, without which bce hardly learns the rare labels.
BCE_FROM = 5.5
BCE_FROM_PER_LABEL = 25
FAMILIES = {"encoder": BertConfig, "modernbert": ModernBertConfig, "decoder": DecoderConfig}
NOT_A_RUN = "expected a run directory written by train"
_RESTORE = f"{NOT_A_RUN}; put the file back from a copy of the run"

_LayoutFields = TypedDict("_LayoutFields", get_type_hints(Layout), total=False)


class _TowerFile(msgspec.Struct):
    """Contents of tower.json.

    Attributes:
      family: A key of `FAMILIES`.
      tower: Fields of the tower's config.
      layout: Fields of the layout of items.
      content_hash: Content hash of the prepared data.
      shards: Number of shards in which batches are packed.
      head_loss: The loss of the label head, which --head.loss=auto chose; empty without a head.
      shares: Name of `shards` in version 0.1.
    """

    family: Literal["encoder", "modernbert", "decoder"]
    tower: dict[str, Any]
    layout: _LayoutFields
    content_hash: str
    shards: int = 0
    head_loss: str = ""
    shares: int = 0


def open_run(
    config: Config,
    tower: TowerConfig,
    layout: Layout,
    content_hash: str,
    mesh: Mesh,
    head_loss: str = "",
    reading: dict[str, Any] | None = None,
) -> int:
    """Creates the run directory, or checks that an existing one belongs to the same run.

    Args:
      config: The flags of the run.
      tower: Sizes of the tower.
      layout: Layout of items.
      content_hash: Content hash of the prepared data.
      mesh: The mesh of this start of the run.
      head_loss: The loss of the label head; empty without a head.
      reading: How the tables of the data were read, as their `dataset.json` says, which is kept
        with the run for the queries of `predict`.

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
        "head_loss": head_loss,
    }
    if epath.Path(path).exists():
        before = config_lib.load(path)
        differences = config_lib.differences(before, config)
        free = tuple(f"--{name}" for name in _free_flags(before, config))
        recorded = _read_tower(config.workdir)
        if recorded.tower.get("pooling", "mean") == tower.pooling:
            free += ("--model.pooling:",)  # One of both says "auto".
        changed = [line for line in differences if not line.startswith(free)]
        if not changed and recorded.content_hash != content_hash:
            changed = [f"--data={config.data} has other content than the run was started on"]
        if changed:
            raise InputError(
                f"--workdir={config.workdir} holds a run with another configuration "
                f"({'; '.join(changed)}): use the same flags to resume it, or another --workdir"
            )
        if jax.process_index() == 0:
            if recorded.head_loss != head_loss:
                tower_path = os.path.join(config.workdir, TOWER)
                updated = {**sealed.read(tower_path, dict, NOT_A_RUN), "head_loss": head_loss}
                sealed.write(tower_path, updated)
            if differences:
                config_lib.save(path, config)
        shards = sharding.num_shards(mesh, recorded.shards)
        if shards != recorded.shards:
            print(
                f"warning: batches are packed in {shards} shards from here on instead of "
                f"{recorded.shards}, which is no multiple of the {sharding.num_row_shards(mesh)} "
                "row shards of this mesh; dropout differs from a run on the former mesh"
            )
        return shards
    for name in _OF_A_MODEL:
        if (epath.Path(config.workdir) / name).is_dir():
            raise InputError(
                f"{path}: not found, although the directory holds {name}/ of a run; use another "
                "--workdir"
            )
    epath.Path(config.workdir).mkdir(parents=True, exist_ok=True)
    sealed.write(os.path.join(config.workdir, TOWER), contents)
    run_data.save_reading(config.workdir, reading)
    config_lib.save(path, config)
    return contents["shards"]


def _free_flags(before: Config, now: Config) -> list[str]:
    """Prefixes of the flags whose values may change between two starts of a run.

    As long as the head is not refitted, it can be decided that it will be. Its other flags may then
    change as well, unless training steps depend on them.
    """
    free = [f"{name}:" for name in FREE_FLAGS]
    if not before.head.enabled and not now.head.only and not now.head.weight:
        return [*free, "head.", "fusion."]
    if not before.head.refit and not before.head.only:
        free += ["head.refit:", "head.epochs:", "head.batch_size:"]
    return free


def _read_tower(workdir: str) -> _TowerFile:
    contents = sealed.read(os.path.join(workdir, TOWER), _TowerFile, _RESTORE)
    contents.shards = contents.shards or contents.shares
    if "word_scale" in contents.tower:  # Its name in version 0.1.
        contents.tower["embedding_scale"] = contents.tower.pop("word_scale")
    return contents


def path_of(directory: str, name: str, name_0_1: str) -> str:
    """Path of a file or directory by its name, or by that of version 0.1 if only that exists."""
    path, path_0_1 = (os.path.join(directory, x) for x in (name, name_0_1))
    return path_0_1 if os.path.exists(path_0_1) and not os.path.exists(path) else path


def with_head_loss(config: Config, labels_per_query: float, queries_per_label: float) -> Config:
    """The flags with the loss of the label head decided, where it is "auto".

    Args:
      config: Flags of a run. If its directory records a decision, that one is kept.
      labels_per_query: Mean number of labels of a training query.
      queries_per_label: Mean number of training queries of a label.
    """
    if not config.head.enabled or config.head.loss != "auto":
        return config
    is_dense = labels_per_query >= BCE_FROM and queries_per_label >= BCE_FROM_PER_LABEL
    loss = "bce" if is_dense else "decoupled_softmax"
    if (epath.Path(config.workdir) / TOWER).exists():
        loss = _read_tower(config.workdir).head_loss or loss
    return dataclasses.replace(config, head=dataclasses.replace(config.head, loss=loss))


def content_hash(workdir: str) -> str:
    """Content hash of the data that the run was started on.

    Raises:
      InputError: If the directory holds no run.
    """
    return _read_tower(workdir).content_hash


def read_config(workdir: str, *, data: str = "", mesh: str = "") -> Config:
    """The flags of a run, with the paths that it has now and the loss of its head decided.

    Args:
      workdir: Run directory, which may have been moved.
      data: Directory of its data; empty for the one used in training, which is searched for if it
        has moved together with the run.
      mesh: Mesh to use; empty for the one used in training.

    Raises:
      InputError: If the directory holds no run.
    """
    config = config_lib.load(os.path.join(workdir, CONFIG))
    if not data and config.data != preprocessing.GLYPHS and run_data.is_missing(config.data):
        data = run_data.find_moved(config.data, workdir, content_hash(workdir)) or ""
        if data:
            console.status(f"{config.data}: not found; the data of the run are in {data}")
    config = dataclasses.replace(
        config, workdir=workdir, data=data or config.data, mesh=mesh or config.mesh
    )
    return with_head_loss(config, 0.0, 0.0)


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
        raise InputError(f"{path}: tower: {error}; {NOT_A_RUN}") from None
    hf_configs.check_sizes(os.path.join(workdir, TOWER), tower)
    return tower, Layout(**contents.layout)


def open_dataset(config: Config, cache: str = object_store.CACHE) -> PreparedDataset:
    """The prepared data of a run; the built-in data set and sources are prepared on first use.

    All bytes of the data are compared with their checksums.

    Args:
      config: The flags of the run.
      cache: Local directory for copies of data from an object store, and for sources prepared here.
        If the run directory is in an object store, the built-in data set is prepared there too, and
        in the run directory otherwise.

    Raises:
      InputError: If there are no data, or they are damaged.
    """
    return _open_dataset(config, cache).verify()


def _open_dataset(config: Config, cache: str) -> PreparedDataset:
    object_store.check(config.workdir, "workdir")
    object_store.check(config.data, "data")
    if not object_store.is_local(config.data):
        content = store.read_info(config.data)["content_hash"]
        name = f"{os.path.basename(config.data.rstrip('/'))}-{content}"
        copy = object_store.local_copy(config.data, name, cache)
        return PreparedDataset.open(copy)
    model = config.model.pretrained
    if config.data != preprocessing.GLYPHS:
        return on_demand.open_source(config.data, model, cache)
    path = os.path.join(config.workdir, "data")
    if not object_store.is_local(path):
        parts = ["glyphs", str(store.FORMAT), *re.findall(r"[\w.]+", model)]
        path = os.path.join(os.path.expanduser(cache), "-".join(parts))
    return on_demand.open_glyphs(path, model)


def open_run_dataset(
    config: Config, cache: str = object_store.CACHE, *, allow_other: bool = False, hint: str = ""
) -> PreparedDataset:
    """The prepared data that a run was trained on.

    Args:
      config, cache: See `open_dataset`.
      allow_other: Whether to open other data, too.
      hint: What else the user can do about other data, for the message.

    Raises:
      InputError: If the data are not found, or are others than the run was trained on.
    """
    try:
        dataset = open_dataset(config, cache)
    except InputError as error:
        raise InputError(
            f"{error}; if the data of {config.workdir} have moved, name them by --data"
        ) from None
    recorded = content_hash(config.workdir)
    if dataset.content_hash != recorded and not allow_other:
        raise InputError(
            f"--data={config.data}: not the data that the run was trained on, or prepared anew "
            f"since (content hash {dataset.content_hash[:12]}, expected {recorded[:12]}); "
            f"give --data=DIRECTORY of its data, or train on these{hint}"
        )
    return dataset


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
    """The model described by the flags, without parameters.

    Raises:
      ValueError: If the loss of the head is "auto"; see `with_head_loss`.
    """
    labels, head = config.labels, config.head
    if head.enabled and head.loss == "auto":
        raise ValueError("--head.loss=auto must be resolved by with_head_loss or read_config")
    return Model(
        tower=Tower(tower),
        combiner=Combiner(
            labels.num_heads,
            labels.mlp_width,
            labels.dropout,
            uses_free=labels.num_free > 0,
            uses_centroid=labels.centroids != "none",
        )
        if labels.prototypes and not head.only
        else None,
        table=LabelTable(mesh, num_labels, labels.num_free, tower.width),
        mesh=mesh,
        row_width=config.batch.row_width,
        layout=layout,
        matmul_precision=config.model.matmul_precision,
        microbatch_rows=config.batch.microbatch_rows,
        head=LabelHead(
            mesh=mesh,
            num_labels=num_labels,
            width=tower.width,
            mlp_width=head.mlp_width,
            loss=head.loss,
            label_block=head.label_block,
            num_sampled=head.num_sampled if num_labels > head.sample_above else 0,
            num_words=min(head.words, tower.vocab_size),
            widths=tuple(sorted({*config.loss.widths} - {tower.width})),
        )
        if head.enabled
        else None,
    )
