"""Readers of the XML repository's text layout: raw texts, sparse relevance, filter pairs."""

import os
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Bool, Int, UInt8
from scipy import sparse

from vixml_jax.data.images import image_files
from vixml_jax.data.sources import readers
from vixml_jax.data.sources.raw import (
    ItemImages,
    RawDataset,
    RawItems,
    RawQueries,
    canonical,
    describe_files,
)
from vixml_jax.errors import InputError

_BLOCK = 1 << 22  # Bytes read at a time.
_CHUNK = 1 << 14  # Texts handed on at a time.
_INT32_MAX = np.iinfo(np.int32).max
_MAX_DIGITS = 18  # Of a number that surely fits int64.
_NEWLINE, _COLON, _ZERO = (np.uint8(ord(character)) for character in "\n:0")
PREFIX = {"train": "trn", "valid": "val", "test": "tst", "labels": "lbl"}
# What the files of a split are called: by the repository, by its early releases, by PECOS.
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
# How the names of files end that pictures come from.
PICTURE_FILES = (
    *("_image_embeddings.npy", "_has_image.npy", "_images.txt"),
    *("_siglip2.npy", "_map.npy"),
)

# (directory, prefix, items there should be) -> their pictures, if they have any.
FindImages = Callable[[str, str, int], ItemImages | None]


def is_xml_repository(directory: str) -> bool:
    """Whether a directory has the XML repository's text layout, rather than tables (its json)."""

    def there(*names: str) -> bool:
        return any(os.path.exists(os.path.join(directory, name)) for name in names)

    if there(*_TEXTS["train"], *_TEXTS["test"], *_TEXTS["labels"]):
        return True
    return there(*_RELEVANCE["train"]) and not there("trn.json", "trn.json.gz")


def read_xml_repository(
    directory: str, *, encoding: str = "utf-8", find_images: FindImages = image_files.read_images
) -> RawDataset:
    """Reads a directory in the XML repository's text layout; texts are left on disk.

    The layout of http://manikvarma.org/downloads/XC/XMLRepository.html: `{trn,tst,lbl}.raw.txt`
    with one text a line, `{trn,tst}_X_Y.txt` with a header `queries labels` and a line
    `label:1 label:1` for each query (or scipy's `{trn,tst}_X_Y.npz`), optional
    `filter_labels_{train,test}.txt` with a pair `query label` a line, and optional image
    embeddings (see `images.read_images`). The names that PECOS uses (`X.trn.txt`, `Y.trn.npz`,
    `output-items.txt`) serve as well, and a validation split as `val`.

    Args:
      directory: Where the files are.
      encoding: Of the texts.
      find_images: Of the files trn, val, tst and lbl; embeddings beside the texts if not told.

    Raises:
      InputError: If a file is missing, or does not fit its header or the other files.
    """
    used = []

    def find(names: tuple[str, ...]) -> str:
        """The first that there is; the first name where there is none."""
        paths = [os.path.join(directory, name) for name in names]
        path = next((path for path in paths if os.path.exists(path)), paths[0])
        used.append(path)
        return path

    def items(split: str, rows: int, table: str) -> RawItems:
        path = find(_TEXTS[split])
        found = count_lines(path)
        if found != rows:
            kind = "columns (labels)" if split == "labels" else "rows"
            raise InputError(
                f"{path}: {found} lines, but {os.path.basename(table)} has {rows} {kind}; "
                "expected one text a line"
            )
        return RawItems(
            rows,
            lambda: read_texts(path, encoding=encoding),
            find_images(directory, PREFIX[split], rows),
        )

    splits = ["train", "test"]
    if any(os.path.exists(os.path.join(directory, name)) for name in _RELEVANCE["valid"]):
        splits.insert(1, "valid")
    tables = {split: find(_RELEVANCE[split]) for split in splits}
    relevance = {split: read_relevance(path) for split, path in tables.items()}
    num_labels = relevance["train"].shape[1]
    for split, matrix in relevance.items():
        if matrix.shape[1] != num_labels:
            raise InputError(
                f"{tables[split]}: {matrix.shape[1]} labels, but "
                f"{os.path.basename(tables['train'])} has {num_labels}; expected the same label set"
            )
    queries = {}
    for split, matrix in relevance.items():
        path = find(_FILTERS[split])
        queries[split] = RawQueries(
            items(split, matrix.shape[0], tables[split]),
            matrix,
            filter=read_filter(path, matrix.shape) if os.path.exists(path) else None,
        )
    labels = items("labels", num_labels, tables["train"])
    every = {split: found.items.images for split, found in queries.items()}
    image_files.check_widths({**every, "labels": labels.images}, directory)
    used += [
        os.path.join(directory, name)
        for name in os.listdir(directory)
        if name.endswith(PICTURE_FILES)
    ]
    return RawDataset(
        name=os.path.basename(os.path.abspath(directory)),
        fingerprint={
            "path": os.path.abspath(directory),
            "files": describe_files(path for path in used if os.path.exists(path)),
        },
        labels=labels,
        **queries,
    )


def _read_blocks(path: str) -> Iterator[bytes]:
    """The file in blocks that end at the end of a line."""
    try:
        file = open(path, "rb")
    except FileNotFoundError:
        raise InputError(
            f"{path}: not found; expected the XML repository's layout (trn.raw.txt tst.raw.txt "
            "lbl.raw.txt trn_X_Y.txt tst_X_Y.txt)"
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    with file:
        rest, line = b"", 1
        while block := file.read(_BLOCK):
            end = block.find(b"\n")
            if len(rest) + (len(block) if end < 0 else end) > readers.MAX_LINE:
                raise InputError(
                    f"{path}, line {line}: longer than {readers.MAX_LINE >> 20} MiB; expected one "
                    "item a line"
                )
            line += block.count(b"\n")
            cut = block.rfind(b"\n") + 1
            if cut:
                yield rest + block[:cut]
                rest = block[cut:]
            else:
                rest += block
        if rest:
            yield rest


def count_lines(path: str) -> int:
    """Lines of a file; the last may lack its newline."""
    count = 0
    for block in _read_blocks(path):
        count += block.count(b"\n") + (not block.endswith(b"\n"))
    return count


def read_texts(path: str, *, encoding: str = "utf-8") -> Iterator[list[str]]:
    """Texts of a file, one a line, a chunk at a time. Only newlines end a line.

    Raises:
      InputError: If a line is not in the encoding.
    """
    line = 1
    for block in _read_blocks(path):
        if line == 1:
            block = block.removeprefix(b"\xef\xbb\xbf")  # The byte order mark of some editors.
        rows = block.split(b"\n")
        if not rows[-1]:
            rows.pop()
        for start in range(0, len(rows), _CHUNK):
            chunk = rows[start : start + _CHUNK]
            try:
                yield [row.decode(encoding).removesuffix("\r") for row in chunk]
            except UnicodeDecodeError:
                raise _not_decoded(path, chunk, line + start, encoding) from None
        line += len(rows)


def _not_decoded(path: str, chunk: list[bytes], line: int, encoding: str) -> InputError:
    for at, row in enumerate(chunk):
        try:
            row.decode(encoding)
        except UnicodeDecodeError as error:
            hint = "" if encoding == "latin-1" else "; if it is latin-1, say --encoding=latin-1"
            return InputError(
                f"{path}, line {line + at}: byte 0x{row[error.start]:02x} at column "
                f"{error.start + 1} is not {encoding}{hint}"
            )
    raise AssertionError("every row decodes")


def read_relevance(path: str) -> sparse.csr_matrix:
    """Ones at `label:1`, float32 in canonical form; parsed in whole blocks, not by token.

    A path that ends in `.npz` is scipy's: any number but zero there is a one.

    Raises:
      InputError: If the header disagrees with the rows, a label is out of range or given twice,
        or a token is not `label:1`.
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
        raise InputError(f"{path}, line 1: {rows} queries, {columns} labels; expected some of each")
    counts, indices, line = [], [], 2
    for block in _chain(rest, blocks):
        block_counts, block_indices = _parse_pairs(path, block, line, columns)
        counts.append(block_counts)
        indices.append(block_indices.astype(np.int32 if columns <= _INT32_MAX else np.int64))
        line += len(block_counts)
    if line - 2 != rows:
        raise InputError(
            f"{path}: the header says {rows} rows, found {line - 2}; the file is truncated or the "
            "header is wrong"
        )
    return to_csr(np.concatenate(counts), np.concatenate(indices), columns)


def _load_relevance(path: str) -> sparse.csr_matrix:
    """Relevance that `scipy.sparse.save_npz` wrote."""
    try:
        found = sparse.load_npz(path)
        if hasattr(found, "check_format"):  # Else rows and columns out of range are read.
            found.check_format(full_check=True)
        matrix = sparse.csr_matrix(found)
    except Exception as error:  # Whatever zipfile, numpy and scipy raise on what is no such file.
        raise InputError(f"{path}: not a sparse matrix of scipy ({error})") from None
    if len(matrix.shape) != 2 or 0 in matrix.shape:
        raise InputError(f"{path}: {matrix.shape}; expected some queries and some labels")
    if matrix.dtype.kind not in "biuf":
        raise InputError(f"{path}: values of type {matrix.dtype}; expected numbers")
    values = np.asarray(matrix.data, np.float64)
    if not np.isfinite(values).all() or (values < 0).any():
        raise InputError(f"{path}: has negative or infinite values; expected 1 at each label")
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    return to_csr(np.diff(matrix.indptr), matrix.indices, matrix.shape[1])


def _chain(first: bytes, others: Iterator[bytes]) -> Iterator[bytes]:
    if first:
        yield first
    yield from others


def to_csr(
    counts: Int[np.ndarray, " n"], indices: Int[np.ndarray, " nnz"], columns: int
) -> sparse.csr_matrix:
    """Ones at `indices`, sorted in each row; `counts` of them a row."""
    indptr = np.concatenate([[0], np.cumsum(counts)])
    index = np.int32 if max(len(indices), columns) <= _INT32_MAX else np.int64
    data = np.ones(len(indices), np.float32)
    return canonical(
        sparse.csr_matrix(
            (data, indices.astype(index, copy=False), indptr.astype(index)),
            shape=(len(counts), columns),
        )
    )


def _parse_pairs(
    path: str, block: bytes, line: int, columns: int
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " nnz"]]:
    """Labels of each line and the sorted labels, of a block that begins at `line`."""
    text = np.frombuffer(block, np.uint8)
    starts, ends, lines = _split_tokens(text)
    colons = np.flatnonzero(text == _COLON)

    def refuse(bad: Bool[np.ndarray, " t"], fault: str) -> None:
        if bad.any():
            at = int(np.argmax(bad))
            token = block[starts[at] : ends[at]][:40].decode("utf-8", "replace")
            raise InputError(f"{path}, line {line + lines[at]}: {fault.format(token=token)}")

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
    if np.any((np.diff(labels) <= 0) & (np.diff(lines) == 0)):  # Not yet sorted.
        order = np.lexsort((labels, lines))
    labels, lines, starts, ends = labels[order], lines[order], starts[order], ends[order]
    twice = np.zeros(len(labels), bool)
    twice[1:] = (np.diff(labels) == 0) & (np.diff(lines) == 0)
    refuse(twice, "{token!r} stands there twice; expected each label once")
    return np.bincount(lines, minlength=num_lines), labels


def _split_tokens(
    text: UInt8[np.ndarray, " b"],
) -> tuple[Int[np.ndarray, " t"], Int[np.ndarray, " t"], Int[np.ndarray, " t"]]:
    """Begin and end of what white space separates, and the line (from 0) that it stands on."""
    space = np.ones(len(text) + 2, bool)
    space[1:-1] = (text == _NEWLINE) | (text == 32) | (text == 9) | (text == 13)
    edges = np.flatnonzero(space[1:] != space[:-1])
    starts, ends = edges[::2], edges[1::2]
    return starts, ends, np.searchsorted(np.flatnonzero(text == _NEWLINE), starts)


def _are_digits(
    text: UInt8[np.ndarray, " b"], starts: Int[np.ndarray, " t"], ends: Int[np.ndarray, " t"]
) -> Bool[np.ndarray, " t"]:
    """Whether each range is not empty and of digits alone."""
    others = np.zeros(len(text) + 1, np.int64)
    np.cumsum((text - _ZERO) > 9, out=others[1:])  # Unsigned: what is below "0" wraps around.
    return (starts < ends) & (others[starts] == others[ends])


def _are_one(
    text: UInt8[np.ndarray, " b"], starts: Int[np.ndarray, " t"], ends: Int[np.ndarray, " t"]
) -> Bool[np.ndarray, " t"]:
    """Whether each range says 1, as '1', '1.0', '1.000000'."""
    one = starts < ends
    one[one] = text[starts[one]] == _ZERO + 1
    longer = one & (ends - starts > 1)
    if longer.any():
        begin, end = starts[longer], ends[longer]
        zeros = _are_digits(text, begin + 2, end) | (begin + 2 == end)
        nonzero = np.concatenate([[0], np.cumsum(text != _ZERO)])
        one[longer] = (text[begin + 1] == ord(".")) & zeros & (nonzero[begin + 2] == nonzero[end])
    return one


def _to_integers(
    text: UInt8[np.ndarray, " b"], starts: Int[np.ndarray, " t"], ends: Int[np.ndarray, " t"]
) -> Int[np.ndarray, " t"]:
    """The numbers that ranges of digits spell, digit by digit from the last."""
    values = np.zeros(len(starts), np.int64)
    for place in range(int((ends - starts).max(initial=0))):
        has = np.flatnonzero(ends - place > starts)
        values[has] += (text[ends[has] - 1 - place] - _ZERO).astype(np.int64) * 10**place
    return values


def read_filter(path: str, shape: tuple[int, int]) -> Int[np.ndarray, "f 2"]:
    """Pairs `query label`, one a line, sorted; none if the file is empty.

    Raises:
      InputError: If a line is not a pair of ids in range, or a pair is given twice.
    """
    found, at_line, line = [], [], 1
    for block in _read_blocks(path):
        text = np.frombuffer(block, np.uint8)
        starts, ends, lines = _split_tokens(text)
        num_lines = int(np.count_nonzero(text == _NEWLINE)) + (text[-1] != _NEWLINE)
        per_line = np.bincount(lines, minlength=num_lines)
        wrong = (per_line != 0) & (per_line != 2)
        bad = ~_are_digits(text, starts, ends) | (ends - starts > _MAX_DIGITS)
        wrong |= np.bincount(lines, weights=bad, minlength=num_lines) > 0
        if wrong.any():
            at = int(np.argmax(wrong))
            row = block.split(b"\n", at + 1)[at][:60].decode("utf-8", "replace")
            raise InputError(f"{path}, line {line + at}: found {row!r}, expected 'query label'")
        found.append(_to_integers(text, starts, ends).reshape(-1, 2))
        at_line.append(line + lines[::2])
        line += num_lines
    if not found:
        return np.zeros((0, 2), np.int64)
    pairs, at_line = np.concatenate(found), np.concatenate(at_line)
    bad = (pairs >= shape).any(axis=1)
    if bad.any():
        at = int(np.argmax(bad))
        raise InputError(
            f"{path}, line {at_line[at]}: pair {tuple(map(int, pairs[at]))} is out of range, "
            f"expected a query below {shape[0]} and a label below {shape[1]}"
        )
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))
    pairs = pairs[order]
    twice = np.flatnonzero((np.diff(pairs, axis=0) == 0).all(axis=1))
    if len(twice):
        at = order[twice[0] + 1]
        raise InputError(
            f"{path}, line {at_line[at]}: pair {tuple(map(int, pairs[twice[0]]))} is given twice; "
            "expected each once (sort -u)"
        )
    return pairs
