"""What `train --plan` prints: the memory of a run, and the work and least time of its programs."""

import time
from typing import Any

import jax
from jax.sharding import Mesh

from vixml_jax import workdir
from vixml_jax.config import Config
from vixml_jax.data.store import PreparedDataset
from vixml_jax.parallel import accelerators, sharding
from vixml_jax.training import build, checks, describe, head_trainer, memory_planner
from vixml_jax.training.memory_planner import DataSizes, MemoryPlan
from vixml_jax.training.planning import programs
from vixml_jax.training.planning.programs import Lengths, Program


def show(config: Config, dataset: PreparedDataset, mesh: Mesh, sizes: str) -> None:
    """Prints the plan of a run.

    Args:
      config: Flags of the run.
      dataset: Its data.
      mesh: Its devices, which need not exist.
      sizes: As `--plan_size`; "": the sizes of the data.

    Raises:
      InputError: If the run does not fit.
    """
    config = checks.with_metrics(config, dataset)
    tower, layout = build.make_tower(config, dataset)
    planned_sizes = DataSizes.parse(sizes, build.sizes_of(dataset))
    config = workdir.with_head_loss(config, *planned_sizes.density)
    config = build.fit_batch(config, planned_sizes)
    parts = build.assemble(config, tower, layout, planned_sizes, mesh)
    sides = (dataset.train, dataset.labels)
    lengths = [float(build.longest_item(layout, dataset))] * 2
    if not sizes:
        lengths = [parts.model.mean_length(side) for side in sides]
    has_images = [side.images is not None for side in sides]
    items = Lengths(*lengths, *has_images, dataset.image_width)
    _show_setup(config, parts, planned_sizes, items)
    start = time.perf_counter()
    planned, found = plan(config, parts, items, planned_sizes)
    planned.check()
    print(planned)
    kind = mesh.devices.flat[0].device_kind
    for program in found:
        print(
            f"{program.name}, {program.items} items, per device: {program.work.describe(kind)} "
            f"(compiled in {program.seconds:.0f} s)"
        )
    print(f"compiled in {time.perf_counter() - start:.0f} s; the run fits")


def _show_setup(config: Config, parts: build.Parts, sizes: DataSizes, items: Lengths) -> None:
    """Prints devices, sizes and arrays, before anything is compiled."""
    mesh = parts.model.mesh
    kind = mesh.devices.flat[0].device_kind
    chip = accelerators.find(kind)
    published = ""
    if chip:
        published = f" ({chip.memory / 2**30:.0f} GiB, {chip.peak_flops / 1e12:.0f} TFLOP/s each)"
    shape = f"a batch of {config.head.batch_size}"
    if not config.head.only:
        rows = parts.model.row_sizes(
            items.query + items.label, config.batch.size, sharding.num_shards(mesh)
        )
        count = sharding.num_shards(mesh) * rows.least
        shape = f"a batch of {config.batch.size} in {count} rows of {parts.model.row_width}"
    print(
        f"plan: {mesh.size} x {kind}{published}, --mesh={describe.spell(mesh)}; "
        f"{sizes.queries} queries, {sizes.labels} labels; {shape}"
    )
    print(describe.attention(parts.model))
    describe.show_arrays(parts, sizes, print)


def plan(
    config: Config, parts: build.Parts, items: Lengths, sizes: DataSizes
) -> tuple[MemoryPlan, list[Program]]:
    """The memory of a run, and its programs, compiled.

    Encoding and search are compiled for accelerators only: on a CPU the search is another one, and
    its memory is estimated.

    Args:
      config: Flags of the run.
      parts: Its model and steps.
      items: What its items are like.
      sizes: Sizes of its data.

    Raises:
      InputError: If a step does not fit.
    """
    model, found = parts.model, []

    def compiled(name: str, traced: Any, size: int) -> jax.stages.Compiled:
        found.append(programs.compiled(name, traced, model.mesh.size, size))
        return found[-1].compiled

    plans = []
    if not config.head.only:
        traced = programs.step(config, parts, items, sizes)
        plans.append(
            memory_planner.plan_memory(
                parts.like, lambda: compiled(programs.STEP, traced, config.batch.size)
            )
        )
    if parts.head is not None:
        of_head = programs.head_step(config, parts, sizes)
        plans.append(
            memory_planner.plan_memory(
                parts.head.like,
                lambda: compiled(programs.HEAD, of_head, config.head.batch_size),
                head_trainer.own_state(parts.head.like),
            )
        )
    planned = memory_planner.largest(plans)
    if planned.platform == "cpu":
        evaluation = memory_planner.evaluation_bytes(
            model,
            [(items.query, sizes.queries), (items.label, sizes.labels)],
            block=config.eval.block,
            labels=sizes.labels,
        )
        return memory_planner.with_process(planned, parts.like, evaluation), found
    block = min(config.eval.block, sizes.queries)
    encoding = compiled(programs.ENCODING, programs.encoding(parts, items, block), block)
    search = programs.search(config, model, sizes)
    search = compiled(programs.SEARCH, search, programs.QUERY_BLOCK)
    evaluation = max(
        memory_planner.beside_arguments(encoding),
        # The label vectors are no part of the state.
        search.memory_analysis().argument_size_in_bytes + memory_planner.beside_arguments(search),
    )
    return planned._replace(evaluation=evaluation), found
