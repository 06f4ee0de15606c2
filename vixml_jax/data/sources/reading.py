"""How the tables of a data set were read: their columns and dialect, kept for later queries."""

import dataclasses
from collections.abc import Sequence

from vixml_jax.data.sources import columns as columns_lib
from vixml_jax.data.sources import readers
from vixml_jax.data.sources.columns import Columns, Roles
from vixml_jax.data.sources.delimited import USUAL, Dialect


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """What `prepare` understood of the tables of a data set.

    It goes through JSON with `dataclasses.asdict` and `msgspec.convert`.

    Attributes:
      kind: Format of the table of queries: 'csv', 'tsv', 'jsonl', 'parquet' or 'arrow'.
      columns: The columns that were used, also those that were inferred; an empty name: none was
        found.
      dialect: Encoding, delimiter and quotes as the flags gave them; what they left open is found
        out for each file.
    """

    kind: str
    columns: Columns
    dialect: Dialect

    def dialect_for(self, path: str) -> Dialect:
        """The dialect to read a file of queries with; of another format, the usual one."""
        return self.dialect if readers.kind_of(path) == self.kind else USUAL

    def columns_for(self, names: Sequence[str], *, label_table: bool = False) -> Columns:
        """The columns to read later queries with, as the explicit columns of `columns.assign`.

        Texts are made as they were in training, so that all columns of the template are required.
        Ids and images may be missing from later tables; they are then inferred.

        Args:
          names: Column names of the table.
          label_table: Whether the table has labels, which are to be added, rather than queries.
        """
        kept = self.columns
        text, item_id = (kept.label_text, kept.label_id) if label_table else (kept.text, kept.id)
        optional = {"id": item_id, "image": kept.image, "embedding": kept.embedding}
        present = {
            role: name
            for role, name in optional.items()
            if name in names or name == columns_lib.NONE
        }
        return Columns(text=text, **present)

    def describe(self) -> str:
        """What a file of queries is read with, for a status line."""
        parts = [f"{name} {value!r}" for name, value in (
            ("text", self.columns.text), ("id", self.columns.id), ("image", self.columns.image),
            ("embedding", self.columns.embedding),
        ) if value]  # fmt: skip
        return ", ".join([*parts, self.dialect.describe()])


def of_roles(
    path: str,
    given: Columns,
    dialect: Dialect,
    roles: Roles,
    label_roles: Roles | None,
    label_separator: str,
    labels_are: str,
) -> Reading:
    """The reading of a data set whose columns have been assigned.

    Args:
      path: A table of the training queries.
      given: Explicit column names.
      dialect: The dialect of the flags.
      roles: Roles of the columns of `path`.
      label_roles: Roles of the columns of the label table; None if there is none.
      label_separator, labels_are: How queries refer to labels, explicit or inferred.
    """
    columns = dataclasses.replace(
        given,
        text=columns_lib.template(roles.text) or given.text,
        label_separator=label_separator,
        labels_are=labels_are,
        **{
            role: getattr(roles, role) or getattr(given, role)
            for role in ("id", "labels", "weights", "image", "embedding", "split")
        },
    )
    if label_roles is not None:
        columns = dataclasses.replace(
            columns,
            label_id=label_roles.id or given.label_id,
            label_text=columns_lib.template(label_roles.text) or given.label_text,
        )
    return Reading(kind=readers.kind_of(path), columns=columns, dialect=dialect)
