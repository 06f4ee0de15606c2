"""Which column of a table is what: as its owner says, else by its name."""

import dataclasses
import os
import string
from collections.abc import Sequence
from typing import NamedTuple

from vixml_jax.data.sources import readers
from vixml_jax.data.sources import values as values_lib
from vixml_jax.data.sources.readers import Chunk
from vixml_jax.data.sources.values import LABELS
from vixml_jax.errors import InputError

AUTO, IDS, TEXTS, ROWS = "auto", "ids", "texts", "rows"
# What a column may be called, the likeliest first.
_GUESSES = {
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
    "split": ("split", "fold", "partition"),
}  # fmt: skip
_TITLES, _BODIES = ("title",), ("content", "description", "body", "abstract")
_NONE = "none"  # Said of a column: there is none, do not guess.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Columns:
    """What columns are called; what is empty is guessed from their names.

    Attributes:
      id: Of a query's id; without one, rows are counted.
      text: A column, or a template of several: '{title}. {brand}'.
      labels: The labels of a query: a list, JSON of a list, or one string.
      label_separator: Between the labels of one string.
      labels_are: 'ids' or 'texts' of the label table, its 'rows' (from 0), or 'auto': what fits.
      weights: What each label of a query counts when a positive is drawn, as many as labels.
      image: Paths (from where the table is) or urls of a query's or label's pictures.
      embedding: A picture's embedding, or a list of several.
      split: train, valid or test, where one table holds them all.
      label_id, label_text: As id and text, in the label table.
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
    """The columns of one kind of table, by what they are for; None: there is none."""

    id: str | None
    text: tuple[tuple[str, str | None], ...]  # What is said before, and a column or None.
    labels: str | None
    weights: str | None
    image: str | None
    embedding: str | None
    split: str | None
    key: str | None

    @property
    def used(self) -> list[str]:
        named = [*self._replace(text=None), *(column for _, column in self.text)]
        return list(dict.fromkeys(name for name in named if name))


def assign(
    path: str,
    columns: Columns,
    encoding: str,
    *,
    of_labels: bool = False,
    key: str = "",
    names: Sequence[str] = (),
    labelled: bool = True,
) -> Roles:
    """What each column of a table is for: as told, else by its name.

    Args:
      path: Of the table.
      columns: As told.
      encoding: Of its texts.
      of_labels: Whether it is a table of labels.
      key: Column by which the rows are split.
      names: Its columns, where they are known.
      labelled: Whether queries must have labels; without, they may have pictures and no text.
    """
    names = list(names) or readers.column_names(path, encoding=encoding)
    lower = {name.lower().strip(): name for name in reversed(names)}

    def find(role: str, told: str, flag: str) -> str | None:
        if told == _NONE:
            return None
        if told and told in names:  # A column may have no name.
            return told
        if told and of_labels and role in ("image", "embedding"):
            return None  # Queries have it.
        if told:
            raise InputError(f"--{flag}={told}: {path} has no such column: {_list(names)}")
        return next((lower[guess] for guess in _GUESSES[role] if guess in lower), None)

    role = "label_" if of_labels else ""
    flag, told = f"{role}text", columns.label_text if of_labels else columns.text
    if told:
        text = _parse_template(told, names, flag, path)
    else:
        text = _same_template(columns.text, names) if of_labels else None
        text = text or tuple(("", name) for name in _guess_text(flag, lower, path))
    mine = {
        "id": find(f"{role}id", columns.label_id if of_labels else columns.id, f"{role}id_column"),
        "image": find("image", columns.image, "image_column"),
        "embedding": find("embedding", columns.embedding, "embedding_column"),
    }
    seen = not labelled and (mine["image"] or mine["embedding"])  # Pictures alone will do.
    if not text and not seen:
        raise InputError(
            f"{path}: which column is the text? found {_list(names)}; say --{flag}=NAME"
        )
    if of_labels or not labelled:
        return Roles(**mine, text=text, labels=None, weights=None, split=None, key=None)
    labels = find(LABELS, columns.labels, "labels_column")
    if labels is None:
        raise InputError(
            f"{path}: which column has the labels? found {_list(names)}; say --labels_column=NAME"
        )
    return Roles(
        **mine,
        text=text,
        labels=labels,
        weights=find("weights", columns.weights, "weights_column"),
        split=find("split", columns.split, "split_column"),
        key=find("id", key, "split_by") if key else None,
    )


def _list(names: Sequence[str]) -> str:
    """Some column names for a message."""
    shown = ", ".join(map(repr, names[:12]))
    return f"{shown} and {len(names) - 12} more" if len(names) > 12 else shown


def _guess_text(role: str, lower: dict[str, str], path: str) -> list[str]:
    """The text column; or title and content, but the title alone where a path says 'Titles'."""
    title = next((lower[name] for name in _TITLES if name in lower), None)
    body = next((lower[name] for name in _BODIES if name in lower), None)
    if title is not None:
        alone = "titles" in os.path.basename(os.path.dirname(os.path.abspath(path))).lower()
        return [title] if alone or body is None else [title, body]
    found = next((lower[name] for name in _GUESSES[role] if name in lower), body)
    return [] if found is None else [found]


def _parse_template(
    template: str, names: list[str], flag: str, path: str
) -> tuple[tuple[str, str | None], ...]:
    """A column, or a template with columns in braces."""
    if template in names:
        return (("", template),)
    try:
        parts = [(said, column) for said, column, _, _ in string.Formatter().parse(template)]
    except ValueError as error:
        raise InputError(f"--{flag}={template}: not a template ({error})") from None
    wanted = [column for _, column in parts if column is not None]
    absent = [column for column in wanted if column not in names]
    if absent or not wanted:
        what = repr(absent[0]) if absent else "any of them in braces"
        raise InputError(f"--{flag}={template}: {path} has columns {_list(names)}, not {what}")
    return tuple(parts)


def _same_template(template: str, names: list[str]) -> tuple[tuple[str, str | None], ...] | None:
    """The template of the queries, where labels have its columns too."""
    try:
        return _parse_template(template, names, "text", "") if template else None
    except InputError:
        return None


def texts(
    chunk: Chunk, parts: tuple[tuple[str, str | None], ...], rows: Sequence[int]
) -> list[str]:
    """The text of each row."""

    def read(column: str) -> list[str]:
        values = chunk.columns[column]
        return [values_lib.text(values[row], chunk, row, column) for row in rows]

    if not parts:
        return [""] * len(rows)
    if len(parts) == 1 and not parts[0][0]:
        return read(parts[0][1])
    guessed = all(not said for said, _ in parts)  # Title and content: a space between.
    pieces = []
    for said, column in parts:
        if not guessed:
            pieces.append([said] * len(rows))
        if column is not None:
            pieces.append(read(column))
    glue = " " if guessed else ""
    return [glue.join(row).strip() for row in zip(*pieces, strict=True)]


def understand(
    part: str,
    paths: list[str],
    roles: Roles,
    columns: Columns,
    encoding: str,
    *,
    label: bool = False,
) -> str:
    """A line: of which columns a part is read."""
    text = "".join(said + ("" if name is None else f"{{{name}}}") for said, name in roles.text)
    if len(roles.text) > 1 and not any(said for said, _ in roles.text):
        text = " ".join(f"{{{name}}}" for _, name in roles.text)
    told = {
        "id": columns.label_id if label else columns.id,
        "text": columns.label_text if label else columns.text,
        **{name: getattr(columns, name) for name in ("labels", "weights", "image", "embedding")},
        "split": columns.split,
        "key": "told",
    }
    said = [
        f"{role}={value!r}{'' if told[role] else ' (guessed)'}"
        for role, value in roles._replace(text=text)._asdict().items()
        if value
    ]
    others = [
        name for name in readers.column_names(paths[0], encoding=encoding) if name not in roles.used
    ]
    if others:
        said.append(f"not used: {', '.join(others[:12])}")
    files = paths[0] if len(paths) == 1 else f"{len(paths)} files, {paths[0]} first"
    return f"{part}: {files}; " + ", ".join(said)
