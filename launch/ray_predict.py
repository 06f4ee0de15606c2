"""Predicts labels of large tables of queries with Ray Data, by copies of a run in several actors.

pip install vixml_jax 'ray[data]'
python launch/ray_predict.py --workdir=runs/shop --queries=queries --out=predictions --actors=4

Reads a file or directory of parquet, csv or jsonl, here or in an object store. Writes a directory
of parquet files with one row for each row read: the id of the query, `labels`, `scores`, and
`error` for a query without text. Rows keep no order, so they have ids.
"""

import argparse
import os
import sys
from typing import Any

KINDS = ("parquet", "csv", "jsonl")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Returns the flags."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    flag = parser.add_argument
    flag("--workdir", required=True, help="run directory, at the same path on every machine")
    flag("--queries", required=True, help="file or directory to read")
    flag("--out", required=True, help="directory to write; it must not exist")
    flag("--format", choices=KINDS, default="parquet", help="of the queries")
    flag("--id_column", default="id", help="column of the ids (default: id)")
    flag("--text_column", default="text", help="column of the texts (default: text)")
    flag("--k", type=int, default=10, help="labels of a query at most (default: 10)")
    flag("--actors", type=int, default=2, help="copies of the run (default: 2)")
    flag("--cpus_per_actor", type=float, default=1.0, help="CPUs of each copy (default: 1)")
    flag("--gpus_per_actor", type=float, default=0.0, help="GPUs of each copy (default: 0)")
    values = parser.parse_args(arguments)
    if values.k < 1 or values.actors < 1:
        parser.error(f"--k={values.k} --actors={values.actors}: expected at least 1")
    return values


class Labels:
    """The run in an actor; Ray makes one of each actor and calls it with batches.

    Args:
      workdir: Run directory.
      id_column, text_column: Columns of a batch.
      k: Maximum number of labels of a query.
    """

    def __init__(self, workdir: str, id_column: str, text_column: str, k: int):
        from vixml_jax import Predictor

        self.predictor = Predictor.load(workdir)
        self.id_column, self.text_column = id_column, text_column
        self.k = min(k, self.predictor.num_labels)

    def __call__(self, batch: Any) -> Any:
        """Returns a table with a row for each row of a `pyarrow.Table`."""
        import pyarrow as pa

        texts = [text or "" for text in batch.column(self.text_column).to_pylist()]
        valid = [i for i, text in enumerate(texts) if text.strip()]
        found: list[list] = [[] for _ in texts]
        if valid:
            predictions = self.predictor([texts[i] for i in valid], k=self.k)
            for i, labels in zip(valid, predictions, strict=True):
                found[i] = labels
        errors = [None if text.strip() else "no text" for text in texts]
        ids, scores = ([[x[part] for x in row] for row in found] for part in (0, 2))
        return pa.table(
            {
                self.id_column: batch.column(self.id_column),
                "labels": pa.array(ids, pa.list_(pa.string())),
                "scores": pa.array(scores, pa.list_(pa.float32())),
                "error": pa.array(errors, pa.string()),
            }
        )


def read(values: argparse.Namespace) -> Any:
    """Returns the queries as a `ray.data.Dataset` of ids and texts.

    Raises:
      ValueError: If a column is missing, or the texts are none.
    """
    import pyarrow as pa
    import pyarrow.csv
    import ray

    columns = [values.id_column, values.text_column]
    if values.format == "csv":
        # Inferred types would differ between blocks: a text may look like a number.
        types = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(columns, pa.string()))
        queries = ray.data.read_csv(values.queries, convert_options=types)
    elif values.format == "jsonl":
        queries = ray.data.read_json(values.queries)
    else:
        queries = ray.data.read_parquet(values.queries)
    schema = queries.schema()
    for name in columns:
        if name not in schema.names:
            raise ValueError(
                f"{values.queries}: no column {name!r} among {', '.join(schema.names)}"
            )
    kind = dict(zip(schema.names, schema.types, strict=True))[values.text_column]
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ValueError(f"{values.queries}: {values.text_column!r} is {kind}, expected strings")
    return queries.select_columns(columns)


def check_cpus(values: argparse.Namespace, cpus: float) -> None:
    """Checks that actors leave a CPU to the tasks that read and write, which would wait forever.

    Args:
      values: The flags.
      cpus: CPUs of the cluster.

    Raises:
      ValueError: If they do not.
    """
    needed = values.actors * values.cpus_per_actor + 1
    if cpus < needed:
        raise ValueError(
            f"--actors={values.actors} --cpus_per_actor={values.cpus_per_actor:g}: need {needed:g} "
            f"CPUs, one of them to read and write; the cluster has {cpus:g}"
        )


def main(values: argparse.Namespace) -> None:
    """Predicts the labels of all queries.

    Raises:
      ValueError: If the cluster has too few CPUs, or the queries are not as the flags say.
    """
    import ray

    ray.init(ignore_reinit_error=True)
    check_cpus(values, ray.cluster_resources().get("CPU", 0))
    read(values).map_batches(
        Labels,
        fn_constructor_args=[values.workdir, values.id_column, values.text_column, values.k],
        batch_format="pyarrow",
        batch_size=1024,
        compute=ray.data.ActorPoolStrategy(size=values.actors),
        num_cpus=values.cpus_per_actor,
        num_gpus=values.gpus_per_actor,
    ).write_parquet(values.out, mode=ray.data.SaveMode.ERROR)


if __name__ == "__main__":
    given = parse()
    if not os.path.isfile(os.path.join(given.workdir, "config.json")):
        sys.exit(f"error: --workdir={given.workdir}: no run directory")
    try:
        main(given)
    except (ImportError, ValueError) as error:
        sys.exit(f"error: {error}")
