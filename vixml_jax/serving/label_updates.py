"""Labels added to a run and removed from it: a numbered step each, of which the last can be undone.

What the run answers from stays as it is; a step is a directory beside it.
"""

import json
import os
import shutil
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int
from scipy import sparse

from vixml_jax.errors import InputError
from vixml_jax.serving.artifacts import Answers
from vixml_jax.storage import atomic

DIRECTORY = "changes"  # In a run directory.
ABOUT = "change.json"
VECTORS = "vectors.npy"
ADD, REMOVE = "add", "remove"


class Changes(NamedTuple):
    """All steps together. Rows of labels: the run's own, then those added, in order.

    Attributes:
      ids, texts, vectors: Of the labels that were added.
      removed: Rows of labels that are no longer found.
    """

    ids: list[str]
    texts: list[str]
    vectors: Float32[np.ndarray, "m e"]
    removed: Int[np.ndarray, " r"]


def read(workdir: str, answers: Answers) -> Changes:
    """What was added and removed since.

    Raises:
      InputError: If a step is damaged, or was made for another model.
    """
    ids: list[str] = []
    texts: list[str] = []
    vectors = [np.zeros((0, answers.vectors.shape[1]), np.float32)]
    removed: list[int] = []
    for path in steps(workdir):
        about = describe(path)
        if about["step"] != answers.about["step"] or (
            about["content_hash"] != answers.about["content_hash"]
        ):
            raise InputError(
                f"{path}: made for the model of step {about['step']}, this one is of step "
                f"{answers.about['step']}; take it back by --undo and do it again"
            )
        if about["kind"] == REMOVE:
            removed += about["rows"]
            continue
        try:
            found = np.load(os.path.join(path, VECTORS), allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: damaged ({error}); remove it") from None
        ids, texts, vectors = ids + about["ids"], texts + about["texts"], [*vectors, found]
    return Changes(ids, texts, np.concatenate(vectors), np.array(removed, np.int64))


def remembered(relevance: sparse.csr_matrix, changes: Changes) -> sparse.csr_matrix:
    """Relevance of training queries as the labels are now: none has one that was added, and those
    that were removed are forgotten, so that memory does not bring them back."""
    shape = relevance.shape[0], relevance.shape[1] + len(changes.ids)
    parts = relevance.data, relevance.indices, relevance.indptr
    if not len(changes.removed):
        return sparse.csr_matrix(parts, shape=shape, copy=False)
    there = np.ones(shape[1], relevance.dtype)
    there[changes.removed] = 0
    found = sparse.csr_matrix((there[relevance.indices], *parts[1:]), shape=shape, copy=True)
    found.eliminate_zeros()
    return found


def steps(workdir: str) -> list[str]:
    """Directories of the steps, in order."""
    path = os.path.join(workdir, DIRECTORY)
    names = os.listdir(path) if os.path.isdir(path) else []
    return [os.path.join(path, name) for name in sorted(names) if name.isdigit()]


def describe(path: str) -> dict[str, Any]:
    """What a step says of itself.

    Raises:
      InputError: If it cannot be read.
    """
    name = os.path.join(path, ABOUT)
    try:
        with open(name, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: {error}; remove {path}") from None


def add(
    workdir: str,
    answers: Answers,
    ids: Sequence[str],
    texts: Sequence[str],
    vectors: Float32[np.ndarray, "m e"],
) -> str:
    """Writes a step that adds labels, whose ids are new; returns its directory."""
    about = {"kind": ADD, "ids": list(ids), "texts": list(texts)}
    return _write(workdir, answers, about, np.asarray(vectors, np.float32))


def remove(workdir: str, answers: Answers, ids: Sequence[str], rows: Sequence[int]) -> str:
    """Writes a step that removes labels, by their rows; returns its directory."""
    return _write(workdir, answers, {"kind": REMOVE, "ids": list(ids), "rows": list(rows)}, None)


def _write(
    workdir: str, answers: Answers, about: dict[str, Any], vectors: np.ndarray | None
) -> str:
    done = steps(workdir)
    number = int(os.path.basename(done[-1])) + 1 if done else 1
    path = os.path.join(workdir, DIRECTORY, f"{number:06d}")
    about = {**about, **{name: answers.about[name] for name in ("step", "content_hash")}}
    with atomic.directory(path) as temporary:
        if vectors is not None:
            np.save(os.path.join(temporary, VECTORS), vectors, allow_pickle=False)
        with open(os.path.join(temporary, ABOUT), "w", encoding="utf-8") as file:
            json.dump(about, file, ensure_ascii=False)
    return path


def undo(workdir: str) -> dict[str, Any]:
    """Takes back the last step; returns what it was.

    Raises:
      InputError: If there is none.
    """
    done = steps(workdir)
    if not done:
        raise InputError(f"--undo: no labels were added to {workdir} or removed from it")
    about = describe(done[-1])
    retired = f"{done[-1]}.undone"
    shutil.rmtree(retired, ignore_errors=True)  # Of a process that was killed.
    os.rename(done[-1], retired)  # At once, so that no half of a step is left.
    shutil.rmtree(retired)
    return about
