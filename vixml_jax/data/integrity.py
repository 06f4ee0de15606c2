"""Checks of prepared data: their structure whenever they are opened, checksums when a run starts.

The structure is checked in a fraction of a second per gigabyte: offsets, token ids, labels and
filter pairs lead nowhere but into the data. Only the checksums find values that are possible but
wrong; they take about a second per gigabyte and core, so commands compare them once, when they
start.
"""

import concurrent.futures
import functools
import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped

from vixml_jax.errors import InputError
from vixml_jax.storage import npy_files, regular_files

_BLOCK = 1 << 22  # Values, or bytes, read at a time.
_THREADS = 8
CONSTANTS = ("propensity_a", "propensity_b", "max_tokens")  # Fields that the content hash covers.


Arrays = dict[str, Shaped[np.ndarray, "..."]]


def check(path: str, arrays: Arrays, parts: Sequence[str], info: dict[str, Any]) -> None:
    """Checks that the arrays of a data set fit each other.

    Args:
      path: Directory of the data set.
      arrays: Its arrays by name: 'train_texts', 'train_texts_offsets' and so on.
      parts: 'train', 'valid', 'test' and 'labels'; there may be no arrays of some.
      info: Contents of `dataset.json`.

    Raises:
      InputError: If they do not; names the file.
    """
    for part in parts:
        own = {name: values for name, values in arrays.items() if name.startswith(f"{part}_")}
        if own:
            _check_part(
                path, part, {name.removeprefix(f"{part}_"): x for name, x in own.items()}, info
            )


def _check_part(path: str, part: str, arrays: Arrays, info: dict[str, Any]) -> None:
    """Checks the arrays of one part, whose names here are those without the part."""

    def require(name: str, is_valid: bool, expected: str) -> None:
        if not is_valid:
            found = arrays[name]
            raise InputError(
                f"{os.path.join(path, f'{part}_{name}.npy')}: damaged (found {found.dtype} "
                f"{found.shape} with values that do not fit, expected {expected}); prepare it again"
            )

    width = info["image_width"]
    kinds = {"texts": "u1", "ids": "u1", "tokens": "i4", "images": "f2"}
    count = len(arrays["texts_offsets"]) - 1
    if part == "labels":
        require("texts_offsets", count == info["num_labels"], f"{info['num_labels']:,} labels")
    for name, kind in kinds.items():
        if name not in arrays:
            continue
        values, offsets = arrays[name], arrays[f"{name}_offsets"]
        shape = (len(values), width) if name == "images" else (len(values),)
        fits = values.dtype == np.dtype(kind) and values.shape == shape
        require(name, fits, f"{np.dtype(kind)} of shape {shape}")
        ascends = offsets.dtype == np.int64 and npy_files.are_offsets(offsets, count, len(values))
        require(
            f"{name}_offsets", ascends,
            f"{count + 1:,} ascending int64 from 0 to {len(values):,}",
        )  # fmt: skip
    require(
        "tokens", _is_within(arrays["tokens"], info["vocab_size"]),
        f"token ids from 0 to {info['vocab_size'] - 1:,}",
    )  # fmt: skip
    whole = arrays["whole"]
    fits = whole.shape == (count,) and whole.dtype.kind == "i"
    require("whole", fits, f"{count:,} numbers of tokens")
    if "filter" in arrays:
        pairs = arrays["filter"]
        fits = pairs.ndim == 2 and pairs.shape[1] == 2 and pairs.dtype.kind == "i"
        fits = fits and _is_within(pairs[:, 0], count)
        fits = fits and _is_within(pairs[:, 1], info["num_labels"])
        require("filter", fits, f"pairs of {count:,} queries and {info['num_labels']:,} labels")
    if "weights" in arrays:
        weights = arrays["weights"]
        fits = weights.shape == arrays["relevance_data"].shape and weights.dtype.kind == "f"
        fits = fits and bool(np.isfinite(weights).all()) and weights.min(initial=0) >= 0
        require("weights", fits, "a finite weight of at least 0 for each label of each query")
    if "relevance_indptr" in arrays:
        rows = len(arrays["relevance_indptr"]) - 1
        require("relevance_indptr", rows == count, f"a row for each of {count:,} queries")


def _is_within(values: Int[np.ndarray, " n"], bound: int) -> bool:
    """Whether all values are from 0 to below a bound."""
    for start in range(0, len(values), _BLOCK):
        block = values[start : start + _BLOCK]
        if block.min() < 0 or block.max() >= bound:
            return False
        npy_files.release(values)
    return True


def content_hash(arrays: dict[str, Any], tokenizer: bytes, info: dict[str, Any]) -> str:
    """SHA-256 of what a data set consists of.

    Args:
      arrays: Dtype, shape and SHA-256 of each array, by name.
      tokenizer: Content of the tokenizer file.
      info: Has `CONSTANTS`.
    """
    content = {
        "arrays": arrays,
        "tokenizer": hashlib.sha256(tokenizer).hexdigest(),
        **{key: info[key] for key in CONSTANTS},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_content_hash(path: str, tokenizer: str, info: dict[str, Any]) -> None:
    """Checks that `dataset.json` and the tokenizer are those that were written together.

    Args:
      path: `dataset.json`, for the message.
      tokenizer: Path of the tokenizer file.
      info: Contents of `dataset.json`.

    Raises:
      InputError: If they are not.
    """
    with regular_files.open_binary(tokenizer) as file:
        found = content_hash(info["arrays"], file.read(), info)
    if found != info["content_hash"]:
        raise InputError(
            f"{path}: damaged, or {os.path.basename(tokenizer)} is (content hash {found[:12]}, "
            f"expected {info['content_hash'][:12]}); prepare it again"
        )


def verify(path: str, info: dict[str, Any]) -> None:
    """Compares the bytes of all arrays with their checksums, once per process.

    Args:
      path: Directory of the data set.
      info: Contents of `dataset.json`.

    Raises:
      InputError: If an array has changed since it was written; names the file.
    """

    def fault(item: tuple[str, dict[str, Any]]) -> str | None:
        name, array = item
        file = os.path.join(path, f"{name}.npy")
        status = os.stat(file)
        found = _digest(file, status.st_ino, status.st_size, status.st_mtime_ns, _nbytes(array))
        return file if found != array["sha256"] else None

    largest_first = sorted(info["arrays"].items(), key=lambda item: -_nbytes(item[1]))
    threads = min(_THREADS, os.cpu_count() or 1)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        damaged = next((file for file in pool.map(fault, largest_first) if file), None)
    if damaged:
        raise InputError(
            f"{damaged}: damaged, or changed since it was prepared (its SHA-256 is not that in "
            "dataset.json); prepare it again"
        )


def _nbytes(array: dict[str, Any]) -> int:
    """Bytes of the values of an array, from what `dataset.json` says of it."""
    return int(np.prod(array["shape"], dtype=np.int64)) * np.dtype(array["dtype"]).itemsize


@functools.lru_cache(maxsize=256)
def _digest(path: str, inode: int, size: int, modified_ns: int, nbytes: int) -> str:
    """SHA-256 of the last bytes of a file, the values of its array.

    Args:
      path: The file.
      inode, size, modified_ns: They tell a file from one that replaced it.
      nbytes: Bytes of the values.
    """
    del inode, modified_ns
    digest = hashlib.sha256()
    with regular_files.open_binary(path) as file:
        file.seek(size - nbytes)
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
