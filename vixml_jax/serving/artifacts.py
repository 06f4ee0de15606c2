"""What a run answers from: ids, texts and vectors of its labels, the tokenizer, its memory."""

import dataclasses
import hashlib
import json
import os
import shutil
from typing import Any

import numpy as np
from jaxtyping import Float32
from scipy import sparse

from vixml_jax.data import store
from vixml_jax.data.store import PreparedDataset, Texts
from vixml_jax.errors import InputError
from vixml_jax.storage import atomic

DIRECTORY = "answers"  # In a run directory.
ABOUT = "answers.json"
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Answers:
    """Labels of a run, as its model of one step sees them; arrays stay on disk until they are read.

    Attributes:
      path: Their directory.
      about: What `answers.json` says: the step, the data's content hash, lengths, who embedded
        pictures.
      ids, texts: Of the labels.
      vectors: Unit prototypes of the labels.
      memory: Unit vectors of the training queries; None: the run has no memory.
      relevance: Labels of these [training queries, labels], ones.
    """

    path: str
    about: dict[str, Any]
    ids: Texts
    texts: Texts
    vectors: Float32[np.ndarray, "n e"]
    memory: Float32[np.ndarray, "t e"] | None = None
    relevance: sparse.csr_matrix | None = None

    @staticmethod
    def open(path: str) -> "Answers":
        """Opens what `keep` wrote.

        Raises:
          InputError: If a file is missing, or holds something else than `answers.json` says.
        """
        about, again = read_about(path), "remove the directory to make it anew"

        def array(name: str) -> np.ndarray:
            found = store.open_array(path, name, about, ABOUT, again)
            data = memoryview(found).cast("B") if found.size else b""
            if hashlib.sha256(data).hexdigest() != about["arrays"][name]["sha256"]:
                raise InputError(
                    f"{os.path.join(path, name)}.npy: has other bytes than were written; {again}"
                )
            return found

        texts = {name: Texts(array(name), array(f"{name}_offsets")) for name in ("ids", "texts")}
        memory = {}
        if "memory" in about["arrays"]:
            indptr, indices = array("memory_indptr"), array("memory_labels")
            matrix = sparse.csr_matrix(
                (np.ones(len(indices), np.float32), indices, indptr),
                shape=(len(indptr) - 1, about["num_labels"]),
            )
            memory = {"memory": array("memory"), "relevance": matrix}
        return Answers(path, about, **texts, vectors=array("vectors"), **memory)


def read_about(path: str) -> dict[str, Any]:
    """What `answers.json` says.

    Raises:
      InputError: If it is not there, or of another format.
    """
    name = os.path.join(path, ABOUT)
    try:
        with open(name, encoding="utf-8") as file:
            about = json.load(file)
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: {error}; remove {path} to make it anew") from None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise InputError(f"{name}: found another format, expected {FORMAT}; remove {path}")
    return about


def keep(
    path: str,
    dataset: PreparedDataset,
    step: int,
    vectors: Float32[np.ndarray, "n e"],
    memory: Float32[np.ndarray, "t e"] | None,
) -> None:
    """Writes what a run answers from, whole or not at all; replaces what was there.

    Args:
      path: Directory.
      dataset: Of the run.
      step: Of the model.
      vectors: Unit prototypes of the labels.
      memory: Unit vectors of the training queries; None: they are not remembered.
    """
    with atomic.directory(path) as temporary:
        writer = store.Writer(temporary)
        for name, texts in (("ids", dataset.labels.ids), ("texts", dataset.labels.texts)):
            with writer.strings(name) as append:
                for chunk in texts.chunks():
                    append(chunk)
        writer.add("vectors", np.asarray(vectors, np.float32))
        if memory is not None:
            writer.add("memory", np.asarray(memory, np.float32))
            writer.add("memory_indptr", np.asarray(dataset.train_relevance.indptr))
            writer.add("memory_labels", np.asarray(dataset.train_relevance.indices))
        shutil.copyfile(dataset.tokenizer, os.path.join(temporary, store.TOKENIZER))
        offsets = dataset.train.tokens.offsets
        about = {
            "format": FORMAT,
            "name": dataset.name,
            "step": step,
            "content_hash": dataset.content_hash,
            "num_labels": dataset.num_labels,
            "max_tokens": dataset.max_tokens,
            "mean_tokens": float(offsets[-1]) / max(1, len(offsets) - 1),
            "image_width": dataset.image_width,
            "images": dataset.info["settings"]["images"],
            "arrays": writer.arrays,
        }
        with open(os.path.join(temporary, ABOUT), "w", encoding="utf-8") as file:
            json.dump(about, file, indent=2, ensure_ascii=False)
