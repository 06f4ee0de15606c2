"""Writes one HTML page that compares runs: learning curves, metrics and the flags that differ."""

import datetime
import os
import shlex
import sys
from collections.abc import Sequence

from absl import flags

from vixml_jax import command_line, errors
from vixml_jax.errors import InputError
from vixml_jax.report import svg
from vixml_jax.runtime import console
from vixml_jax.storage import atomic

COMMON_FLAGS = ("runs", "split", "search", "out")


def check_runs(paths: Sequence[str]) -> None:
    """Checks the value of --runs.

    Raises:
      InputError: If there are no runs or too many, or one is given twice.
    """
    if not 1 <= len(paths) <= svg.MAX_LINES:
        raise InputError(
            f"--runs: found {len(paths)}, expected 1 to {svg.MAX_LINES} run directories separated "
            "by commas"
        )
    places = [os.path.realpath(path) for path in paths]
    for path, place in zip(paths, places, strict=True):
        if places.count(place) > 1:
            raise InputError(f"--runs: {path} is given twice")


def main(argv: Sequence[str]) -> None:
    """Writes the page of the runs that the flags name."""
    del argv
    values = flags.FLAGS
    check_runs(values.runs)
    if not values.out:
        raise InputError("--out: missing; expected the HTML file to write")
    from vixml_jax.report import render, run_sections
    from vixml_jax.report import runs as runs_lib

    runs = runs_lib.read(values.runs, values.split, values.search)
    made = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "version": command_line.version(),
    }
    html = render.document(
        run_sections.title(runs),
        run_sections.summary(runs),
        run_sections.all_sections(runs, command=shlex.join(sys.orig_argv), facts=made),
    )
    with errors.writing(f"--out={values.out}"):
        atomic.write_text(values.out, html)
    console.status(f"{len(runs.runs)} runs compared in {values.out}")


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_list("runs", [], "Run directories, separated by commas; at most six.")
    flags.DEFINE_enum("split", "test", ["test", "valid", "train"], "Split that was evaluated.")
    flags.DEFINE_enum("search", "exact", ["exact", "scann"], "Search of the evaluations.")
    flags.DEFINE_string("out", "runs.html", "HTML file to write.")


if __name__ == "__main__":
    command_line.launch(main, define_flags, common=COMMON_FLAGS)
