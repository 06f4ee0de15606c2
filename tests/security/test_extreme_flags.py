"""Every numeric flag of every command with absurd values: refused in a line, or harmless."""

import contextlib
import dataclasses
import io
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from tests.tiny import configuration, make_data, run_command
from vixml_jax import config as config_lib
from vixml_jax import workdir
from vixml_jax.errors import InputError
from vixml_jax.runtime import flag_fields
from vixml_jax.training import build, checks

ROOT = pathlib.Path(__file__).parents[2]
INTEGERS = (10**9, 10**12, 10**30, -1, -(10**9), 0)
FLOATS = (1e300, float("nan"), float("inf"), -1.0, -1e300, 1e-300, 0.0)
COMMANDS = ("train", "prepare", "evaluate", "predict", "evaluation.compare", "service.serve")
_REASONS = ("expected", "a batch of", "leaves no", "is above", "is not a multiple", "need")
# Flags that may be huge, and why. A new flag either has an upper bound, or a reason here.
HARMLESS = {
    "at most the labels": ("labels.num_free", "eval.k", "head.label_block", "search.label_block"),
    "at most the labels of the run": ("k",),
    "a quarter of the queries, if they are fewer": ("batch.size",),
    "nothing is made of it": (
        "seed", "batch.cluster_start", "batch.cluster_every", "loop.eval_every", "loop.patience",
        "loop.save_every", "loop.save_minutes", "loop.log_every",
        "head.sample_above", "min_score", "verbosity", "stderrthreshold",
    ),
    "no gradient is clipped then": ("optimizer.clip_norm",),
    "memory is computed before it is taken": ("search.query_block",),
    "the space on the disk is computed before": ("loop.max_to_keep",),
    "checked with the sizes of towers": (
        "model.num_layers", "model.width", "model.num_heads", "model.mlp_width", "lora.rank",
    ),
    "checked by preprocessing.Settings": (
        "max_tokens", "vocab_size", "seed", "valid", "test", "propensity_a", "propensity_b",
    ),
}  # fmt: skip
MAY_BE_HUGE = {name for names in HARMLESS.values() for name in names}

WORKER = """
import importlib, json, math, sys
from absl import flags
from vixml_jax.errors import InputError
from vixml_jax.runtime import flag_fields
from vixml_jax import command_line, config
values = json.loads(sys.argv[1])
for command in sys.argv[2:]:
    module = importlib.import_module("vixml_jax." + command)
    before = set(flags.FLAGS)
    module.define_flags()
    names = [name for name in flags.FLAGS if name not in before]
    for name in names:
        for value in values.get(flags.FLAGS[name].flag_type(), ()):
            error = None
            try:
                flags.FLAGS(["x", *command_line.expand([f"--{name}={value}"])])
                flag_fields.check_number(name, flags.FLAGS[name].value)
                if command == "train":
                    config.from_flags(flags.FLAGS)
                elif name.startswith("search."):
                    config.group_from_flags("search", config.SearchConfig, flags.FLAGS)
            except (flags.Error, InputError) as refused:
                error = command_line._plain(str(refused))
            print(json.dumps([command, name, str(value), error]))
            flags.FLAGS.unparse_flags()
            flags.FLAGS[name].value = flags.FLAGS[name].default
    for name in names:
        delattr(flags.FLAGS, name)
"""


def test_absurd_numbers_are_refused_when_flags_are_read():
    values = json.dumps({"int": INTEGERS, "float": [str(value) for value in FLOATS]})
    done = subprocess.run(
        [sys.executable, "-c", WORKER, values, *COMMANDS],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row[0] for row in rows} == set(COMMANDS)
    for command, name, value, error in rows:
        if error is not None:
            assert f"--{name}=" in error and "\n" not in error, error
            assert any(word in error for word in _REASONS), error
        elif abs(float(value)) >= 1e9 or value == "nan":
            why = "was taken: give the flag bounds, or say above why it needs none"
            assert value != "nan" and name in MAY_BE_HUGE, f"{command} --{name}={value} {why}"


def test_fractions_of_nothing_are_no_numbers():
    with pytest.raises(InputError, match="--min_score=nan: expected a number"):
        flag_fields.check_number("min_score", float("nan"))
    flag_fields.check_number("min_score", None)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def outcome(data, changes):
    """What a run with other flags comes to before anything is compiled: its parts, or an error."""
    tree = dataclasses.asdict(configuration(data, "unused"))
    tree["head"] |= {"weight": 0.5, "refit": True}
    for name, value in changes.items():
        group, _, field = name.rpartition(".")
        (tree[group] if group else tree)[field] = value
    with contextlib.redirect_stdout(io.StringIO()):
        config = config_lib.from_dict(tree)
        dataset = workdir.open_dataset(config)
        config = checks.with_metrics(config, dataset)
        tower, layout = build.make_tower(config, dataset)
        sizes = build.sizes_of(dataset)
        config = build.fit_batch(workdir.with_head_loss(config, *sizes.density), sizes)
        return build.assemble(config, tower, layout, sizes, workdir.make_mesh(config))


def numeric():
    for name, _, value in flag_fields.leaves(config_lib.Config(data="d", workdir="w")):
        if not isinstance(value, bool) and isinstance(value, int | float):
            for extreme in INTEGERS if isinstance(value, int) else FLOATS:
                yield name, extreme


def check_outcome(data, name, value):
    try:
        parts = outcome(data, {name: value})
    except InputError as error:
        assert "\n" not in str(error) and name.rpartition(".")[2] in str(error), error
    else:  # No array is larger than the data ask for.
        largest = max(x.size for x in jax_leaves(parts.like))
        assert largest < 1 << 24, (name, value, largest)


def jax_leaves(tree):
    import jax

    return jax.tree.leaves(tree)


def test_flags_of_a_run_are_refused_or_fitted_to_the_data(data):
    rng = np.random.default_rng()
    cases = [case for case in numeric() if case[1] in (10**9, 10**12, 1e300)]
    for index in rng.choice(len(cases), 12, replace=False):
        check_outcome(data, *cases[index])


@pytest.mark.slow
@pytest.mark.parametrize("name, value", list(numeric()))
def test_each_flag_of_a_run_is_refused_or_fitted_to_the_data(data, name, value):
    check_outcome(data, name, value)


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"loop.epochs": 1_000_000, "batch.size": 2, "loss.num_negatives": 1}, None),
        ({"loop.epochs": 1_000_001}, r"--loop\.epochs=1000001: expected from 0 to 1000000"),
        ({"labels.num_heads": 17}, r"--labels\.num_heads=17: expected at most 16"),
        ({"knn.k": 10**9}, r"--knn\.k=1000000000: expected from 1 to 65536"),
    ],
)
def test_bounds_that_depend_on_the_data(data, changes, match):
    with pytest.raises(InputError, match=match) if match else contextlib.nullcontext():
        outcome(data, changes)


def test_too_many_steps_are_refused_before_their_learning_rates_are_computed(data, monkeypatch):
    monkeypatch.setattr(build, "_MOST_STEPS", 1000)
    with pytest.raises(InputError, match=r"--loop\.epochs=1000: 6,000 steps on these data"):
        outcome(data, {"loop.epochs": 1000})
    with pytest.raises(InputError, match=r"--head\.epochs=2000: .* steps on these data"):
        outcome(data, {"head.epochs": 2000})


@pytest.mark.slow
def test_a_run_with_huge_numbers_works(data, tmp_path):
    """Numbers that are fitted to the data, all at once; then predictions of all labels."""
    run = str(tmp_path / "run")
    huge = 10**12
    run_command(
        "train", f"--data={data}", f"--workdir={run}", "--model.num_layers=1", "--model.width=16",
        "--model.num_heads=2", "--model.mlp_width=32", "--batch.row_width=16", "--loop.epochs=1",
        "--labels.num_heads=2", "--labels.mlp_width=32", "--head.weight=0.5", "--head.mlp_width=0",
        "--eval.block=32", "--knn.weight=0.1", "--knn.k=65536",
        *(f"--{name}={huge}" for name in (
            "batch.size", "labels.num_free", "eval.k", "head.label_block", "loop.save_every",
            "loop.log_every", "head.sample_above", "batch.cluster_start",
        )),
    )  # fmt: skip
    queries = tmp_path / "queries.csv"
    queries.write_text("text\na1 b2\n")
    out = tmp_path / "out.jsonl"
    run_command(
        "predict", f"--workdir={run}", f"--queries={queries}", f"--out={out}", f"--k={huge}",
        f"--search.label_block={huge}",
    )  # fmt: skip
    (row,) = map(json.loads, out.read_text().splitlines())
    assert len(row["labels"]) == 20
    error = run_command(
        "predict", f"--workdir={run}", f"--queries={queries}", f"--out={out}",
        f"--search.query_block={huge}", status=2,
    )  # fmt: skip
    assert error.startswith("error: ") and error.count("\n") == 1
    assert "--search.query_block" in error
