"""Reader of the XML repository's text layout: raw texts, sparse relevance and filter pairs."""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np
from jaxtyping import Bool, Int, UInt8
from scipy import sparse

from vixml_jax.data.images import image_embeddings
from vixml_jax.data.sources.raw import (
    ItemImages,
    RawDataset,
    RawItems,
    RawQueries,
    canonical,
    file_stats,
)
from vixml_jax.errors import InputError
from vixml_jax.storage import npy_files, regular_files, text_files

_BLOCK = 1 << 22  # Bytes read at a time.
_CHUNK = 1 << 14  # Texts yielded at a time.
_INT32_MAX = np.iinfo(np.int32).max
_MAX_DIGITS = 18  # Every number of so many digits fits int64.
_NEWLINE, _COLON, _ZERO = (np.uint8(ord(character)) for character in "\n:0")
PREFIX = {"train": "trn", "valid": "val", "test": "tst", "labels": "lbl"}
# File names of each part: of the repository, of its early releases, of PECOS.
_TEXTS = {
    "train": ("trn.raw.txt", "trn_X.txt", "X.trn.txt"),
    "valid": ("val.raw.txt", "val_X.txt", "X.val.txt"),
    "test": ("tst.raw.txt", "tst_X.txt", "X.tst.txt"),
    "labels": ("lbl.raw.txt", "Y.txt", "output-items.txt"),
}
_RELEVANCE = {
    split: (f"{prefix}_X_Y.txt", f"{prefix}_X_Y.npz", f"Y.{prefix}.npz")
    for split, prefix in PREFIX.items()
}
_FILTERS = {
    split: (f"filter_labels_{split}.txt", f"{prefix}_filter_labels.txt")
    for split, prefix in PREFIX.items()
}
# Suffixes of the names of files with images or image embeddings.
IMAGE_FILES = (
    *("_image_embeddings.npy", "_has_image.npy", "_images.txt"),
    *("_siglip2.npy", "_map.npy"),
)

# (directory, prefix of file names, expected number of items) -> their images, or None.
FindImages = Callable[[str, str, int], ItemImages | None]


def is_xml_repository(directory: str) -> bool:
    """Whether a directory has the XML repository's text layout; its JSON files are tables."""

    def has_any(*names: str) -> bool:
        return any(os.path.exists(os.path.join(directory, name)) for name in names)

    if has_any(*_TEXTS["train"], *_TEXTS["test"], *_TEXTS["labels"]):
        return True
    return has_any(*_RELEVANCE["train"]) and not has_any("trn.json", "trn.json.gz")


def read_xml_repository(
    directory: str,
    *,
    encoding: str = "utf-8",
    find_images: FindImages = image_embeddings.read_images,
) -> RawDataset:
    """Reads a directory in the XML repository's text layout; texts stay on disk.

    The layout of http://manikvarma.org/downloads/XC/XMLRepository.html: `{trn,tst,lbl}.raw.txt`
    with one text per line, `{trn,tst}_X_Y.txt` with a header `queries labels` and a line
    `label:1 label:1` for each query (or SciPy's `{trn,tst}_X_Y.npz`), optional
    `filter_labels_{train,test}.txt` with one pair `query label` per line, and optional image
    embeddings (see `image_embeddings.read_images`). The names of PECOS (`X.trn.txt`, `Y.trn.npz`,
    `output-items.txt`) are accepted as well, and a validation split with the prefix `val`.

    Args:
      directory: The directory.
      encoding: Text encoding.
      find_images: Finds the images of files with the prefixes trn, val, tst and lbl; by default
        embeddings beside the texts.

    Raises:
      InputError: If a file is missing, or does not fit its header or the other files.
    """
    used = []

    def find(names: tuple[str, ...]) -> str:
        """The path of the first name that exists; of the first name if none does."""
        paths = [os.path.join(directory, name) for name in names]
        path = next((path for path in paths if os.path.exists(path)), paths[0])
        used.append(path)
        return path

    def items(part: str, count: int, relevance_path: str) -> RawItems:
        path = find(_TEXTS[part])
        num_lines = count_lines(path, encoding=encoding)
        if num_lines != count:
            kind = "columns (labels)" if part == "labels" else "rows"
            raise InputError(
                f"{path}: {num_lines} lines, but {os.path.basename(relevance_path)} has {count} "
                f"{kind}; expected one text per line"
            )
        return RawItems(
            count,
            lambda: read_texts(path, encoding=encoding),
            find_images(directory, PREFIX[part], count),
        )

    splits = ["train", "test"]
    if any(os.path.exists(os.path.join(directory, name)) for name in _RELEVANCE["valid"]):
        splits.insert(1, "valid")
    relevance_paths = {split: find(_RELEVANCE[split]) for split in splits}
    relevance = {split: read_relevance(path) for split, path in relevance_paths.items()}
    num_labels = relevance["train"].shape[1]
    for split, matrix in relevance.items():
        if matrix.shape[1] != num_labels:
            raise InputError(
                f"{relevance_paths[split]}: {matrix.shape[1]} labels, but "
                f"{os.path.basename(relevance_paths['train'])} has {num_labels}; expected the same "
                "labels"
            )
    queries = {}
    for split, matrix in relevance.items():
        path = find(_FILTERS[split])
        queries[split] = RawQueries(
            items(split, matrix.shape[0], relevance_paths[split]),
            matrix,
            filter=read_filter(path, matrix.shape) if os.path.exists(path) else None,
        )
    labels = items("labels", num_labels, relevance_paths["train"])
    part_images = {split: split_queries.items.images for split, split_queries in queries.items()}
    image_embeddings.check_widths({**part_images, "labels": labels.images}, directory)
    used += [
        os.path.join(directory, name)
        for name in os.listdir(directory)
        if name.endswith(IMAGE_FILES)
    ]
    return RawDataset(
        name=os.path.basename(os.path.abspath(directory)),
        fingerprint={
            "path": os.path.abspath(directory),
            "files": file_stats(path for path in used if os.path.exists(path)),
        },
        labels=labels,
        **queries,
    )


@contextlib.contextmanager
def _open(path: str, encoding: str = "utf-8") -> Iterator[tuple[BinaryIO, str]]:
    """An open text file and the encoding of its lines; see `text_files.open_text`."""
    try:
        with text_files.open_text(path, encoding) as opened:
            yield opened
    except FileNotFoundError:
        raise InputError(
            f"{path}: not found; expected the XML repository's layout (trn.raw.txt, tst.raw.txt, "
            "lbl.raw.txt, trn_X_Y.txt, tst_X_Y.txt)"
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None


def _blocks_of(path: str, file: BinaryIO) -> Iterator[bytes]:
    """The contents of an open file in blocks of whole lines."""
    rest, line = b"", 1
    while block := text_files.read_bytes(file, _BLOCK, path, line):
        end = block.find(b"\n")
        if len(rest) + (len(block) if end < 0 else end) > text_files.MAX_LINE:
            raise text_files.long_line_error(path, line)
        line += block.count(b"\n")
        cut = block.rfind(b"\n") + 1
        if cut:
            yield rest + block[:cut]
            rest = block[cut:]
        else:
            rest += block
    if rest:
        yield rest


def _read_blocks(path: str) -> Iterator[bytes]:
    """The contents of a file of numbers in blocks of whole lines."""
    with _open(path) as (file, _):
        yield from _blocks_of(path, file)


def count_lines(path: str, *, encoding: str = "utf-8") -> int:
    """Number of lines of a file; the last one may lack its newline."""
    count = 0
    with _open(path, encoding) as (file, _):
        for block in _blocks_of(path, file):
            count += block.count(b"\n") + (not block.endswith(b"\n"))
    return count


def read_texts(path: str, *, encoding: str = "utf-8") -> Iterator[list[str]]:
    """Texts of a file, one per line, in chunks. Only newlines end a line.

    Args:
      path: The file.
      encoding: Its encoding; a byte order mark takes precedence.

    Raises:
      InputError: If a line is not in the encoding; or, at the end, if the file is UTF-8 and the
        encoding has a character for every byte.
    """
    line = 1
    with _open(path, encoding) as (file, text_encoding):
        check = text_files.Utf8Check(path, text_encoding)
        for block in _blocks_of(path, file):
            check.add(block)
            rows = block.split(b"\n")
            if not rows[-1]:
                rows.pop()
            for start in range(0, len(rows), _CHUNK):
                chunk = rows[start : start + _CHUNK]
                texts = []
                try:
                    for row in chunk:
                        texts.append(row.decode(text_encoding).removesuffix("\r"))
                except UnicodeDecodeError as error:
                    number = line + start + len(texts)
                    raise text_files.encoding_error(path, number, error, text_encoding) from None
                yield texts
            line += len(rows)
        check.finish()


def read_relevance(path: str) -> sparse.csr_matrix:
    """The relevance matrix [queries, labels] of a file: float32 ones, in canonical format.

    Blocks of lines are parsed as a whole with NumPy, not token by token. A file that ends in `.npz`
    is a SciPy sparse matrix, of which every nonzero value becomes one.

    Raises:
      InputError: If the header does not match the rows, a label is out of range or a duplicate, or
        a token is not `label:1`.
    """
    if path.endswith(".npz"):
        return _load_relevance(path)
    blocks = _read_blocks(path)
    first = next(blocks, b"")
    header, _, rest = first.partition(b"\n")
    words = header.split()
    if len(words) != 2 or not all(word.isdigit() and len(word) <= _MAX_DIGITS for word in words):
        raise InputError(
            f"{path}, line 1: found {header[:60].decode('utf-8', 'replace')!r}, expected a header "
            "'queries labels'"
        )
    rows, columns = map(int, words)
    if not rows or not columns:
        raise InputError(
            f"{path}, line 1: {rows} queries, {columns} labels; expected at least one of each"
        )
    counts, indices, line = [], [], 2
    for block in itertools.chain([rest] if rest else [], blocks):
        block_counts, block_indices = _parse_pairs(path, block, line, columns)
        counts.append(block_counts)
        indices.append(block_indices.astype(np.int32 if columns <= _INT32_MAX else np.int64))
        line += len(block_counts)
    if line - 2 != rows:
        raise InputError(
            f"{path}: the header declares {rows} rows, found {line - 2}; the file is truncated or "
            "the header is wrong"
        )
    return to_csr(np.concatenate(counts), np.concatenate(indices), columns)


def _load_relevance(path: str) -> sparse.csr_matrix:
    """The relevance in a file of `scipy.sparse.save_npz`."""
    regular_files.check(path)
    try:
        npy_files.check_archive(path)
        loaded = sparse.load_npz(path)
        if hasattr(loaded, "check_format"):  # Without it, indices may be out of range.
            loaded.check_format(full_check=True)
        matrix = sparse.csr_matrix(loaded)
    except Exception as error:  # zipfile, NumPy and SciPy raise many types for a bad file.
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{path}: not a SciPy sparse matrix ({reason})") from None
    if len(matrix.shape) != 2 or 0 in matrix.shape:
        raise InputError(f"{path}: shape {matrix.shape}; expected at least one query and one label")
    if matrix.dtype.kind not in "biuf":
        raise InputError(f"{path}: values of type {matrix.dtype}; expected numbers")
    values = np.asarray(matrix.data, np.float64)
    if not np.isfinite(values).all() or (values < 0).any():
        raise InputError(f"{path}: has negative or infinite values; expected 1 at each label")
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    return to_csr(np.diff(matrix.indptr), matrix.indices, matrix.shape[1])


def to_csr(
    counts: Int[np.ndarray, " n"], indices: Int[np.ndarray, " nnz"], columns: int
) -> sparse.csr_matrix:
    """A float32 matrix of ones at the given columns of each row.

    Args:
      counts: Number of ones in each row.
      indices: Their columns, row after row, ascending in each row.
      columns: Number of columns of the matrix.
    """
    indptr = np.concatenate([[0], np.cumsum(counts)])
    index_dtype = np.int32 if max(len(indices), columns) <= _INT32_MAX else np.int64
    data = np.ones(len(indices), np.float32)
    return canonical(
        sparse.csr_matrix(
            (data, indices.astype(index_dtype, copy=False), indptr.astype(index_dtype)),
            shape=(len(counts), columns),
        )
    )


def _parse_pairs(
    path: str, block: bytes, line: int, columns: int
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " nnz"]]:
    """Number of labels of each line and the labels, sorted in each line.

    Args:
      path: Path of the file, for messages.
      block: Whole lines of tokens `label:1`.
      line: Line number of the first one.
      columns: Number of labels.
    """
    text = np.frombuffer(block, np.uint8)
    starts, ends, lines = _split_tokens(text)
    colons = np.flatnonzero(text == _COLON)

    def refuse(bad: Bool[np.ndarray, " t"], fault: str) -> None:
        """Raises an error for the first bad token."""
        if bad.any():
            index = int(np.argmax(bad))
            token = block[starts[index] : ends[index]][:40].decode("utf-8", "replace")
            raise InputError(f"{path}, line {line + lines[index]}: {fault.format(token=token)}")

    if len(colons) != len(starts) or np.any(colons < starts) or np.any(colons >= ends):
        per_token = np.searchsorted(colons, ends) - np.searchsorted(colons, starts)
        refuse(per_token != 1, "found {token!r}, expected label:1")
    good = _are_digits(text, starts, colons) & (colons - starts <= _MAX_DIGITS)
    refuse(~good, "found {token!r}, expected label:1 with a label id before the colon")
    refuse(~_are_one(text, colons + 1, ends), "found {token!r}, expected the value 1 (label:1)")
    labels = _to_integers(text, starts, colons)
    refuse(labels >= columns, f"label of {{token!r}} is out of range, expected 0 to {columns - 1}")

    num_lines = int(np.count_nonzero(text == _NEWLINE)) + (text[-1] != _NEWLINE)
    order = slice(None)
    if np.any((np.diff(labels) <= 0) & (np.diff(lines) == 0)):  # Some line is not sorted.
        order = np.lexsort((labels, lines))
    labels, lines, starts, ends = labels[order], lines[order], starts[order], ends[order]
    duplicate = np.zeros(len(labels), bool)
    duplicate[1:] = (np.diff(labels) == 0) & (np.diff(lines) == 0)
    refuse(duplicate, "duplicate label {token!r}; expected each label once")
    return np.bincount(lines, minlength=num_lines), labels


def _split_tokens(
    text: UInt8[np.ndarray, " b"],
) -> tuple[Int[np.ndarray, " t"], Int[np.ndarray, " t"], Int[np.ndarray, " t"]]:
    """Start and end of each token between white space, and its line (from 0)."""
    space = np.ones(len(text) + 2, bool)
    space[1:-1] = (text == _NEWLINE) | (text == 32) | (text == 9) | (text == 13)
    edges = np.flatnonzero(space[1:] != space[:-1])
    starts, ends = edges[::2], edges[1::2]
    return starts, ends, np.searchsorted(np.flatnonzero(text == _NEWLINE), starts)


def _are_digits(
    text: UInt8[np.ndarray, " b"], starts: Int[np.ndarray, " t"], ends: Int[np.ndarray, " t"]
) -> Bool[np.ndarray, " t"]:
    """Whether each range is not empty and has digits only."""
    others = np.zeros(len(text) + 1, np.int64)
    # Unsigned: characters below "0" wrap around to large values.
    np.cumsum((text - _ZERO) > 9, out=others[1:])
    return (starts < ends) & (others[starts] == others[ends])


def _are_one(
    text: UInt8[np.ndarray, " b"], starts: Int[np.ndarray, " t"], ends: Int[np.ndarray, " t"]
) -> Bool[np.ndarray, " t"]:
    """Whether each range is the number 1, such as '1', '1.0' or '1.000000'."""
    is_one = starts < ends
    is_one[is_one] = text[starts[is_one]] == _ZERO + 1
    longer = is_one & (ends - starts > 1)
    if longer.any():
        begin, end = starts[longer], ends[longer]
        digits = _are_digits(text, begin + 2, end) | (begin + 2 == end)
        nonzero = np.concatenate([[0], np.cumsum(text != _ZERO)])
        zeros = digits & (nonzero[begin + 2] == nonzero[end])
        is_one[longer] = (text[begin + 1] == ord(".")) & zeros
    return is_one


def _to_integers(
    text: UInt8[np.ndarray, " b"], starts: Int[np.ndarray, " t"], ends: Int[np.ndarray, " t"]
) -> Int[np.ndarray, " t"]:
    """The numbers in ranges of digits, computed digit by digit from the last one."""
    values = np.zeros(len(starts), np.int64)
    for power in range(int((ends - starts).max(initial=0))):
        has = np.flatnonzero(ends - power > starts)
        values[has] += (text[ends[has] - 1 - power] - _ZERO).astype(np.int64) * 10**power
    return values


def read_filter(path: str, shape: tuple[int, int]) -> Int[np.ndarray, "f 2"]:
    """Filter pairs from lines `query label` of row numbers, sorted; none if the file is empty.

    Args:
      path: The file.
      shape: Number of queries and labels.

    Raises:
      InputError: If a line is not a pair of numbers in range, or a pair is a duplicate.
    """
    blocks, block_lines, line = [], [], 1
    for block in _read_blocks(path):
        text = np.frombuffer(block, np.uint8)
        starts, ends, lines = _split_tokens(text)
        num_lines = int(np.count_nonzero(text == _NEWLINE)) + (text[-1] != _NEWLINE)
        per_line = np.bincount(lines, minlength=num_lines)
        wrong = (per_line != 0) & (per_line != 2)
        bad = ~_are_digits(text, starts, ends) | (ends - starts > _MAX_DIGITS)
        wrong |= np.bincount(lines, weights=bad, minlength=num_lines) > 0
        if wrong.any():
            index = int(np.argmax(wrong))
            row = block.split(b"\n", index + 1)[index][:60].decode("utf-8", "replace")
            raise InputError(f"{path}, line {line + index}: found {row!r}, expected 'query label'")
        blocks.append(_to_integers(text, starts, ends).reshape(-1, 2))
        block_lines.append(line + lines[::2])
        line += num_lines
    if not blocks:
        return np.zeros((0, 2), np.int64)
    pairs, pair_lines = np.concatenate(blocks), np.concatenate(block_lines)
    bad = (pairs >= shape).any(axis=1)
    if bad.any():
        index = int(np.argmax(bad))
        raise InputError(
            f"{path}, line {pair_lines[index]}: pair {tuple(map(int, pairs[index]))} is out of "
            f"range, expected a query below {shape[0]} and a label below {shape[1]}"
        )
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))
    pairs = pairs[order]
    duplicates = np.flatnonzero((np.diff(pairs, axis=0) == 0).all(axis=1))
    if len(duplicates):
        pair = tuple(map(int, pairs[duplicates[0]]))
        raise InputError(
            f"{path}, line {pair_lines[order[duplicates[0] + 1]]}: duplicate pair {pair}; expected "
            "each pair once (sort -u removes duplicates)"
        )
    return pairs
