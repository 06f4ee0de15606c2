"""Compares two evaluated runs query by query, with confidence intervals and p-values."""

import os
from collections.abc import Mapping, Sequence

from absl import flags
from etils import epath

from vixml_jax import command_line, errors
from vixml_jax.errors import InputError
from vixml_jax.evaluation import bootstrap, per_query
from vixml_jax.evaluation.bootstrap import Comparison
from vixml_jax.evaluation.per_query import SUFFIX, About, PerQuery
from vixml_jax.runtime import console
from vixml_jax.storage import json_files

# Rows of the table of metrics as files are named, and as version 0.1 named them.
_NAMES_0_1 = {
    "-neighbours": "-memory",
    "-knn_text": "-vote_text",
    "-knn_image": "-vote_picture",
    "-knn_both": "-vote_both",
}
COMMON_FLAGS = ("runs", "split", "search", "out", "resamples", "permutations", "seed")


def find(run: str, name: str) -> str:
    """Returns the path of an evaluation's metrics per query.

    Args:
      run: A run directory, or directly a file named `*.queries.npz`.
      name: Name of the evaluation in a run directory, such as 'test-exact'.
    """
    if run.endswith(SUFFIX):
        return run
    path = os.path.join(run, "evaluation", name + SUFFIX)
    for new, old in _NAMES_0_1.items():
        path_0_1 = path.removesuffix(new + SUFFIX) + old + SUFFIX
        if path.endswith(new + SUFFIX) and epath.Path(path_0_1).exists():
            return path if epath.Path(path).exists() else path_0_1
    return path


def read_both(paths: Sequence[str]) -> list[tuple[PerQuery, About]]:
    """Reads the metrics per query of two evaluations.

    Raises:
      InputError: If they are of different data or splits.
    """
    one, other = evaluations = [per_query.load(path) for path in paths]
    for field in ("content_hash", "split"):
        values = getattr(one[1], field), getattr(other[1], field)
        if values[0] != values[1]:
            raise InputError(
                f"{paths[0]} has {field} {values[0]}, {paths[1]} has {values[1]}: runs can be "
                "compared only on the same split of the same prepared data"
            )
    return evaluations


def format_comparison(comparisons: Mapping[str, Comparison]) -> str:
    """Returns an aligned table with one line per metric."""
    lines = [
        f"{'':9} {'A':>7} {'B':>7} {'A - B':>7}  {'95 % interval':>17}  {'p':>7}",
    ]
    lines.append("-" * len(lines[0]))
    for name, c in comparisons.items():
        interval = f"[{c.low:+.2f}, {c.high:+.2f}]"
        lines.append(
            f"{name:9} {c.one:7.2f} {c.other:7.2f} {c.difference:+7.2f}  {interval:>17}  "
            f"{c.p_value:7.4f}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    """Prints the comparison and writes it as JSON."""
    del argv
    values = flags.FLAGS
    if len(values.runs) != 2:
        raise InputError(
            f"--runs: found {len(values.runs)}, expected two run directories separated by a comma"
        )
    paths = [find(run, f"{values.split}-{values.search}") for run in values.runs]
    (one, about), (other, _) = read_both(paths)
    comparisons = bootstrap.compare(
        one, other, resamples=values.resamples, permutations=values.permutations, seed=values.seed
    )
    print(f"{about.dataset}, {about.split}, {len(one.values):,} queries, percent")
    print(f"A: {paths[0]}\nB: {paths[1]}\n")
    print(format_comparison(comparisons))
    console.status(
        f"\n95 % interval: of A - B, bootstrap with {values.resamples} resamples of the queries\n"
        f"p: two-sided paired randomisation test with {values.permutations} permutations, not "
        "corrected for the number of metrics\n"
    )
    if values.out:
        results = {
            "runs": paths,
            "about": about._asdict(),
            "queries": len(one.values),
            "resamples": values.resamples,
            "permutations": values.permutations,
            "seed": values.seed,
            "metrics": {name: c._asdict() for name, c in comparisons.items()},
        }
        with errors.writing(f"--out={values.out}"):
            json_files.write(values.out, results)
        console.status(f"written to {values.out}")


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_list(
        "runs",
        [],
        "Two run directories, separated by a comma. Files named "
        f"*{SUFFIX} in evaluation/ of a run are accepted as well.",
    )
    flags.DEFINE_enum("split", "test", ["test", "valid", "train"], "Split that was evaluated.")
    flags.DEFINE_string(
        "search",
        "exact",
        "Evaluation to compare: exact, scann or exact-neighbours. This is the part of the names "
        f"evaluation/SPLIT-SEARCH{SUFFIX} after the split.",
    )
    flags.DEFINE_integer(
        "resamples",
        bootstrap.RESAMPLES,
        "Bootstrap resamples for the intervals.",
        lower_bound=100,
    )
    flags.DEFINE_integer(
        "permutations",
        bootstrap.PERMUTATIONS,
        "Random permutations for the p-values.",
        lower_bound=99,
    )
    flags.DEFINE_integer("seed", 0, "Seed of the resamples and permutations.")
    flags.DEFINE_string("out", "comparison.json", "JSON file to write; empty: none.")


if __name__ == "__main__":
    command_line.launch(main, define_flags, common=COMMON_FLAGS)
