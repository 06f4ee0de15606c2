"""Roles of the columns of a table: explicit, or inferred from the column names."""

import dataclasses
import itertools
import os
import string
from collections.abc import Sequence
from typing import NamedTuple

from vixml_jax.data.sources import readers
from vixml_jax.data.sources import values as values_lib
from vixml_jax.data.sources.delimited import Dialect
from vixml_jax.data.sources.readers import Chunk
from vixml_jax.data.sources.values import LABELS
from vixml_jax.errors import InputError
from vixml_jax.storage import text_files

AUTO, IDS, TEXTS, ROWS = "auto", "ids", "texts", "rows"
SPLIT_NAMES = ("split", "fold", "partition")
# Column names from which a role is inferred, in order of preference.
_COMMON_NAMES = {
    "id": ("id", "uid", "query_id", "item_id", "product_id", "doc_id", "asin", "sku"),
    "label_id": ("id", "uid", "label_id", "item_id", "product_id", "doc_id", "asin", "sku"),
    "text": ("text", "query", "query_text", "name", "sentence", "document", "question"),
    "label_text": ("text", "label", "label_text", "name", "tag"),
    LABELS: (
        "labels", "label", "label_ids", "label_id", "target_ind", "targets", "tags", "categories",
    ),
    "weights": ("label_weights", "target_rel"),
    "image": ("images", "image", "image_paths", "image_path", "image_urls", "image_url"),
    "embedding": ("image_embeddings", "image_embedding", "embeddings", "embedding"),
    "split": SPLIT_NAMES,
}  # fmt: skip
_TITLES, _BODIES = ("title",), ("content", "description", "body", "abstract")
NONE = "none"  # Value of a flag: there is no such column, and none is inferred.
_MAX_TEXT = text_files.MAX_LINE  # Characters; a tokenizer takes a hundred times as much memory.
_MAX_NAME = 60  # Characters of a name that a message shows.
_MAX_SHOWN = 12  # Column names in a message.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Columns:
    """Explicit column names; the role of an empty one is inferred from common names.

    Attributes:
      id: Column of the query ids; without one, row numbers are used.
      text: Column of the query texts, or a template of several columns: '{title}. {brand}'.
      labels: Column of the labels of a query: a list, a JSON list, or a string.
      label_separator: Separator of the labels in such a string; 'none': there is none.
      labels_are: How queries refer to the rows of a label table: by 'ids', by 'texts' or by 'rows'
        (numbers from 0); 'auto' infers it.
      weights: Column of the sampling weights of the labels as positives, one per label.
      image: Column of image paths (relative to the table) or URLs, of queries and labels.
      embedding: Column of an image embedding, or of a list of several.
      split: Column with train, valid or test, for a table that has all splits.
      label_id, label_text: The same as `id` and `text`, for the label table.
    """

    id: str = ""
    text: str = ""
    labels: str = ""
    label_separator: str = ""
    labels_are: str = AUTO
    weights: str = ""
    image: str = ""
    embedding: str = ""
    split: str = ""
    label_id: str = ""
    label_text: str = ""


class Roles(NamedTuple):
    """The columns of a table by role; None where there is no such column."""

    id: str | None
    text: tuple[tuple[str, str | None], ...]  # (literal text, column after it or None).
    labels: str | None
    weights: str | None
    image: str | None
    embedding: str | None
    split: str | None
    key: str | None

    @property
    def used(self) -> list[str]:
        """The names of all columns that have a role."""
        names = [*self._replace(text=None), *(column for _, column in self.text)]
        return list(dict.fromkeys(name for name in names if name))


def assign(
    path: str,
    columns: Columns,
    dialect: Dialect,
    *,
    label_table: bool = False,
    key: str = "",
    names: Sequence[str] = (),
    labelled: bool = True,
) -> Roles:
    """Returns the roles of the columns of a table, explicit or inferred from their names.

    Args:
      path: Path of the table.
      columns: Explicit column names.
      dialect: Encoding, delimiter and quotes of the table.
      label_table: Whether this is a table of labels rather than queries.
      key: Column by which the rows are split, if any.
      names: Column names of the table; read from the file if empty.
      labelled: Whether queries must have labels; if not, they may have images without a text.

    Raises:
      InputError: If an explicit column does not exist, or a required one cannot be inferred.
    """
    names = list(names) or readers.column_names(path, dialect=dialect)
    by_lower_name = {name.lower().strip(): name for name in reversed(names)}

    def find(role: str, explicit: str, flag: str) -> str | None:
        if explicit == NONE:
            return None
        if explicit and explicit in names:  # The name of a column may be empty.
            return explicit
        if explicit and label_table and role in ("image", "embedding"):
            return None  # Only the query tables have it.
        if explicit:
            raise InputError(
                f"--{flag}={explicit}: no such column in {path}; its columns are {listed(names)}"
            )
        common = (by_lower_name[name] for name in _COMMON_NAMES[role] if name in by_lower_name)
        return next(common, None)

    prefix = "label_" if label_table else ""
    flag, template = f"{prefix}text", columns.label_text if label_table else columns.text
    if template:
        text = _parse_template(template, names, flag, path)
    else:
        text = _query_template(columns.text, names) if label_table else None
        text = text or tuple(("", name) for name in _infer_text(flag, by_lower_name, path))
    id_column = columns.label_id if label_table else columns.id
    shared = {
        "id": find(f"{prefix}id", id_column, f"{prefix}id_column"),
        "image": find("image", columns.image, "image_column"),
        "embedding": find("embedding", columns.embedding, "embedding_column"),
    }
    images_suffice = not labelled and (shared["image"] or shared["embedding"])
    missing = {} if text or images_suffice else {"text": flag}
    labels = None
    if labelled and not label_table:
        labels = find(LABELS, columns.labels, "labels_column")
        missing |= {"labels": "labels_column"} if labels is None else {}
    if missing:
        raise InputError(
            f"{path}: {' and '.join(f'no {role} column' for role in missing)} found among "
            f"{listed(names)}; pass {' and '.join(f'--{flag}=COLUMN' for flag in missing.values())}"
        )
    if labels is None:
        return Roles(**shared, text=text, labels=None, weights=None, split=None, key=None)
    return Roles(
        **shared,
        text=text,
        labels=labels,
        weights=find("weights", columns.weights, "weights_column"),
        split=find("split", columns.split, "split_column"),
        key=find("id", key, "split_by") if key else None,
    )


def template(parts: tuple[tuple[str, str | None], ...]) -> str:
    """The value of `--text` that gives a text, from `Roles.text`."""
    if len(parts) > 1 and not any(literal for literal, _ in parts):
        return " ".join(f"{{{name}}}" for _, name in parts)
    return "".join(
        _escape(literal) + ("" if name is None else f"{{{name}}}") for literal, name in parts
    )


def _escape(literal: str) -> str:
    return literal.replace("{", "{{").replace("}", "}}")


def listed(names: Sequence[str]) -> str:
    """Quoted column names for a message, shortened if there are many."""
    short = (name if len(name) <= _MAX_NAME else f"{name[:_MAX_NAME]}…" for name in names)
    shown = ", ".join(map(repr, itertools.islice(short, _MAX_SHOWN)))
    return f"{shown} and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else shown


def _infer_text(role: str, by_lower_name: dict[str, str], path: str) -> list[str]:
    """The inferred text columns: title and body if both exist, else one of the common names.

    In a directory whose name contains 'titles', as in LF-AmazonTitles-131K, the text is the title.
    """
    title = next((by_lower_name[name] for name in _TITLES if name in by_lower_name), None)
    body = next((by_lower_name[name] for name in _BODIES if name in by_lower_name), None)
    if title is not None:
        titles_only = "titles" in os.path.basename(os.path.dirname(os.path.abspath(path))).lower()
        return [title] if titles_only or body is None else [title, body]
    common = (by_lower_name[name] for name in _COMMON_NAMES[role] if name in by_lower_name)
    column = next(common, body)
    return [] if column is None else [column]


def _parse_template(
    template: str, names: list[str], flag: str, path: str
) -> tuple[tuple[str, str | None], ...]:
    """Parses the name of a column, or a template with column names in braces."""
    if template in names:
        return (("", template),)
    try:
        parts = [
            (literal, _field(column, spec, conversion))
            for literal, column, spec, conversion in string.Formatter().parse(template)
        ]
    except ValueError as error:
        raise InputError(f"--{flag}={template}: not a valid template ({error})") from None
    wanted = [column for _, column in parts if column is not None]
    absent = [column for column in wanted if column not in names]
    if absent:
        raise InputError(
            f"--{flag}={template}: no column {absent[0]!r} in {path}; its columns are "
            f"{listed(names)}"
        )
    if not wanted:
        raise InputError(
            f"--{flag}={template}: neither a column of {path} nor a template with columns in "
            f"braces; its columns are {listed(names)}"
        )
    return tuple(parts)


def _field(column: str | None, spec: str | None, conversion: str | None) -> str | None:
    """The name of a column in braces, which may have the marks of a format ('dc:title')."""
    if column is None:
        return None
    return column + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")


def _query_template(template: str, names: list[str]) -> tuple[tuple[str, str | None], ...] | None:
    """The text template of the queries, if the label table has its columns as well."""
    try:
        return _parse_template(template, names, "text", "") if template else None
    except InputError:
        return None


def texts(
    chunk: Chunk, parts: tuple[tuple[str, str | None], ...], rows: Sequence[int]
) -> list[str]:
    """The texts of some rows of a chunk.

    Args:
      chunk: The chunk.
      parts: Template of the text, `Roles.text`.
      rows: Rows of the chunk.
    """

    def read(column: str) -> list[str]:
        values = chunk.columns[column]
        found = [values_lib.text(values[row], chunk, row, column) for row in rows]
        if found and max(map(len, found)) > _MAX_TEXT:
            row = next(row for row, text in zip(rows, found, strict=True) if len(text) > _MAX_TEXT)
            raise InputError(
                f"{chunk.where(row)}: {column!r} is longer than {_MAX_TEXT >> 20} MiB; expected "
                "the text of an item: shorten it, of which no more than --max_tokens are used"
            )
        return found

    if not parts:
        return [""] * len(rows)
    if len(parts) == 1 and not parts[0][0]:
        return read(parts[0][1])
    # Title and body, if inferred, have no literals and are joined by a space.
    no_literals = all(not literal for literal, _ in parts)
    pieces = []
    for literal, column in parts:
        if not no_literals:
            pieces.append([literal] * len(rows))
        if column is not None:
            pieces.append(read(column))
    separator = " " if no_literals else ""
    return [separator.join(row).strip() for row in zip(*pieces, strict=True)]


def describe(
    part: str,
    paths: list[str],
    roles: Roles,
    columns: Columns,
    names: Sequence[str],
    *,
    label_table: bool = False,
) -> str:
    """Returns the files of a part and the column of each role, one per line.

    Args:
      part: Name of the part.
      paths: Its files.
      roles: Roles of the columns.
      columns: Explicit column names.
      names: All column names.
      label_table: Whether this is a table of labels rather than queries.
    """
    explicit = {
        "id": columns.label_id if label_table else columns.id,
        "text": columns.label_text if label_table else columns.text,
        **{name: getattr(columns, name) for name in ("labels", "weights", "image", "embedding")},
        "split": columns.split,
        "key": "split_by",  # Always explicit.
    }
    files = paths[0] if len(paths) == 1 else f"{len(paths)} files, the first is {paths[0]}"
    lines = [f"{part}: {files}"]
    for role, value in roles._replace(text=template(roles.text))._asdict().items():
        if value:
            role_name = "split by" if role == "key" else role
            lines.append(f"  {role_name:9} {value!r}{'' if explicit[role] else ' (inferred)'}")
    unused = [name for name in names if name not in roles.used]
    if unused:
        lines.append(f"  {'unused':9} {listed(unused)}")
    return "\n".join(lines)
