"""Labels added to and removed from a run: one numbered step per update; the last can be undone.

The serving artifacts are not changed; each step is a directory next to them. Whoever writes a step
holds the lock of their directory; readers hold none and read again what changed while they read.
"""

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal, NamedTuple

import msgspec
import numpy as np
from jaxtyping import Float32, Int
from scipy import sparse

from vixml_jax import workdir as workdir_lib
from vixml_jax.errors import InputError
from vixml_jax.serving import artifacts as artifacts_lib
from vixml_jax.serving.artifacts import ServingArtifacts
from vixml_jax.storage import atomic, locks, npy_files, sealed

DIRECTORY = "label_updates"  # In a run directory.
_DIRECTORY_0_1 = "changes"  # The name in version 0.1.
ABOUT = "change.json"
VECTORS = "vectors.npy"
ADD, REMOVE = "add", "remove"
_RETIRED = ".undone"  # Suffix of a step that is being removed.
# Steps that are being written or removed. Nobody else does either while the lock is held.
_LEFT = re.compile(r"\.?[0-9]{6,}\..+")
_WAIT_S = 30.0  # For other writers, each of which takes well under a second.
_UNIT_ERROR = 0.02  # By which the length of a prototype may differ from 1.
Row = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]


class Step(msgspec.Struct, kw_only=True):
    """Contents of `change.json`: one update.

    Attributes:
      kind: ADD or REMOVE.
      ids: Ids of the labels.
      texts: Texts of added labels; empty for a removal.
      rows: Rows of removed labels; empty for an addition.
      sha256: Of the vectors of added labels; empty in steps of versions that did not record it.
      step, content_hash: Model step and content hash of the serving artifacts that were updated.
    """

    kind: Literal["add", "remove"]
    ids: list[str]
    texts: list[str] = []
    rows: list[Row] = []
    sha256: str = ""
    step: int
    content_hash: str


class LabelUpdates(NamedTuple):
    """All steps together. Rows of labels: those of the run, then the added ones in order.

    Attributes:
      ids, texts: Of the labels that were added, including any that were removed later.
      vectors: Theirs, as they are searched: prototypes, fused with rows of the label head if the
        run has one.
      removed: Rows of labels that must not be found, each once.
    """

    ids: list[str]
    texts: list[str]
    vectors: Float32[np.ndarray, "m w"]
    removed: Int[np.ndarray, " r"]


class _Labels:
    """Ids of the labels after some steps, replayed from their descriptions."""

    def __init__(self, artifacts: ServingArtifacts):
        self._artifacts = artifacts
        self.ids: list[str] = []
        self.texts: list[str] = []
        self.removed: dict[int, None] = {}  # A set that keeps the order.

    def apply(self, path: str, about: Step) -> None:
        """Applies a step.

        Raises:
          InputError: If it is of another model, or does not fit the labels before it.
        """
        expected, count = self._artifacts.about, len(self._artifacts.ids)
        if (about.step, about.content_hash) != (expected.step, expected.content_hash):
            raise InputError(
                f"{path}: made for the model of step {about.step}, but the run's model is of step "
                f"{expected.step}; take the update back by --undo and repeat it"
            )
        name = os.path.join(path, ABOUT)
        if about.kind == ADD:
            if len(about.texts) != len(about.ids) or about.rows:
                raise InputError(
                    f"{name}: damaged ({len(about.texts)} texts and {len(about.rows)} rows of "
                    f"{len(about.ids)} added labels); {_remedy(path)}"
                )
            self.ids, self.texts = self.ids + about.ids, self.texts + about.texts
            return
        if len(about.rows) != len(about.ids) or about.texts:
            raise InputError(
                f"{name}: damaged ({len(about.rows)} rows and {len(about.texts)} texts of "
                f"{len(about.ids)} removed labels); {_remedy(path)}"
            )
        for row, label in zip(about.rows, about.ids, strict=True):
            if row >= count + len(self.ids):
                raise InputError(
                    f"{name}: removes row {row} of {count + len(self.ids)} labels; {_remedy(path)}"
                )
            found = self._artifacts.ids[row] if row < count else self.ids[row - count]
            if found != label or row in self.removed:
                raise InputError(
                    f"{name}: removes {label[:60]!r} in row {row}, which holds {found[:60]!r}"
                    f"{', removed before' if row in self.removed else ''}; {_remedy(path)}"
                )
            self.removed[row] = None

    def rows(self) -> dict[str, int]:
        """Rows of the labels that can be found, by id."""
        first = len(self._artifacts.ids)
        rows = {**self._artifacts.rows_by_id}
        for row in self.removed:
            if row < first:
                del rows[self._artifacts.ids[row]]
        added = enumerate(self.ids, first)
        return rows | {name: row for row, name in added if row not in self.removed}


def read(workdir: str, artifacts: ServingArtifacts, width: int) -> LabelUpdates:
    """Reads all label updates of a run: those of one moment, whoever writes beside.

    Args:
      workdir: Run directory.
      artifacts: Its serving artifacts.
      width: Width of the vectors that represent labels in the search.

    Raises:
      InputError: If a step is missing or damaged, or was made for another model.
    """
    while True:
        before = state(workdir)
        try:
            updates = _read(workdir, artifacts, width)
        except InputError:
            if state(workdir) == before:
                raise
            continue  # A step was taken back while it was read.
        if state(workdir) == before:
            return updates


def _read(workdir: str, artifacts: ServingArtifacts, width: int) -> LabelUpdates:
    labels, vectors = _Labels(artifacts), [np.zeros((0, width), np.float32)]
    for path in steps(workdir):
        about = describe(path)
        labels.apply(path, about)
        if about.ids and about.kind == ADD:
            prototypes = artifacts.vectors.shape[1]
            vectors.append(_read_vectors(path, about, (len(about.ids), width), prototypes))
    removed = np.array([*labels.removed], np.int64)
    return LabelUpdates(labels.ids, labels.texts, np.concatenate(vectors), removed)


def _read_vectors(
    path: str, about: Step, shape: tuple[int, int], prototypes: int
) -> Float32[np.ndarray, "m w"]:
    """Reads the vectors of an addition.

    Args:
      path: Directory of the step.
      about: Its description.
      shape: That the vectors have.
      prototypes: How many columns of them hold a unit vector, the first ones.
    """
    name = os.path.join(path, VECTORS)
    mapped = npy_files.open_mapped(name, _remedy(path))
    if (mapped.shape, mapped.dtype.str) != (shape, "<f4"):
        raise InputError(
            f"{path}: damaged (vectors {mapped.shape} {mapped.dtype} of {len(about.ids)} labels, "
            f"expected vectors {shape} float32); {_remedy(path)}"
        )
    vectors = np.array(mapped)
    if about.sha256 and _digest(vectors) != about.sha256:
        raise InputError(f"{name}: does not match its checksum in {ABOUT}; {_remedy(path)}")
    if fault := _fault(vectors, prototypes):
        raise InputError(f"{name}: damaged ({fault}); {_remedy(path)}")
    return vectors


def _digest(vectors: Float32[np.ndarray, "m w"]) -> str:
    return hashlib.sha256(vectors.tobytes()).hexdigest()


def _fault(vectors: Float32[np.ndarray, "m w"], prototypes: int) -> str | None:
    """What no vectors of labels can be, in words; None: nothing.

    Args:
      vectors: Of the labels.
      prototypes: See `_read_vectors`.
    """
    if not np.isfinite(vectors).all():
        return "some values are not finite"
    with np.errstate(over="ignore"):
        lengths = np.linalg.norm(vectors[:, :prototypes], axis=1)
    worst = lengths[np.argmax(np.abs(lengths - 1.0))] if len(lengths) else 1.0
    return None if abs(worst - 1.0) <= _UNIT_ERROR else f"found length {worst:.3g}, expected 1"


def _remedy(path: str) -> str:
    return f"remove the directory {path} and any later ones, and repeat these updates"


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


def state(workdir: str) -> list[tuple[str, int, int]]:
    """What changes whenever a step is written or taken back."""
    found = []
    # The directory of the steps as well: a step may be written and taken back between two looks.
    for path in (_directory(workdir), *_paths(workdir)):
        with contextlib.suppress(FileNotFoundError):
            status = os.stat(path)
            found.append((path, status.st_ino, status.st_mtime_ns))
    return found


def _paths(workdir: str) -> list[str]:
    """Returns the directories whose names are numbers, in their order."""
    path = _directory(workdir)
    names = os.listdir(path) if os.path.isdir(path) else []
    numbers = [name for name in names if name.isascii() and name.isdigit()]
    return [os.path.join(path, name) for name in sorted(numbers, key=int)]


def steps(workdir: str) -> list[str]:
    """Returns the directories of the steps, in order.

    Raises:
      InputError: If one is missing.
    """
    paths = _paths(workdir)
    for number, path in enumerate(paths, 1):
        if int(os.path.basename(path)) != number:
            missing = os.path.join(os.path.dirname(path), f"{number:06d}")
            raise InputError(
                f"{path}: expected {missing} before it; put it back from a copy, or {_remedy(path)}"
            )
    return paths


def describe(path: str) -> Step:
    """Reads the description of a step.

    Raises:
      InputError: If it is missing or damaged.
    """
    return sealed.read(os.path.join(path, ABOUT), Step, _remedy(path))


def add(
    workdir: str,
    artifacts: ServingArtifacts,
    ids: Sequence[str],
    texts: Sequence[str],
    vectors: Float32[np.ndarray, "m w"],
) -> str:
    """Writes a step that adds labels with new ids; returns its directory.

    Raises:
      InputError: If a label exists already, of the run or added meanwhile by another process, if a
        vector is not one of a label, or if the run has another model meanwhile.
    """
    vectors = np.ascontiguousarray(vectors, np.float32)
    if fault := _fault(vectors, artifacts.vectors.shape[1]):
        raise InputError(f"vectors of new labels: {fault}; the model cannot represent these labels")
    with _writing(workdir, artifacts, "adding labels") as labels:
        rows = labels.rows()
        for name in ids:
            if name in rows:
                raise InputError(
                    f"label {name[:60]!r} exists already; remove it first by --remove_labels, or "
                    "choose another id"
                )
            rows[name] = -1
        fields = {"kind": ADD, "ids": [*ids], "texts": [*texts], "sha256": _digest(vectors)}
        return _write(workdir, artifacts, fields, vectors)


def remove(workdir: str, artifacts: ServingArtifacts, ids: Sequence[str]) -> str:
    """Writes a step that removes labels; returns its directory.

    Raises:
      InputError: If there is no such label, if none would be left, or if the run has another model
        meanwhile.
    """
    ids = [*dict.fromkeys(ids)]
    with _writing(workdir, artifacts, "removing labels") as labels:
        rows = labels.rows()
        unknown = [name for name in ids if name not in rows]
        if unknown:
            raise InputError(f"the run has no label {unknown[0][:60]!r}")
        if len(ids) == len(rows):
            raise InputError("all labels would be removed; expected to keep at least one")
        fields = {"kind": REMOVE, "ids": ids, "rows": [rows[name] for name in ids]}
        return _write(workdir, artifacts, fields, None)


@contextlib.contextmanager
def _locked(workdir: str, doing: str) -> Iterator[None]:
    """Holds the lock of the steps, and removes what a killed process left of one."""
    directory = _directory(workdir)
    os.makedirs(directory, exist_ok=True)
    with locks.exclusive(directory, doing=doing, wait_s=_WAIT_S):
        for name in os.listdir(directory):
            if _LEFT.fullmatch(name):
                shutil.rmtree(os.path.join(directory, name))
        yield


@contextlib.contextmanager
def _writing(workdir: str, artifacts: ServingArtifacts, doing: str) -> Iterator[_Labels]:
    """Holds the lock of the steps, and yields the labels as they are until it is given back."""
    with _locked(workdir, doing):
        about = artifacts_lib.read_about(artifacts.path)
        model = artifacts.about.step, artifacts.about.content_hash
        if (about.step, about.content_hash) != model:
            raise InputError(
                f"{artifacts.path}: of step {about.step} now, opened at step {model[0]}; repeat "
                "the update for the new model"
            )
        labels = _Labels(artifacts)
        for path in steps(workdir):
            labels.apply(path, describe(path))
        yield labels


def _write(
    workdir: str, artifacts: ServingArtifacts, fields: dict[str, object], vectors: np.ndarray | None
) -> str:
    """Writes the next step while the lock is held."""
    path = os.path.join(_directory(workdir), f"{len(steps(workdir)) + 1:06d}")
    about = artifacts.about
    fields = {**fields, "step": about.step, "content_hash": about.content_hash}
    with atomic.directory(path) as temporary:
        if vectors is not None:
            np.save(os.path.join(temporary, VECTORS), vectors, allow_pickle=False)
        sealed.write(os.path.join(temporary, ABOUT), fields)
    return path


def undo(workdir: str) -> Step:
    """Takes back the last step; returns its description.

    Raises:
      InputError: If there is none.
    """
    if _paths(workdir):
        with _locked(workdir, "taking back a label update"):
            if previous := steps(workdir):
                about = describe(previous[-1])
                retired = previous[-1] + _RETIRED
                os.rename(previous[-1], retired)  # Atomic, unlike removing the files one by one.
                shutil.rmtree(retired)
                return about
    raise InputError(f"--undo: no labels were added to {workdir} or removed from it")
