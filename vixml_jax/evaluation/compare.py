"""Two runs by their queries: `python -m vixml_jax.evaluation.compare --runs=A,B`."""

import os
from collections.abc import Mapping, Sequence

from absl import flags

from vixml_jax import errors
from vixml_jax.errors import InputError
from vixml_jax.evaluation import bootstrap, per_query
from vixml_jax.evaluation.bootstrap import Comparison
from vixml_jax.evaluation.per_query import SUFFIX, About, PerQuery
from vixml_jax.report import tables


def find(run: str, name: str) -> str:
    """The file of a run directory, or the file itself where one is named."""
    return run if run.endswith(SUFFIX) else os.path.join(run, "evaluation", name + SUFFIX)


def read_both(paths: Sequence[str]) -> list[tuple[PerQuery, About]]:
    """What two evaluations say of their queries.

    Raises:
      InputError: If they are not of the same queries.
    """
    one, other = found = [per_query.load(path) for path in paths]
    for field in ("content_hash", "split"):
        here, there = getattr(one[1], field), getattr(other[1], field)
        if here != there:
            raise InputError(
                f"{paths[0]} is of {field} {here}, {paths[1]} of {there}: only runs judged on the "
                "same split of the same prepared data can be compared"
            )
    return found


def format_comparison(found: Mapping[str, Comparison]) -> str:
    """An aligned table, one line a metric."""
    lines = [
        f"{'':9} {'A':>7} {'B':>7} {'A - B':>7}  {'95 % interval':>17}  {'p':>7}",
    ]
    lines.append("-" * len(lines[0]))
    for name, c in found.items():
        interval = f"[{c.low:+.2f}, {c.high:+.2f}]"
        lines.append(
            f"{name:9} {c.one:7.2f} {c.other:7.2f} {c.difference:+7.2f}  {interval:>17}  "
            f"{c.p_value:7.4f}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    """Prints the table and writes it as json."""
    del argv
    values = flags.FLAGS
    if len(values.runs) != 2:
        raise InputError(
            f"--runs: found {len(values.runs)}, expected two run directories separated by a comma"
        )
    paths = [find(run, f"{values.split}-{values.search}") for run in values.runs]
    (one, about), (other, _) = read_both(paths)
    found = bootstrap.compare(
        one, other, resamples=values.resamples, permutations=values.permutations, seed=values.seed
    )
    print(f"{about.dataset}, {about.split}, {len(one.values):,} queries, percent")
    print(f"A: {paths[0]}\nB: {paths[1]}\n")
    print(format_comparison(found))
    print(
        f"\ninterval: of A - B, {values.resamples} resamples of the queries; p: two-sided, that as "
        f"much differs by chance, {values.permutations} random swaps of the runs; each metric by "
        "itself"
    )
    if values.out:
        with errors.writing(f"--out={values.out}"):
            tables.write_json(
                values.out,
                {
                    "runs": paths,
                    "about": about._asdict(),
                    "queries": len(one.values),
                    "resamples": values.resamples,
                    "permutations": values.permutations,
                    "seed": values.seed,
                    "metrics": {name: c._asdict() for name, c in found.items()},
                },
            )
        print(f"written to {values.out}")


def define_flags() -> None:
    """The flags of this comparison."""
    flags.DEFINE_list(
        "runs", [], f"Two run directories, or files *{SUFFIX} of them, separated by a comma."
    )
    flags.DEFINE_enum("split", "test", ["test", "valid", "train"], "Which evaluation is compared,")
    flags.DEFINE_string("search", "exact", "and by which search: exact, scann, exact-memory ...")
    flags.DEFINE_integer(
        "resamples", bootstrap.RESAMPLES, "Draws of the queries for the intervals.", lower_bound=100
    )
    flags.DEFINE_integer(
        "permutations", bootstrap.PERMUTATIONS, "Random swaps for the p-values.", lower_bound=99
    )
    flags.DEFINE_integer("seed", 0, "Of the draws and swaps.")
    flags.DEFINE_string("out", "comparison.json", "Json file to write; empty: none.")


if __name__ == "__main__":
    define_flags()
    errors.launch(main)
