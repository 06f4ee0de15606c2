"""The programs of a run, compiled from shapes alone: steps, encoding and exact search."""

import time
from typing import Any, NamedTuple

import jax

from vixml_jax import config as config_lib
from vixml_jax.config import Config
from vixml_jax.modeling import Model
from vixml_jax.parallel import roofline
from vixml_jax.runtime import tree_utils
from vixml_jax.search import exact
from vixml_jax.search import fusion as fusion_lib
from vixml_jax.training import build, memory_planner
from vixml_jax.training.memory_planner import DataSizes

# Names of programs.
STEP, HEAD, ENCODING, SEARCH = "training step", "head step", "encoding", "exact search"
QUERY_BLOCK = config_lib.SEARCH.query_block  # Queries that evaluations search at a time.


class Program(NamedTuple):
    """A compiled program.

    Attributes:
      name: What it does.
      compiled: The program.
      work: What a run of it does on each device.
      seconds: Time that compiling took.
      items: Queries of a batch of the program, or items that it encodes.
    """

    name: str
    compiled: jax.stages.Compiled
    work: roofline.Work
    seconds: float
    items: int


class Lengths(NamedTuple):
    """What the items of a run are like.

    Attributes:
      query, label: Mean number of positions.
      query_images, label_images: Whether they have images.
      image_width: Width of an image embedding.
    """

    query: float
    label: float
    query_images: bool = False
    label_images: bool = False
    image_width: int = 1


def compiled(name: str, traced: jax.stages.Traced, num_devices: int, items: int) -> Program:
    """Compiles a traced program."""
    start = time.perf_counter()
    program = traced.lower().compile()
    seconds = time.perf_counter() - start
    return Program(name, program, roofline.work(traced, program, num_devices), seconds, items)


def step(config: Config, parts: build.Parts, lengths: Lengths, sizes: DataSizes) -> Any:
    """The traced training step."""
    batch, key = memory_planner.abstract_batch(
        parts.model,
        config.batch.size,
        lengths.query + lengths.label,
        has_images=(lengths.query_images, lengths.label_images),
        width=lengths.image_width,
        labels_per_query=sizes.labels_per_query,
    )
    return parts.step.traced(batch, key)


def head_step(config: Config, parts: build.Parts, sizes: DataSizes) -> Any:
    """The traced step of the head epochs."""
    batch, key = memory_planner.abstract_head_batch(
        parts.model, config.head.batch_size, sizes.labels_per_query
    )
    return parts.head.step.traced(batch, key)


def encoding(parts: build.Parts, lengths: Lengths, block: int) -> Any:
    """The traced program that encodes a block of that many queries."""
    model, like = parts.model, parts.like
    items, count = memory_planner.abstract_block(
        model,
        block,
        lengths.query,
        images=lengths.query_images,
        width=lengths.image_width,
    )
    return model.trace_encoding(tree_utils.merge(like.params, like.frozen), items, count)


def search(config: Config, model: Model, sizes: DataSizes) -> Any:
    """The traced program of exact search, for one block of queries, as evaluations search."""
    width = model.table.width
    if model.head is not None:
        width = fusion_lib.width(width)
    return exact.traced(
        sizes.labels,
        width,
        model.mesh,
        queries=QUERY_BLOCK,
        label_block=config_lib.SEARCH.label_block,
        k=min(config.eval.k, sizes.labels),
    )
