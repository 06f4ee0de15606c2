"""The page that compares runs: its numbers are those of their files, whatever they are called."""

import dataclasses
import json
import pathlib
import re
import shlex
import shutil
import tarfile

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from tests.report.pages import HOSTILE, SCHEMES, opened
from tests.report.test_markdown import read
from vixml_jax import config as config_lib
from vixml_jax.errors import InputError
from vixml_jax.evaluation import bootstrap, per_query
from vixml_jax.evaluation.per_query import About, PerQuery
from vixml_jax.report import curves, dashboard, render, run_sections, runs
from vixml_jax.training import metric_logger
from vixml_jax.training.metric_logger import MetricLogger

FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures" / "run_0_1.tar.gz"
NAME = "<img src=x onerror=window.hacked=1>&\"' $(hacked)"  # A directory's name has no slash.
METRICS = ("P@1", "PSP@5", "R@100", "MRR")


def write_run(path, number, *, content="abc", evaluated=True, logged=True, queries=60, **changes):
    """Writes a run with random values of each query; returns its path."""
    rng = np.random.default_rng(number)
    config = dataclasses.replace(config_lib.Config(data="data", workdir=str(path)), **changes)
    (path / "evaluation").mkdir(parents=True)
    (path / "config.json").write_text(config.to_json())
    (path / "tower.json").write_text(json.dumps({"content_hash": content}))
    results = {"intervals": {}}
    for key, suffix in (("run", ""), ("neighbours", "-neighbours")) * evaluated:
        values = rng.random((queries, len(METRICS)), np.float32)
        possible = np.random.default_rng(9).random((queries, 1), np.float32) + 1
        found = PerQuery(METRICS, values, ("PSP@5",), possible)
        about = About("shop", content, "test", "exact", "ids")
        per_query.save(path / "evaluation" / f"test-exact{suffix}.queries.npz", found, about)
        metrics = found.metrics()
        results |= {"with_neighbours": metrics} if suffix else metrics
        results["intervals"][key] = {name: (x - 2, x + 1) for name, x in metrics.items()}
    if evaluated:
        (path / "evaluation" / "test-exact.json").write_text(json.dumps(results))
    if logged:
        lines = [
            {"step": step, "epoch": (step - 1) // 10, "seconds": 7.0 * step, "loss": 1 / step}
            for step in range(1, 31)
        ]
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def make(*paths, split="test"):
    """The HTML of the page of some runs."""
    page = runs.read([str(path) for path in paths], split, "exact")
    sections = run_sections.all_sections(page, command="vixml_jax report", facts={"date": "today"})
    return render.document(run_sections.title(page), run_sections.summary(page), sections)


def tables_of(html):
    """By label of each table, its rows of texts."""
    found = {}
    for label, body in re.findall(r'aria-label="([^"]*)">\s*<table>(.*?)</table>', html, re.S):
        rows = re.findall(r"<tr.*?</tr>", body, re.S)
        cells = [re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row, re.S) for row in rows]
        found[label] = [[" ".join(re.sub("<.*?>", "", c).split()) for c in row] for row in cells]
    return found


def test_numbers_are_those_of_the_files(tmp_path):
    a, b = (write_run(tmp_path / name, number) for number, name in enumerate("ab"))
    page = tables_of(make(a, b))
    results = [json.loads((tmp_path / n / "evaluation/test-exact.json").read_text()) for n in "ab"]
    header, *rows = page["metrics of each run"]
    assert header == ["", "A", "A + kNN", "B", "B + kNN"] and [row[0] for row in rows] == [*METRICS]
    for name, *cells in rows:
        values = [x for found in results for x in (found[name], found["with_neighbours"][name])]
        assert cells == [f"{x:.2f} [{x - 2:.2f}, {x + 1:.2f}]" for x in values]
    for scoring, suffix in (("without neighbours", ""), ("with neighbours", "-neighbours")):
        paths = [tmp_path / n / f"evaluation/test-exact{suffix}.queries.npz" for n in "ba"]
        one, other = (per_query.load(path)[0] for path in paths)
        expected = bootstrap.compare(one, other)
        difference = (one.values - other.values).astype(np.float64).mean(axis=0)
        header, *rows = page[f"differences {scoring}"]
        assert header == ["", "B − A"]
        for i, (name, cell) in enumerate(rows):
            c = expected[name]
            assert cell == (f"{c.difference:+.2f} [{c.low:.2f}, {c.high:.2f}], p {c.p_value:.4f}")
            if name != "PSP@5":  # A ratio of sums.
                assert float(cell.split()[0]) == pytest.approx(100 * difference[i], abs=0.006)


def test_runs_on_other_data_are_not_subtracted(tmp_path):
    a = write_run(tmp_path / "a", 0)
    b = write_run(tmp_path / "b", 1, content="other")
    c = write_run(tmp_path / "c", 2, content="other")
    html = make(a, b, c)
    assert tables_of(html)["differences without neighbours"][0] == ["", "C − B"]
    assert "B and A: trained and evaluated on other data" in html
    assert "2 different data sets" in html and "3 runs on 2 data sets" in html


def test_runs_of_other_queries_say_why_they_are_not_subtracted(tmp_path):
    a, b = write_run(tmp_path / "a", 0), write_run(tmp_path / "b", 1, queries=50)
    html = make(a, b)
    assert "B and A: found 50 queries" in html and "differences without" not in html


def test_curves_equal_an_oracle_without_the_time_between_starts(tmp_path, monkeypatch):
    """A run of 3 epochs of 7 steps and 2 of 4 is killed at step 10, and goes on a day later."""
    run = tmp_path / "run"
    write_run(run, 0, logged=False)
    clock = {"now": 1e5}
    monkeypatch.setattr(metric_logger.time, "monotonic", lambda: clock["now"])
    rng, saved = np.random.default_rng(5), 8
    for first, last in ((0, 10), (saved, 29)):
        rates = {"tower": np.ones(21)}
        logger = MetricLogger(
            str(run), step=first, total_steps=21, num_epochs=3, learning_rates=rates
        )
        clock["now"] += 20.0
        for step in range(first + 1, last + 1):
            clock["now"] += rng.integers(1, 9)
            if step == 22:
                stage = metric_logger.Stage("head epoch", 3, 2, 21, 8)
                logger.begin(stage, {"head": np.ones(8)})
            epoch = (step - 1) // 7 if step <= 21 else 3 + (step - 22) // 4
            if step % 2 == 0 or step in (7, 21, 25):
                logger.scalars(step, {"loss": float(rng.random())}, epoch=epoch)
            if step in (7, 14, 21):
                clock["now"] += 30.0
                logger.write(step, {"valid/P@1": float(step)}, epoch=epoch)
        logger.close()
        clock["now"] += 86_400.0
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 30, "epo')  # It is being written.

    *lines, _ = (run / "metrics.jsonl").read_text().split("\n")
    lines = [json.loads(line) for line in lines]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == sorted(set(steps)) and steps[-1] == 28
    points = {
        line["step"]: (
            line["step"] / 7 if line["step"] <= 21 else 3 + (line["step"] - 21) / 4,
            next(x["seconds"] for x in reversed(lines) if x["step"] == line["step"]) / 60,
            line["loss"],
        )
        for line in lines
        if "loss" in line
    }
    found = runs.read([str(run)], "test", "exact").runs[0]
    for part, shown in ((range(22), found.losses), (range(22, 30), found.head_losses)):
        expected = [points[step] for step in steps if step in part]
        np.testing.assert_allclose(np.array(shown), expected, rtol=1e-12)
    assert found.losses[-1].minutes < 5  # A day is 1,440 minutes.
    times = [line["seconds"] / 60 for line in lines if "valid/P@1" in line]
    curve = found.curves["P@1"]
    assert curve.split == "valid"
    np.testing.assert_allclose(np.array(curve.points), np.array([[1, 2, 3], times, [7, 14, 21]]).T)

    drawn = re.findall(r"<figcaption>(Loss in training[^<]*)</figcaption>.*?<path class=\"l0\" "
                       r"d=\"M([^\"]*)\"", make(run), re.S)  # fmt: skip
    assert [title for title, _ in drawn] == [
        "Loss in training, by epochs", "Loss in training, by minutes of running",
    ]  # fmt: skip
    for column, (_, path) in enumerate(drawn):
        places = np.array([pair.split() for pair in path.split(" L")], float)
        for axis, values in ((0, column), (1, 2)):
            expected = np.array(found.losses)[:, values]
            fit = np.polyval(np.polyfit(expected, places[:, axis], 1), expected)
            np.testing.assert_allclose(places[:, axis], fit, atol=0.11)


def test_epoch_that_goes_on_is_as_long_as_the_one_before():
    lines = [{"step": s, "epoch": e, "loss": 1.0} for s, e in ((10, 0), (20, 0), (24, 1), (25, 1))]
    assert curves.epochs_at(lines, [10, 20, 25]) == [0.5, 1.0, 1.25]
    assert curves.epochs_at(lines[:2], [10, 20]) == [0.5, 1.0]
    head = {"learning_rate/head": 1.0, "loss": 1.0}
    lines += [{"step": 40, "epoch": 1}, {"step": 44, "epoch": 2, **head}]
    assert curves.epochs_at(lines, [30, 40, 44]) == [1.5, 2.0, 3.0]


def test_run_without_metrics_or_evaluation_says_how_to_make_one(tmp_path):
    a = write_run(tmp_path / "a", 0)
    b = write_run(tmp_path / NAME, 1, evaluated=False, logged=False)
    html = make(a, b)
    read(html.removeprefix("<!doctype html>"))
    assert "has no metrics.jsonl" in html and "B has no evaluation on test" in html
    command = next(c for c in re.findall(r"<pre>(.*?)</pre>", html, re.S) if "evaluate" in c)
    for name, text in (("lt", "<"), ("gt", ">"), ("#34", '"'), ("#39", "'"), ("amp", "&")):
        command = command.replace(f"&{name};", text)
    assert shlex.split(command) == ["vixml_jax", "evaluate", f"--workdir={b}", "--split=test"]
    neither = make(b, write_run(tmp_path / "c", 2, evaluated=False))
    assert "<h2" in neither and "metrics of each run" not in neither


def test_version_0_1_is_read(tmp_path):
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(tmp_path, filter="data")
    other = shutil.copytree(tmp_path / "run", tmp_path / "copy")
    html = make(tmp_path / "run", other)
    expected = json.loads((other / "evaluation" / "test-exact.json").read_text())
    page = tables_of(html)
    cells = dict((name, cells) for name, *cells in page["metrics of each run"])
    pair = [f"{expected['P@3']:.2f}", f"{expected['with_memory']['P@3']:.2f}"]
    assert cells["P@3"] == pair * 2
    for scoring in runs.SCORINGS:
        rows = page[f"differences {scoring}"][1:]
        assert rows and all(cell.startswith("+0.00 [0.00, 0.00], p 1") for _, cell in rows)
    assert "A has no times" in html and "The runs have the same flags." in html
    changed = json.loads((other / "config.json").read_text())
    changed["eval"]["memory_weight"] = 0.7
    (other / "config.json").write_text(json.dumps(changed))
    assert tables_of(make(tmp_path / "run", other))["flags that differ"][1:] == [
        ["--knn.weight", "0.2", "0.7"]
    ]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    model = config_lib.ModelConfig(pretrained=HOSTILE)
    one = write_run(root / NAME, 0, model=model)
    others = [write_run(root / f"{'long_' * 30}{i}", i, seed=i) for i in range(1, 6)]
    path = root / "page.html"
    path.write_text(make(one, *others), encoding="utf-8")
    return path


@pytest.mark.parametrize("scheme,width", [("light", 390), ("dark", 1280)])
def test_page_of_hostile_runs_is_harmless_and_fits(browser, hostile, scheme, width):
    assert scheme in SCHEMES
    with opened(browser, hostile, scheme, width) as (tab, requests, messages):
        assert requests == [hostile.as_uri()] and messages == []
        assert tab.evaluate("window.hacked") is None
        assert tab.evaluate("document.querySelectorAll('script, img, iframe').length") == 0
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.locator("h3").first.inner_text() == f"A {NAME}"
        row = tab.locator(".flags tr", has_text="--model.pretrained").locator("td")
        assert [cell.inner_text() for cell in row.all()] == [HOSTILE] + ["''"] * 5
        marks = tab.evaluate(
            "[0,1,2,3,4,5].map(i => getComputedStyle(document.querySelector(`.m${i}`)).fill)"
        )
        assert len(set(marks)) == 6


def test_command_writes_the_page_or_refuses(tmp_path):
    a = write_run(tmp_path / "a", 0)
    dashboard.define_flags()
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(runs=[a], out=str(tmp_path / "out.html")):
        dashboard.main([])
    assert "<h1>a</h1>" in (tmp_path / "out.html").read_text()
    for given, message in (
        ([], "found 0, expected 1 to 6"),
        ([a] * 7, "found 7, expected 1 to 6"),
        ([a, a + "/"], "is given twice"),
        ([str(tmp_path)], "config.json: not found; expected a run directory"),
    ):
        with flagsaver.flagsaver(runs=given), pytest.raises(InputError, match=message):
            dashboard.main([])


@pytest.mark.parametrize("name,content,message", [
    ("metrics.jsonl", '{"step": 1, "loss": 1.0}\n', "lines without step or epoch"),
    ("metrics.jsonl", '{"step": 1, "epoch": "<b>"}\n', "Expected `int`, got `str`"),
    ("evaluation/test-exact.json", '{"P@1": "<b>"}', "P@1 is '<b>', expected a number"),
    ("metrics.jsonl", '{"step": 1, "epoch": 1e999}\n', "metrics.jsonl: Expected `int`"),
    ("metrics.jsonl", f'{{"step": {10**400}, "epoch": 0}}\n', "metrics.jsonl: Expected `int`"),
    ("metrics.jsonl", '{"step": 1, "epoch": 0, "seconds": NaN}\n', "Expected `float` >= 0.0"),
    ("evaluation/test-exact.json", '{"P@1": 1e300}', "Expected `float` <= "),
    ("evaluation/test-exact.json", '{"P@1": 1.0, "intervals": [1]}', "Expected `object`"),
    ("tower.json", "{", "tower.json: .*expected a file that train wrote"),
    ("tower.json", '{"content_hash": 5}', "content_hash 5; expected a file that train wrote"),
    ("config.json", f'{{"seed": {10**400}}}', "--seed=10+: expected at most 1e\\+15"),
])  # fmt: skip
def test_damaged_files_are_refused(tmp_path, name, content, message):
    run = write_run(tmp_path / "run", 0)
    (tmp_path / "run" / name).write_text(content)
    with pytest.raises(InputError, match=message):
        make(run)


def test_numbers_that_cannot_be_drawn_are_left_out(tmp_path):
    run = write_run(tmp_path / "run", 0)
    losses = ("NaN", "Infinity", "-1e999", 10**400, 1e300, 0.5, 0.25)
    lines = [f'{{"step": {n}, "epoch": 0, "loss": {loss}}}\n' for n, loss in enumerate(losses, 1)]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(lines))
    (found,) = runs.read([run], "test", "exact").runs
    assert [point.value for point in found.losses] == [0.5, 0.25]
    results = json.loads((tmp_path / "run" / "evaluation" / "test-exact.json").read_text())
    del results["P@1"]  # Its interval stays.
    (tmp_path / "run" / "evaluation" / "test-exact.json").write_text(json.dumps(results))
    assert "nan" not in re.findall(r'<path class="\w+" d="[^"]*"', make(run))


@pytest.mark.parametrize("change", [
    {"values": np.zeros((60, 3), np.float32)}, {"values": np.zeros(60, np.float32)},
    {"values": np.full((60, 4), np.nan, np.float32)}, {"values": np.array([["a"] * 4] * 60)},
    {"possible": np.zeros((9, 1), np.float32)}, {"ratios": np.array(["other"])},
    {"names": np.arange(4)}, {"about": np.arange(5)}, {"about": np.array(["a"])}, None,
])  # fmt: skip
def test_damaged_values_of_queries_are_named(tmp_path, change):
    path = write_run(tmp_path / "run", 0) + "/evaluation/test-exact.queries.npz"
    if change is None:  # Bytes that cannot be decompressed, in a file that is whole.
        with open(path, "r+b") as file:
            file.seek(200)
            file.write(b"\xff" * 40)
    else:
        with np.load(path) as arrays:
            np.savez_compressed(path, **{**arrays, **change})
    with pytest.raises(InputError, match="not readable as a file of metrics per query") as error:
        per_query.load(path)
    assert "\n" not in str(error.value) and path in str(error.value)


def test_names_are_short_and_different():
    assert runs.short_names(["/x/a/run", "y/b/run/"]) == ["a/run", "b/run"]
    assert runs.short_names(["/x/a", "/x/b"]) == ["a", "b"]
    assert runs.short_names(["a", "x/a"]) == ["a", "x/a"]
