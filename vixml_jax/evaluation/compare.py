"""Compares two evaluated runs query by query, with confidence intervals and p-values."""

import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import flags
from etils import epath

from vixml_jax import command_line, errors
from vixml_jax.errors import InputError
from vixml_jax.evaluation import bootstrap, per_query
from vixml_jax.evaluation.bootstrap import Comparison
from vixml_jax.evaluation.per_query import SUFFIX, About, PerQuery
from vixml_jax.runtime import console
from vixml_jax.storage import json_files, sealed

# Rows of the table of metrics as files are named, and as version 0.1 named them.
_NAMES_0_1 = {
    "-neighbours": "-memory",
    "-knn_text": "-vote_text",
    "-knn_image": "-vote_picture",
    "-knn_both": "-vote_both",
}
_PLACES = ("workdir", "data", "mesh")  # Flags that say where a run is, not what it is.
COMMON_FLAGS = (
    "runs", "split", "search", "out", "other_data", "resamples", "permutations", "seed",
)  # fmt: skip


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


def run_of(path: str) -> str | None:
    """Returns the run directory of a file of metrics per query; None: it lies elsewhere."""
    run = os.path.dirname(os.path.dirname(os.path.abspath(path)))
    return run if (epath.Path(run) / "config.json").exists() else None


def read_both(paths: Sequence[str], *, other_data: bool = False) -> list[tuple[PerQuery, About]]:
    """Reads the metrics per query of two evaluations.

    Args:
      paths: Of the files.
      other_data: Whether they may be of different prepared data, such as the same queries with
        another tokenizer. Number and true labels of the queries must be the same even so.

    Raises:
      InputError: If they are of different data or splits, or of data that the run was not trained
        on.
    """
    one, other = evaluations = [per_query.load(path) for path in paths]
    for field in ("split",) if other_data else ("content_hash", "split"):
        values = getattr(one[1], field), getattr(other[1], field)
        if values[0] != values[1]:
            hint = "; --other_data compares the same queries of different data"
            raise InputError(
                f"{paths[0]} has {field} {values[0]}, {paths[1]} has {values[1]}: runs can be "
                "compared only on the same split of the same prepared data"
                + (hint if field == "content_hash" else "")
            )
    ids = {about.queries for _, about in evaluations} - {""}
    if len(ids) > 1:
        raise InputError(
            f"{paths[0]} and {paths[1]}: of different queries, or in another order; runs can be "
            "compared only on the same queries"
        )
    for path, (_, about) in zip(paths, evaluations, strict=True):
        run = run_of(path)
        trained_on = run and content_hash(run)
        if trained_on not in (None, about.content_hash) and not other_data:
            raise InputError(
                f"{path}: evaluated on other data (content hash {about.content_hash[:12]}) than "
                f"the run was trained on ({trained_on[:12]}); evaluate it again, or add "
                "--other_data"
            )
    return evaluations


def content_hash(run: str) -> str | None:
    """Returns the content hash of the data that a run was trained on; None: it is not recorded.

    Raises:
      InputError: If the directory has no readable tower.json.
    """
    path = os.path.join(run, "tower.json")
    found = _read(path).get("content_hash")
    if not isinstance(found, str | None):
        raise InputError(f"{path}: content_hash {found!r}; expected a file that train wrote")
    return found


def _read(path: str) -> dict[str, Any]:
    """The JSON object in a file of a run directory.

    Raises:
      InputError: If it cannot be read.
    """
    content = json_files.read_bytes(path, "expected a file that train wrote")
    try:
        tree = dict(json.loads(content))  # msgspec would refuse Infinity.
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: {error}; expected a file that train wrote") from None
    return sealed.opened(tree, path, "expected a file that train wrote")


def different_flags(paths: Sequence[str]) -> list[str]:
    """Returns a line for each flag in which the runs of two files differ, with both values.

    Args:
      paths: Of files of metrics per query. There are no lines if one of them is in no run.
    """
    runs = [run_of(path) for path in paths]
    if None in runs:
        return []
    settings = [dict(_flags(_read(os.path.join(run, "config.json")))) for run in runs]
    return [
        f"--{name}: A {one}, B {other}" for name, (one, other) in differing_values(settings).items()
    ]


def differing_values(settings: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Returns the values of the flags in which runs differ, as they are given, by flag.

    Args:
      settings: Of each run, the values of its flags. One that is missing is shown as 'none'. Flags
        that say where a run is are left out.
    """
    names = [name for name in dict.fromkeys(itertools.chain(*settings)) if name not in _PLACES]
    return {
        name: [_show(values, name) for values in settings]
        for name in names
        if any(values.get(name) != settings[0].get(name) for values in settings)
    }


def _flags(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields names and values of the flags in a configuration, as `group.field`."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flags(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _show(values: Mapping[str, Any], name: str) -> str:
    """The value of a flag as it is given; one that an older version did not have is 'none'."""
    value = values.get(name)
    if isinstance(value, list):
        return ",".join(map(str, value)) or "''"
    return "none" if value is None else f"{value}" or "''"


def default_out(paths: Sequence[str]) -> str:
    """Returns the file in which a comparison is written: in the directory of the first evaluation.

    Args:
      paths: Of the files of metrics per query.
    """
    first, second = (os.path.basename(path).removesuffix(SUFFIX) for path in paths)
    other = os.path.basename(run_of(paths[1]) or "") or second
    return os.path.join(os.path.dirname(paths[0]), f"{first}-compared_with-{other}.json")


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
    (one, about), (other, _) = read_both(paths, other_data=values.other_data)
    differing = different_flags(paths)
    comparisons = bootstrap.compare(
        one, other, resamples=values.resamples, permutations=values.permutations, seed=values.seed
    )
    print(f"{about.dataset}, {about.split}, {len(one.values):,} queries, percent")
    print(f"A: {paths[0]}\nB: {paths[1]}\n")
    if all(map(run_of, paths)):
        print("flags that differ:" if differing else "the runs have the same flags")
        print("\n".join([*(f"  {line}" for line in differing), ""]))
    print(format_comparison(comparisons))
    console.status(
        f"\n95 % interval: of A - B, bootstrap with {values.resamples} resamples of the queries\n"
        f"p: two-sided paired randomisation test with {values.permutations} permutations, not "
        "corrected for the number of metrics\n"
    )
    out = default_out(paths) if values.out is None else values.out
    if out:
        results = {
            "runs": paths,
            "about": about._asdict(),
            "queries": len(one.values),
            "resamples": values.resamples,
            "permutations": values.permutations,
            "seed": values.seed,
            "different_flags": differing,
            "metrics": {name: c._asdict() for name, c in comparisons.items()},
        }
        with errors.writing(f"--out={out}"):
            json_files.write(out, results)
        console.status(f"written to {out}")


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
        upper_bound=100_000,
    )
    flags.DEFINE_integer(
        "permutations",
        bootstrap.PERMUTATIONS,
        "Random permutations for the p-values.",
        lower_bound=99,
        upper_bound=1_000_000,
    )
    flags.DEFINE_integer("seed", 0, "Seed of the resamples and permutations.", lower_bound=0)
    flags.DEFINE_string(
        "out",
        None,
        "JSON file to write; empty: none. Default: SPLIT-SEARCH-compared_with-OTHER.json in "
        "evaluation/ of the first run.",
    )
    flags.DEFINE_boolean(
        "other_data",
        False,
        "Compare evaluations on different prepared data. For example the same queries with another "
        "tokenizer; their number and true labels must be the same.",
    )


if __name__ == "__main__":
    command_line.launch(main, define_flags, common=COMMON_FLAGS)
