"""The prepared data of a run: found again after a move, and how their tables were read."""

import os
from collections.abc import Iterator
from typing import Any

from vixml_jax.data import store
from vixml_jax.data.sources.reading import Reading
from vixml_jax.errors import InputError
from vixml_jax.storage import json_files, object_store, sealed

READING = "reading.json"  # In a run directory: how the tables of its data were read.


def save_reading(workdir: str, reading: dict[str, Any] | None) -> None:
    """Writes to the run directory how the tables of its data were read.

    Args:
      workdir: The run directory.
      reading: `reading` of the data's `dataset.json`; None: they came from no tables.
    """
    if reading is not None:
        sealed.write(os.path.join(workdir, READING), reading)


def read_reading(workdir: str) -> Reading | None:
    """How the tables of a run's data were read; None: not recorded, or there were no tables.

    Raises:
      InputError: If the file is damaged.
    """
    path = os.path.join(workdir, READING)
    if not json_files.is_there(path):
        return None
    return sealed.read(path, Reading, "remove it, and give the columns by flags")


def is_missing(data: str) -> bool:
    """Whether there is nothing under a local path."""
    return object_store.is_local(data) and not os.path.exists(data)


def find_moved(data: str, workdir: str, content_hash: str) -> str | None:
    """Where the data of a moved run are now; None: not found.

    Data that moved together with the run lie under the same last names beside it or above it: for
    the data `/home/me/shop/data/titles` of the run `/mnt/shop/runs/1`, `/mnt/shop/data/titles`.
    Only data with the content hash are taken.

    Args:
      data: Local path of the data in training.
      workdir: The run directory now.
      content_hash: Of the data in training.
    """
    if not object_store.is_local(workdir):
        return None
    return next((path for path in _candidates(data, workdir) if _has(path, content_hash)), None)


def _candidates(data: str, workdir: str) -> Iterator[str]:
    names = [name for name in os.path.normpath(data).split(os.sep) if name not in ("", "..")]
    directory = os.path.abspath(workdir)
    while True:
        for first in range(len(names)):
            yield os.path.join(directory, *names[first:])
        directory, child = os.path.split(directory)
        if not child:
            return


def _has(path: str, content_hash: str) -> bool:
    """Whether a directory holds prepared data with this content hash."""
    if not os.path.isfile(os.path.join(path, store.INFO)):
        return False
    try:
        return store.read_info(path)["content_hash"] == content_hash
    except InputError:  # Of another format, or damaged.
        return False
