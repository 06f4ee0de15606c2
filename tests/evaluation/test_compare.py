"""The compare command: which evaluations can be compared, what is printed, where it is written."""

import dataclasses
import json
import os

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from tests.evaluation.test_bootstrap import ABOUT, table
from vixml_jax import config as config_lib
from vixml_jax.errors import InputError
from vixml_jax.evaluation import bootstrap, compare, per_query


@pytest.fixture
def defined_flags():
    compare.define_flags()
    flags.FLAGS.mark_as_parsed()


def test_command_prints_and_writes_comparison(tmp_path, defined_flags, capsys):
    rng = np.random.default_rng(1)
    one, other = table(rng, 80, shift=0.1), table(rng, 80)
    for name, found in (("a", one), ("b", other)):
        per_query.save(tmp_path / name / "evaluation" / "test-exact.queries.npz", found, ABOUT)
    out = tmp_path / "comparison.json"
    paths = [str(tmp_path / "a"), str(tmp_path / "b/evaluation/test-exact.queries.npz")]
    with flagsaver.flagsaver(
        runs=paths, split="test", search="exact", resamples=200, permutations=999, out=str(out)
    ):
        compare.main([])
    printed = capsys.readouterr().out
    expected = bootstrap.compare(one, other, resamples=200, permutations=999)
    for name, c in expected.items():
        line = next(line for line in printed.splitlines() if line.startswith(name)).split()
        assert line[1:4] == [f"{c.one:.2f}", f"{c.other:.2f}", f"{c.difference:+.2f}"]
        assert line[-1] == f"{c.p_value:.4f}"
    written = json.loads(out.read_text())
    assert written["metrics"]["mean"] == expected["mean"]._asdict()
    assert f"written to {out}" in printed


def test_command_rejects_runs_that_cannot_be_compared(tmp_path, defined_flags):
    found = table(np.random.default_rng(1), 8)
    for name, about in (("a", ABOUT), ("b", ABOUT._replace(content_hash="other"))):
        per_query.save(tmp_path / name / "evaluation" / "test-exact.queries.npz", found, about)
    runs = [str(tmp_path / "a"), str(tmp_path / "b")]
    with flagsaver.flagsaver(runs=runs, split="test", search="exact"):
        with pytest.raises(InputError, match=r"content_hash abc, .* has other"):
            compare.main([])
    with flagsaver.flagsaver(runs=runs[:1]), pytest.raises(InputError, match="--runs: found 1"):
        compare.main([])
    with flagsaver.flagsaver(runs=runs, split="valid", search="exact"):
        with pytest.raises(InputError, match=r"valid-exact\.queries\.npz: not found"):
            compare.main([])


def make_run(root, name, found, about=ABOUT, *, trained_on="abc", **changes):
    """Writes a run directory with the metrics per query of an evaluation; returns its path."""
    run = root / name
    per_query.save(run / "evaluation" / "test-exact.queries.npz", found, about)
    config = dataclasses.replace(config_lib.Config(data="data", workdir=str(run)), **changes)
    (run / "config.json").write_text(config.to_json())
    (run / "tower.json").write_text(json.dumps({"content_hash": trained_on}))
    return str(run)


def compared(*runs, **values):
    """Runs the command on two runs; returns nothing."""
    quick = {"resamples": 100, "permutations": 99, "split": "test", "search": "exact"}
    with flagsaver.flagsaver(runs=list(runs), **{**quick, **values}):
        compare.main([])


def test_flags_that_differ_are_printed_and_written(tmp_path, defined_flags, capsys):
    found = table(np.random.default_rng(1), 20)
    shared = {"optimizer": config_lib.OptimizerConfig(clip_norm=float("inf"))}
    a = make_run(tmp_path, "a", found, seed=3, **shared)
    tune = config_lib.EvalConfig(tune=["P@1", "PSP@5"])
    b = make_run(tmp_path, "b", found, seed=4, mesh="fsdp:-1", eval=tune, **shared)
    compared(a, b)
    printed = capsys.readouterr().out
    expected = ["--eval.tune: A '', B P@1,PSP@5", "--seed: A 3, B 4"]
    assert "flags that differ:\n" + "".join(f"  {line}\n" for line in expected) in printed
    out = tmp_path / "a/evaluation/test-exact-compared_with-b.json"
    assert f"written to {out}" in printed and os.listdir(tmp_path / "b/evaluation") == [
        "test-exact.queries.npz"
    ]
    assert json.loads(out.read_text())["different_flags"] == expected
    compared(a, make_run(tmp_path, "c", found, seed=3, **shared), out="")
    assert "the runs have the same flags" in capsys.readouterr().out
    assert not list(tmp_path.rglob("*compared_with-c*"))


def test_a_flag_that_an_older_version_did_not_have_differs(tmp_path, defined_flags):
    found = table(np.random.default_rng(1), 5)
    a, b = make_run(tmp_path, "a", found), make_run(tmp_path, "b", found)
    settings = json.loads((tmp_path / "a/config.json").read_text())
    del settings["head"]["loss"]
    (tmp_path / "a/config.json").write_text(json.dumps(settings))
    paths = [compare.find(run, "test-exact") for run in (a, b)]
    assert compare.different_flags(paths) == ["--head.loss: A none, B auto"]
    (tmp_path / "a/config.json").write_text("{")
    with pytest.raises(InputError, match=r"a/config\.json: .*expected a file that train wrote"):
        compared(a, b)


def test_an_evaluation_on_other_data_than_trained_on_is_refused(tmp_path, defined_flags, capsys):
    found = table(np.random.default_rng(1), 20)
    a = make_run(tmp_path, "a", found)
    b = make_run(tmp_path, "b", found, trained_on="def")
    match = r"b/evaluation/.*: evaluated on other data \(content hash abc\) .* on \(def\)"
    with pytest.raises(InputError, match=match):
        compared(a, b)
    compared(a, b, other_data=True)
    assert "20 queries" in capsys.readouterr().out


def test_the_same_queries_of_other_data_are_compared_if_told(tmp_path, defined_flags, capsys):
    """For example prepared with another tokenizer."""
    found = table(np.random.default_rng(1), 20)
    a = make_run(tmp_path, "a", found, ABOUT._replace(queries="q"))
    other = ABOUT._replace(content_hash="def", queries="q")
    b = make_run(tmp_path, "b", found, other, trained_on="def")
    with pytest.raises(InputError, match="--other_data compares the same queries") as error:
        compared(a, b)
    assert "\n" not in str(error.value)
    compared(a, b, other_data=True)
    assert "20 queries" in capsys.readouterr().out
    c = make_run(tmp_path, "c", found, other._replace(queries="r"), trained_on="def")
    with pytest.raises(InputError, match="of different queries, or in another order"):
        compared(a, c, other_data=True)
    d = make_run(tmp_path, "d", found._replace(possible=found.possible + 1), other)
    with pytest.raises(InputError, match="different true labels"):
        compared(a, d, other_data=True)


def test_a_file_of_an_older_version_says_nothing_about_its_queries(tmp_path):
    found = table(np.random.default_rng(1), 5)
    path = tmp_path / "old.queries.npz"
    per_query.save(path, found, ABOUT)
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **{**arrays, "about": arrays["about"][:4]})
    assert per_query.load(path)[1] == ABOUT
