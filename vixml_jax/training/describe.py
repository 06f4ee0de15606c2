"""Lines that say what a run is about to do, and what its final model is."""

import math
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from vixml_jax import frozen_weights, workdir
from vixml_jax.config import Config
from vixml_jax.data.store import PreparedDataset
from vixml_jax.modeling import Model
from vixml_jax.parallel import sharding
from vixml_jax.runtime import console
from vixml_jax.training import memory_planner
from vixml_jax.training import train_state as state_lib
from vixml_jax.training.build import Parts
from vixml_jax.training.epoch_loop import Position
from vixml_jax.training.memory_planner import DataSizes, MemoryPlan


def final_model(config: Config, position: Position, steps_per_epoch: int) -> str:
    """Returns a line that says which epoch the model of a finished run is from, and why.

    Args:
      config: Flags of the run.
      position: Its last position.
      steps_per_epoch: Steps of an epoch of the whole model.
    """
    epochs, head = config.loop.epochs, ""
    if position.head_from is not None:
        if config.head.only:
            return f"final model: the tower as it was, and a head of {config.head.epochs} epochs"
        head = f"; its head refitted in {config.head.epochs} epochs"
        if position.best_step is None:
            return f"final model: from the last epoch, {epochs}/{epochs}{head}"
    if not position.epoch:
        return "final model: untrained (--loop.epochs=0)"
    if position.best_step is None:
        return f"final model: from the last epoch, {position.epoch}/{epochs}"
    best_epoch = position.best_step // steps_per_epoch
    text = (
        f"final model: from epoch {best_epoch}/{epochs}, the best in {config.loop.monitor} on "
        f"valid ({position.best:.2f})"
    )
    last = position.epoch if not head else position.head_from // steps_per_epoch
    if last < epochs:
        text += (
            f"; training stopped after epoch {last}/{epochs} "
            f"(--loop.patience={config.loop.patience})"
        )
    return text + head


def show_setup(
    config: Config,
    dataset: PreparedDataset,
    parts: Parts,
    sizes: DataSizes,
    mesh: Mesh,
    rows: int | None,
) -> None:
    """Prints a status line each about the data, the model, its label head and the devices.

    Args:
      config: Flags of the run.
      dataset: Its prepared data.
      parts: Its model and abstract state.
      sizes: Sizes of the data.
      mesh: Its devices.
      rows: Packed rows of a typical batch; None: no batch is packed.
    """
    # From the description of the data, so that the test split is not touched.
    counts = {name: dataset.info.get(f"num_{name}", 0) for name in ("train", "valid", "test")}
    queries = [f"{count:,} {name}" for name, count in counts.items() if count]
    images = f"images of width {dataset.image_width}" if dataset.image_width else "no images"
    console.status(
        f"data: {dataset.name}, {', '.join(queries[:-1])} and {queries[-1]} queries, "
        f"{dataset.num_labels:,} labels, {images}"
    )
    tower = parts.model.tower.config
    family = next(name for name, kind in workdir.FAMILIES.items() if isinstance(tower, kind))
    params = parts.model.abstract_params
    if parts.model.head is not None:
        params = {**params, "head": parts.model.abstract_head}
    trained, frozen = map(
        _num_values, frozen_weights.split(params, tower, head_only=config.head.only)
    )
    prototypes = "label prototypes" if parts.model.combiner else "no label prototypes"
    console.status(
        f"model: {family} {config.model.pretrained or 'from scratch'}, {tower.num_layers} layers x "
        f"{tower.width}, {trained:,} trained and {frozen:,} frozen parameters, {tower.dtype}, "
        f"{prototypes}"
    )
    if parts.model.head is not None:
        console.status(_head(config, parts, sizes))
    size = config.head.batch_size if rows is None else config.batch.size
    packed = "" if rows is None else f" in about {rows:,} rows of {config.batch.row_width}"
    console.status(
        f"devices: {mesh.size} x {mesh.devices.flat[0].device_kind}, mesh {spell(mesh)}, batches "
        f"of {size:,} queries{packed}"
    )
    if mesh.devices.flat[0].platform != "cpu":  # Where there is no other attention than XLA's.
        console.status(attention(parts.model))


def attention(model: Model) -> str:
    """Returns a line about what computes the tower's attention, and why no fused kernel does."""
    training, encoding = (model.attention(model.row_width, training=x) for x in (True, False))
    if training == encoding:
        return f"attention: {training}"
    return f"attention: {training} in training, {encoding} in encoding"


def _head(config: Config, parts: Parts, sizes: DataSizes) -> str:
    """Returns a line about the label head: its loss and size, and when it is trained."""
    head, options = parts.model.head, config.head
    sampled = f", {head.num_sampled:,} of them drawn per step" if head.num_sampled else ""
    network = f"MLP of {head.mlp_width:,}" if head.mlp_width else "no MLP"
    network += f", {head.num_words:,} words" if head.num_words else ""
    when = [f"in each step with weight {options.weight:g}"] if options.weight else []
    if options.refit:
        when.append(f"{options.epochs} epochs after the last")
    if options.only:
        when.append(f"{options.epochs} epochs on the tower as it is")
    return (
        f"head: {head.loss} over {head.num_labels:,} labels ({sizes.labels_per_query:.1f} labels "
        f"per query){sampled}, {network}, trained {' and '.join(when)}"
    )


def _num_values(tree: object) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def spell(mesh: Mesh) -> str:
    """Returns a mesh as the flag `--mesh` spells it."""
    return ",".join(f"{name}:{size}" for name, size in mesh.shape.items())


def memory(planned: MemoryPlan) -> str:
    """Returns a line about the planned memory of a device."""
    capacity = f" of {planned.device / 2**30:.1f}" if planned.device else ""
    total = max(0.01, planned.total / 2**30)
    return f"memory: {total:.2f}{capacity} GiB per device planned"


def show_arrays(parts: Parts, sizes: DataSizes, show: Callable[[str], None]) -> None:
    """Shows dimensions that are stored with padding, and a table of all large arrays.

    In head epochs after others, a state has a head and other moments; their table follows.
    """
    tables = state_lib.abstract_tables(parts.model, sizes.queries)
    if parts.model.head is not None:
        tables["head"] = parts.model.abstract_head
    for line in sharding.describe_padding(
        {**parts.model.abstract_params, **tables}, parts.model.mesh
    ):
        show(line)
    show(memory_planner.array_table(parts.like))
    if parts.head is not None and parts.head.like is not parts.like:
        show("in the head epochs:")
        show(memory_planner.array_table(parts.head.like))
