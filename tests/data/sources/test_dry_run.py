"""A dry run lists all problems of a source at once, and does not write."""

import os

import pytest
from absl import flags

from tests.data.sources import random_tables
from vixml_jax import prepare
from vixml_jax.data import problems as problems_lib
from vixml_jax.errors import InputError


def dry_run(source, **options):
    """The error of `prepare --dry_run`; None if there is none."""
    values = flags.FlagValues()
    prepare.define_flags(values)
    given = {"source": source, "dry_run": True} | options
    values(["prepare", *(f"--{name}={value}" for name, value in given.items())])
    try:
        prepare.run(values)
    except InputError as error:
        return str(error)
    return None


def problems(output):
    return [line for line in output.split("\n") if line.startswith("problem: ")]


FAULTY = {
    "csv": (
        "id,text,labels,label_weights,embedding\n"
        "1,a,x,1,1 2\n"
        "2,b\n"  # Line 3.
        ",c,x,1,1 2\n"  # Line 4.
        "3,d,x|y,1,1 2\n"  # Line 5.
        "4,e,x,-1,1 2\n"  # Line 6.
        "1,f,x,1,1 2\n"  # Line 7.
        "5,g,x,1,1 2 3\n"  # Line 8.
        "6,h,x,1,nan 1\n"  # Line 9.
    ),
    "jsonl": (
        '{"id": 1, "text": "a", "labels": ["x"], "label_weights": [1], "embedding": [1, 2]}\n'
        '{"id": 2, "text"\n'
        '{"id": "", "text": "c", "labels": ["x"], "label_weights": [1], "embedding": [1, 2]}\n'
        '{"id": 3, "text": "d", "labels": ["x", "y"], "label_weights": [1], "embedding": [1, 2]}\n'
        '{"id": 4, "text": "e", "labels": ["x"], "label_weights": [-1], "embedding": [1, 2]}\n'
        '{"id": 1, "text": "f", "labels": ["x"], "label_weights": [1], "embedding": [1, 2]}\n'
        '{"id": 5, "text": "g", "labels": ["x"], "label_weights": [1], "embedding": [1, 2, 3]}\n'
        '{"id": 6, "text": "h", "labels": ["x"], "label_weights": [1], "embedding": [1e9, 1]}\n'
    ),
}


@pytest.mark.parametrize("kind", FAULTY)
def test_all_faulty_rows_are_listed(tmp_path, capsys, kind):
    (tmp_path / f"q.{kind}").write_text(FAULTY[kind])
    assert dry_run(tmp_path / f"q.{kind}") == "7 problems, listed above; expected none"
    first = 1 if kind == "jsonl" else 2
    lines = "\n".join(problems(capsys.readouterr().out))
    for row, message in (
        (1, ""),
        (2, "'id' is empty, expected an id"),
        (3, "1 weights in 'label_weights' for 2 labels"),
        (4, "'-1' in 'label_weights', expected a number"),
        (5, "id '1' is already used in"),
        (6, "3 numbers per embedding"),
        (7, "'embedding' is not finite"),
    ):
        assert f"q.{kind}, line {first + row}: {message}" in lines
    assert os.listdir(tmp_path) == [f"q.{kind}"]


def test_problems_of_all_files_are_listed(tmp_path, capsys):
    (tmp_path / "labels.csv").write_text("id,text\nu,U\nu,V\n")
    (tmp_path / "train.csv").write_text("id,text,labels\n1,a,u\n1,b,u\n2,c,w\n")
    (tmp_path / "test.csv").write_text("id,name,y\n1,a,u\n")
    (tmp_path / "valid.csv").write_text("id,text,labels\n1,\n2,b,u\n")
    error = dry_run(tmp_path, tokenizer=tmp_path / "nowhere")
    lines = problems(capsys.readouterr().out)
    assert error.startswith(f"{len(lines)} problems")
    for part in (
        "nowhere", "labels.csv, line 3: id 'u' is already", "train.csv, line 3: id '1' is already",
        "test.csv: no labels column", "valid.csv, line 2: 2 fields, expected 3",
    ):  # fmt: skip
        assert sum(part in line for line in lines) == 1, part
    # That a label is unknown is no problem of its own while the table of labels is faulty.
    assert len(lines) == 5


def test_many_problems_are_counted(tmp_path, capsys):
    rows = [{"text": f"t{n}", "labels": "a" if n % 2 else "b", "split": "x"} for n in range(50)]
    random_tables.write_rows(rows, tmp_path / "q.csv")
    assert dry_run(tmp_path / "q.csv") == "50 problems, listed above; expected none"
    output = capsys.readouterr().out
    assert len(problems(output)) == 20 and "and 30 more problems" in output


def test_reading_stops_after_very_many_problems(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(problems_lib, "_MOST", 60)
    (tmp_path / "q.csv").write_text("text,labels\n" + "a,b\n" * 30 + "alone\n" * 20_000)
    assert dry_run(tmp_path / "q.csv") == (
        "60 problems, listed above; expected none, and the rest is not read"
    )
    output = capsys.readouterr().out
    assert len(problems(output)) == 20 and output.count("and 40 more problems") == 1


def test_one_problem_is_the_error_itself(tmp_path, capsys):
    (tmp_path / "q.csv").write_text("text,labels\na,x\nb\n")
    assert dry_run(tmp_path / "q.csv").endswith(
        "q.csv, line 3: 1 fields, expected 2 as in the header"
    )
    assert "problem" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", random_tables.KINDS)
def test_an_intact_source_has_no_problems(tmp_path, capsys, kind):
    random_tables.write_tables(random_tables.draw(5), tmp_path / "d", kind)
    options = {"quotechar": '"'} if kind == "tsv" else {}
    assert dry_run(tmp_path / "d", **options) is None
    assert "55 queries read: " in capsys.readouterr().out
