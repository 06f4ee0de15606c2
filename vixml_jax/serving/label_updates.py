"""Labels added to and removed from a run: one numbered step per update; the last can be undone.

The serving artifacts are not changed; each step is a directory next to them.
"""

import json
import os
import shutil
from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import msgspec
import numpy as np
from jaxtyping import Float32, Int
from scipy import sparse

from vixml_jax import workdir as workdir_lib
from vixml_jax.errors import InputError
from vixml_jax.serving.artifacts import ServingArtifacts
from vixml_jax.storage import atomic, json_files

DIRECTORY = "label_updates"  # In a run directory.
_DIRECTORY_0_1 = "changes"  # The name in version 0.1.
ABOUT = "change.json"
VECTORS = "vectors.npy"
ADD, REMOVE = "add", "remove"
Row = Annotated[int, msgspec.Meta(ge=0)]


class Step(msgspec.Struct, kw_only=True):
    """Contents of `change.json`: one update.

    Attributes:
      kind: ADD or REMOVE.
      ids: Ids of the labels.
      texts: Texts of added labels; empty for a removal.
      rows: Rows of removed labels; empty for an addition.
      step, content_hash: Model step and content hash of the serving artifacts that were updated.
    """

    kind: Literal["add", "remove"]
    ids: list[str]
    texts: list[str] = []
    rows: list[Row] = []
    step: int
    content_hash: str


class LabelUpdates(NamedTuple):
    """All steps together. Rows of labels: those of the run, then the added ones in order.

    Attributes:
      ids, texts: Of the labels that were added, including any that were removed later.
      vectors: Theirs, as they are searched: prototypes, fused with rows of the label head if the
        run has one.
      removed: Rows of labels that must not be found.
    """

    ids: list[str]
    texts: list[str]
    vectors: Float32[np.ndarray, "m w"]
    removed: Int[np.ndarray, " r"]


def read(workdir: str, artifacts: ServingArtifacts, width: int) -> LabelUpdates:
    """Reads all label updates of a run.

    Args:
      workdir: Run directory.
      artifacts: Its serving artifacts.
      width: Width of the vectors that represent labels in the search.

    Raises:
      InputError: If a step is damaged, or was made for another model.
    """
    ids: list[str] = []
    texts: list[str] = []
    vectors = [np.zeros((0, width), np.float32)]
    removed: list[int] = []
    expected = artifacts.about
    for path in steps(workdir):
        about = describe(path)
        if (about.step, about.content_hash) != (expected.step, expected.content_hash):
            raise InputError(
                f"{path}: made for the model of step {about.step}, but the run's model is of step "
                f"{expected.step}; take the update back by --undo and repeat it"
            )
        remedy = "remove the directory"
        if about.kind == REMOVE:
            num_labels = expected.num_labels + len(ids)
            if about.rows and max(about.rows) >= num_labels:
                raise InputError(
                    f"{os.path.join(path, ABOUT)}: removes row {max(about.rows)} of {num_labels} "
                    f"labels; {remedy}"
                )
            removed += about.rows
            continue
        try:
            added = np.load(os.path.join(path, VECTORS), allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: damaged ({error}); {remedy}") from None
        shape = (len(about.ids), width)
        if added.shape != shape or len(about.texts) != len(about.ids):
            raise InputError(
                f"{path}: damaged (vectors {added.shape} and {len(about.texts)} texts of "
                f"{len(about.ids)} labels, expected vectors {shape}); {remedy}"
            )
        ids, texts, vectors = ids + about.ids, texts + about.texts, [*vectors, added]
    return LabelUpdates(ids, texts, np.concatenate(vectors), np.array(removed, np.int64))


def apply_to_relevance(relevance: sparse.csr_matrix, updates: LabelUpdates) -> sparse.csr_matrix:
    """Returns the relevance of the training queries over the updated labels.

    Added labels have no training queries. Removed labels lose theirs, so that training neighbours
    do not bring them back.

    Args:
      relevance: [training queries, labels], ones.
      updates: All steps together.

    Returns:
      [training queries, labels and added labels].
    """
    shape = relevance.shape[0], relevance.shape[1] + len(updates.ids)
    parts = relevance.data, relevance.indices, relevance.indptr
    if not len(updates.removed):
        return sparse.csr_matrix(parts, shape=shape, copy=False)
    kept = np.ones(shape[1], relevance.dtype)
    kept[updates.removed] = 0
    updated = sparse.csr_matrix((kept[relevance.indices], *parts[1:]), shape=shape, copy=True)
    updated.eliminate_zeros()
    return updated


def _directory(workdir: str) -> str:
    """Returns the directory of the steps; a run of version 0.1 continues in its own."""
    return workdir_lib.path_of(workdir, DIRECTORY, _DIRECTORY_0_1)


def steps(workdir: str) -> list[str]:
    """Returns the directories of the steps, in order."""
    path = _directory(workdir)
    names = os.listdir(path) if os.path.isdir(path) else []
    return [os.path.join(path, name) for name in sorted(names) if name.isdigit()]


def describe(path: str) -> Step:
    """Reads the description of a step.

    Raises:
      InputError: If it is missing or damaged.
    """
    return json_files.read(os.path.join(path, ABOUT), Step, f"remove the directory {path}")


def add(
    workdir: str,
    artifacts: ServingArtifacts,
    ids: Sequence[str],
    texts: Sequence[str],
    vectors: Float32[np.ndarray, "m w"],
) -> str:
    """Writes a step that adds labels with new ids; returns its directory."""
    fields = {"kind": ADD, "ids": list(ids), "texts": list(texts)}
    return _write(workdir, artifacts, fields, np.asarray(vectors, np.float32))


def remove(
    workdir: str, artifacts: ServingArtifacts, ids: Sequence[str], rows: Sequence[int]
) -> str:
    """Writes a step that removes labels by their rows; returns its directory."""
    return _write(workdir, artifacts, {"kind": REMOVE, "ids": list(ids), "rows": list(rows)}, None)


def _write(
    workdir: str, artifacts: ServingArtifacts, fields: dict[str, object], vectors: np.ndarray | None
) -> str:
    previous = steps(workdir)
    number = int(os.path.basename(previous[-1])) + 1 if previous else 1
    path = os.path.join(_directory(workdir), f"{number:06d}")
    about = artifacts.about
    fields = {**fields, "step": about.step, "content_hash": about.content_hash}
    with atomic.directory(path) as temporary:
        if vectors is not None:
            np.save(os.path.join(temporary, VECTORS), vectors, allow_pickle=False)
        with open(os.path.join(temporary, ABOUT), "w", encoding="utf-8") as file:
            json.dump(fields, file, ensure_ascii=False)
    return path


def undo(workdir: str) -> Step:
    """Takes back the last step; returns its description.

    Raises:
      InputError: If there is none.
    """
    previous = steps(workdir)
    if not previous:
        raise InputError(f"--undo: no labels were added to {workdir} or removed from it")
    about = describe(previous[-1])
    retired = f"{previous[-1]}.undone"
    shutil.rmtree(retired, ignore_errors=True)  # Left by a process that was killed.
    os.rename(previous[-1], retired)  # Atomic, unlike removing the files one by one.
    shutil.rmtree(retired)
    return about
