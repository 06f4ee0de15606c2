"""The same step of a head over all labels, ours and in PyTorch: prepared for timing and memory."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from vixml_jax.benchmarks.support import resident_memory, workers

_RATE = 1e-3


class Data(NamedTuple):
    """What both programs start from.

    Attributes:
      queries: Unit vectors of one batch.
      labels: Distinct labels of each query.
      vectors: Of all labels, about unit length.
    """

    queries: Float[np.ndarray, "b e"]
    labels: Int[np.ndarray, "b p"]
    vectors: Float[np.ndarray, "n e"]


class Program(NamedTuple):
    """A step that has been compiled and run once.

    Attributes:
      step: Runs a step to its end and returns the loss.
      stored: Bytes of parameters and moments.
      xla: Bytes that the compiled step allocates beside them; None: it is not compiled by XLA.
    """

    step: Callable[[], float]
    stored: int
    xla: int | None = None


def data(settings: dict[str, Any]) -> Data:
    """Random data of the settings `batch`, `width`, `labels` and `positives`."""
    rng = np.random.default_rng(0)
    n, width, count = settings["labels"], settings["width"], settings["positives"]
    queries = rng.standard_normal((settings["batch"], width), np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    first = rng.integers(n, size=(settings["batch"], 1))
    vectors = rng.standard_normal((n, width), np.float32)
    vectors *= np.float32(width**-0.5)
    return Data(queries, (first + np.arange(count) * (n // count)) % n, vectors)


def ours(settings: dict[str, Any]) -> Program:
    """The step of the head epochs, without a network before the label vectors."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import linen as nn

    from vixml_jax.labels import head_update
    from vixml_jax.labels.head import LabelHead
    from vixml_jax.parallel import sharding
    from vixml_jax.structs import Positives
    from vixml_jax.training import optimizer

    head = LabelHead(
        sharding.create_mesh(devices=jax.devices()[:1]), settings["labels"], settings["width"], 0,
        settings["loss"], label_block=settings["block"],
    )  # fmt: skip
    tx = optimizer.head_optimizer(optax.constant_schedule(_RATE), settings["moments"])
    queries, labels, vectors = data(settings)
    index = jnp.repeat(jnp.arange(len(queries), dtype=jnp.int32), labels.shape[1])
    positives = Positives(index, jnp.asarray(labels.reshape(-1), jnp.int32))
    mask = jnp.ones(len(queries), bool)

    params = nn.unbox(head.init_params(jax.random.key(0)))
    params = {"head": params | {"vectors": jnp.array(vectors)}}
    del vectors
    state = tx.init(params)
    stored = sum(x.nbytes for x in jax.tree.leaves((params, state)))
    update = functools.partial(head_update.update, head, optimizer=tx)
    arguments = queries, positives, mask
    compiled = jax.jit(update, donate_argnums=(0, 1)).lower(params, state, *arguments).compile()
    held = [params, state]
    del params, state  # Donated.

    def step() -> float:
        *held[:], scalars = compiled(*held, *arguments)
        jax.block_until_ready(held)
        return float(scalars["loss"])

    step()
    return Program(step, stored, compiled.memory_analysis().temp_size_in_bytes)


def pytorch(settings: dict[str, Any]) -> Program:
    """Logits, cross-entropy over all positives, backward, Adam."""
    import torch
    from torch.nn import functional

    torch.set_num_threads(settings["threads"])
    device = "cuda" if settings["device"] == "gpu" else "cpu"
    queries, labels, vectors = (torch.from_numpy(x).to(device) for x in data(settings))
    zeros = torch.zeros(settings["labels"], device=device)
    params = [torch.nn.Parameter(vectors), torch.nn.Parameter(zeros)]
    adam = torch.optim.Adam(params, lr=_RATE)
    scaled = 20.0 * queries

    def softmax() -> torch.Tensor:
        log_probabilities = torch.log_softmax(functional.linear(scaled, *params), dim=1)
        return -log_probabilities.gather(1, labels).mean()

    def decoupled_softmax() -> torch.Tensor:
        logits = functional.linear(scaled, *params)
        of_others = logits.scatter(1, labels, -torch.inf).logsumexp(1, keepdim=True)
        return functional.softplus(of_others - logits.gather(1, labels)).mean()

    def bce() -> torch.Tensor:
        targets = torch.zeros(len(queries), settings["labels"], device=device)
        targets = targets.scatter_(1, labels, 1.0)
        logits = functional.linear(scaled, *params)
        total = functional.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
        return total / labels.numel()

    costs = {"softmax": softmax, "decoupled_softmax": decoupled_softmax, "bce": bce}
    cost = costs[settings["loss"]]

    def step() -> float:
        adam.zero_grad(set_to_none=True)
        loss = cost()
        loss.backward()
        adam.step()
        adam.zero_grad(set_to_none=True)
        return loss.item()

    step()
    return Program(step, 3 * 4 * settings["labels"] * (settings["width"] + 1))


PROGRAMS = {"ours": ours, "torch": pytorch}


def prepare(programs: list[str], settings: dict[str, Any]) -> dict[str, workers.Prepared]:
    """In a child process: the programs, which run `settings["steps"]` steps a round."""

    def prepared(name: str) -> workers.Prepared:
        step = PROGRAMS[name](settings).step

        def run() -> dict[str, Any]:
            losses = [step() for _ in range(settings["steps"])]
            return {"steps": settings["steps"], "loss": losses[-1]}

        return {"queries": settings["batch"] * settings["steps"]}, run

    return {name: prepared(name) for name in programs}


def memory(program: str, settings: dict[str, Any]) -> dict[str, int]:
    """In a process of its own: bytes stored, what a step needs beside them, and the peak."""
    made = PROGRAMS[program](settings)
    resident_memory.return_freed_pages()
    resident_memory.forget_peak()
    before = resident_memory.kilobytes("VmRSS")
    made.step()
    peak = resident_memory.kilobytes("VmHWM")
    found = {"stored": made.stored, "step": (peak - before) * 1024, "peak": peak * 1024}
    return found if made.xla is None else found | {"xla": made.xla}
