"""The data of a run: found after a move, refused if they are others, read as they were prepared."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest

from tests import tiny
from vixml_jax import evaluate, run_data, saved_model, train, workdir
from vixml_jax.augmentation import settings
from vixml_jax.augmentation.mixing import Mixing
from vixml_jax.augmentation.settings import Scoring
from vixml_jax.data import integrity, preprocessing
from vixml_jax.data.sources.columns import Columns
from vixml_jax.data.sources.delimited import Dialect
from vixml_jax.data.store import PreparedDataset
from vixml_jax.errors import InputError
from vixml_jax.evaluation import per_query
from vixml_jax.serving.predictor import Predictor


@pytest.fixture(scope="module")
def other_data(run, tmp_path_factory):
    """Data with the labels and the tokenizer of the run, but other training queries."""
    return tiny.make_data(
        tmp_path_factory.mktemp("other"), train=100, tokenizer=f"{run.workdir}/serving"
    )


def move(run, root, data, moved_data, moved_run):
    """Copies the run and its data; its configuration says that it was trained on `data`."""
    copy = root / moved_run
    shutil.copytree(run.workdir, copy, ignore=shutil.ignore_patterns("vectors", "evaluation"))
    (copy / "config.json").write_text(dataclasses.replace(run, data=data).to_json())
    return str(copy), str(shutil.copytree(run.data, root / moved_data))


@pytest.mark.parametrize(
    "data,moved_data,moved_run",
    [
        ("data/nowhere", "data/nowhere", "runs/1"),  # Relative to another directory.
        ("/nowhere/me/data/shop", "x/data/shop", "x/runs/1"),
        ("../nowhere", "run/nowhere", "run"),  # In the run directory.
        ("/nowhere/b/c", "b/c", "x/y/z/f"),
    ],
)
def test_data_that_moved_with_the_run_are_found(run, tmp_path, capsys, data, moved_data, moved_run):
    moved, expected = move(run, tmp_path, data, moved_data, moved_run)
    config = workdir.read_config(moved)
    assert os.path.samefile(config.data, expected)
    assert f"{data}: not found; the data of the run are in {config.data}" in capsys.readouterr().out
    assert workdir.open_run_dataset(config).content_hash == workdir.content_hash(moved)


def test_data_of_another_run_are_not_taken_for_those_that_moved(run, other_data, tmp_path):
    moved, copy = move(run, tmp_path, "/nowhere/shop", "shop", "run")
    shutil.rmtree(copy)
    shutil.copytree(other_data, copy)
    config = workdir.read_config(moved)
    assert config.data == "/nowhere/shop"
    with pytest.raises(InputError, match=r"/nowhere/shop: not found.* name them by --data"):
        workdir.open_run_dataset(config)
    assert workdir.read_config(moved, data=run.data).data == run.data
    assert Predictor.load(moved, warm=False).num_labels == 20  # It needs no data.
    shutil.rmtree(os.path.join(moved, "serving"))
    with pytest.raises(InputError, match=r"serving: missing for this model, .* by --data"):
        Predictor.load(moved, warm=False)


def test_a_resumed_run_takes_its_data_from_another_place(run, other_data, tmp_path):
    moved, copy = move(run, tmp_path, run.data, "shop", "run")
    mesh = workdir.make_mesh(run)
    config = dataclasses.replace(run, workdir=moved, data=copy)
    arguments = (*workdir.read_tower(moved), workdir.content_hash(moved), mesh)
    workdir.open_run(config, *arguments)
    assert workdir.read_config(moved).data == copy
    other = PreparedDataset.open(other_data).content_hash
    with pytest.raises(InputError, match="has other content than the run was started on"):
        workdir.open_run(dataclasses.replace(config, data=other_data), *arguments[:2], other, mesh)


def test_other_data_are_refused_by_evaluate_and_predict(run, other_data, tmp_path):
    moved, _ = move(run, tmp_path, run.data, "shop", "run")
    error = tiny.run_command("evaluate", f"--workdir={moved}", f"--data={other_data}", status=2)
    assert error.count("\n") == 1 and "not the data that the run was trained on" in error
    assert "--other_data evaluates on them" in error
    assert not os.path.exists(os.path.join(moved, "evaluation"))
    with pytest.raises(InputError, match="not the data that the run was trained on"):
        Predictor.load(moved, data=other_data, warm=False)


def test_an_evaluation_on_other_data_has_a_name_of_its_own(run, other_data, tmp_path):
    moved, _ = move(run, tmp_path, run.data, "shop", "run")
    config = workdir.read_config(moved)
    directory = os.path.join(moved, "evaluation")
    model = workdir.build_model(config, *workdir.read_tower(moved), 20, workdir.make_mesh(config))
    params, labels, step = saved_model.restore(moved, model)

    def show(data, is_other_data):
        evaluate.show(
            config,
            model,
            params,
            labels,
            PreparedDataset.open(data),
            split="test",
            search="exact",
            step=step,
            scoring=settings.as_trained(config),
            is_other_data=is_other_data,
        )

    show(run.data, False)
    before = {
        name: os.stat(os.path.join(directory, name)).st_mtime_ns for name in os.listdir(directory)
    }
    show(other_data, True)
    content_hash = PreparedDataset.open(other_data).content_hash
    name = f"test-exact-data_{content_hash[:8]}"
    new = {name + ".json", name + per_query.SUFFIX, name + "-neighbours" + per_query.SUFFIX}
    assert set(os.listdir(directory)) == before.keys() | new
    for old, time in before.items():
        assert os.stat(os.path.join(directory, old)).st_mtime_ns == time, old
    _, about = per_query.load(os.path.join(directory, name + per_query.SUFFIX))
    assert about.content_hash == content_hash


def resave(path, info, content_hash):
    """Writes `dataset.json` with another content hash, and opens the data."""
    with open(os.path.join(path, "dataset.json"), "w") as file:
        json.dump({**info, "content_hash": content_hash}, file)
    PreparedDataset.open(path)


def test_other_data_must_have_the_labels_and_the_tokenizer_of_the_run(run, other_data, tmp_path):
    evaluate._check_other_data(run.workdir, PreparedDataset.open(other_data), ())
    with pytest.raises(InputError, match="--tune: cannot be combined"):
        evaluate._check_other_data(run.workdir, PreparedDataset.open(other_data), ["P@1"])
    (tmp_path / "tokenizer").mkdir()
    with open(os.path.join(other_data, "dataset.json")) as file:
        info = json.load(file)
    for change in ("labels", "tokenizer"):
        copy = str(shutil.copytree(other_data, tmp_path / change, dirs_exist_ok=True))
        if change == "labels":
            changed = json.loads(json.dumps(info))
            changed["arrays"]["labels_ids"]["sha256"] = "0" * 64
        else:
            changed = info
            with open(os.path.join(copy, "tokenizer.json"), "a") as file:
                file.write(" ")
        with pytest.raises(InputError, match=r"damaged, or tokenizer\.json is|content hash"):
            PreparedDataset.open(copy) if change == "tokenizer" else resave(copy, changed, "")
        with open(os.path.join(copy, "tokenizer.json"), "rb") as file:
            content_hash = integrity.content_hash(changed["arrays"], file.read(), changed)
        resave(copy, changed, content_hash)
        with pytest.raises(InputError, match="its labels or its tokenizer are not those in"):
            evaluate._check_other_data(run.workdir, PreparedDataset.open(copy), ())


def test_queries_without_labels_and_constants_are_in_the_result_line(run):
    dataset = PreparedDataset.open(run.data)
    counts = {"queries": 400, "queries_without_labels": 0, "labels": 20}
    line = evaluate._describe(dataset, "test", {"counts": counts})
    assert line == f"{dataset.name}, test: 400 queries, 20 labels, PSP with A 0.6, B 2.6"
    line = evaluate._describe(
        dataset, "test", {"counts": {**counts, "queries_without_labels": 205}}
    )
    assert "205 of them without labels, which count as misses (P@1 is at most 48.75)" in line


MIXING = Mixing(0.2, 5, 0.1)


def decide(workdir, *, alone, mixed, decide=True):
    results = {
        "metrics": {"P@1": 50.0, "P@5": alone},
        "with_neighbours": {"P@1": 60.0, "P@5": mixed},
    }
    evaluate._compare_neighbours(workdir, 7, Scoring(mixing=MIXING), results, "valid", decide)


def test_neighbours_that_do_not_help_on_the_validation_split_are_off(run, tmp_path, capsys):
    where = str(tmp_path)
    decide(where, alone=69.5, mixed=78.0)
    assert capsys.readouterr().out == "" and not settings.is_tuned(where, 7)
    assert settings.as_tuned(run, where, 7).mixing.weight == 0.2
    decide(where, alone=78.0, mixed=69.5, decide=False)
    printed = capsys.readouterr().out
    assert "neighbours lower P@5 from 78.0 to 69.5 on the valid split: --knn.weight=0" in printed
    assert settings.as_tuned(run, where, 7).mixing.weight == 0.2
    decide(where, alone=78.0, mixed=69.5)
    printed = capsys.readouterr().out
    assert "neighbours lower P@5 from 78.0 to 69.5 on the valid split: off" in printed
    assert settings.as_tuned(run, where, 7).mixing is None
    assert settings.as_tuned(run, where, 8).mixing.weight == 0.2  # Another step.


def test_settings_that_were_tuned_stay(run, tmp_path, capsys):
    rows = [settings.to_row(Scoring(mixing=MIXING), 9.0)]
    settings.save_tuned(str(tmp_path), 7, ["P@1"], rows)
    decide(str(tmp_path), alone=78.0, mixed=69.5)
    assert settings.as_tuned(run, str(tmp_path), 7).mixing == MIXING
    assert "--knn.weight=0 turns them off" in capsys.readouterr().out


@pytest.mark.parametrize("with_neighbours", [69.5, 78.0])
def test_tuning_says_that_neighbours_do_not_help(run, tmp_path, capsys, with_neighbours):
    rows = [
        settings.to_row(Scoring(), 78.0),
        settings.to_row(Scoring(mixing=MIXING), with_neighbours),
    ]
    evaluate._save_tuned(str(tmp_path), 7, ["P@1", "P@5"], rows)
    output = capsys.readouterr().out
    assert output.count("training neighbours are off") == 1
    assert "beyond chance" not in output
    assert settings.as_tuned(run, str(tmp_path), 7).mixing is None
    evaluate._save_tuned(str(tmp_path), 7, ["P@1"], rows[::-1])
    output = capsys.readouterr().out
    assert "off" not in output
    found = "do not raise P@1 beyond chance, from 69.50 to 78.00 at best" in output
    assert found == (with_neighbours < 78.0)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A run trained on a table whose texts are made of two columns."""
    root = tmp_path_factory.mktemp("shop")
    rng = np.random.default_rng(3)
    rows = ["sku;title;brand;tags"]
    for i, (a, b) in enumerate(rng.integers(0, 6, (80, 2))):
        rows.append(f"s{i};schön{a};Ömer{b};tag{a}|made{b}")
    (root / "shop.csv").write_bytes("\n".join([*rows, ""]).encode("cp1252"))
    (root / "spool").mkdir()
    columns = Columns(text="{title} by {brand}", id="sku")
    raw = preprocessing.read_source(
        str(root / "shop.csv"),
        str(root / "spool"),
        names=columns,
        dialect=Dialect(encoding="cp1252"),
    )
    preprocessing.prepare(raw, str(root / "data"), preprocessing.Settings(max_tokens=12))
    config = tiny.configuration(str(root / "data"), root / "run")
    train.train(dataclasses.replace(config, loop=dataclasses.replace(config.loop, epochs=1)))
    return root


def test_predict_reads_queries_as_prepare_read_the_data(shop):
    reading = run_data.read_reading(str(shop / "run"))
    assert reading.columns.text == "{title} by {brand}" and reading.columns.id == "sku"
    queries, out = shop / "new.csv", shop / "out.jsonl"
    texts = ["schön1 by Ömer2", "schön5 by Ömer0"]
    lines = ["id;sku;title;brand", "x;n1;schön1;Ömer2", "y;n2;schön5;Ömer0", ""]
    queries.write_bytes("\n".join(lines).encode("cp1252"))
    printed = tiny.run_command(
        "predict", f"--workdir={shop}/run", f"--queries={queries}", f"--out={out}", "--k=3"
    )
    assert "text '{title} by {brand}', id 'sku', encoding cp1252" in printed
    found = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert [row["id"] for row in found] == ["n1", "n2"]
    expected = Predictor.load(str(shop / "run"), warm=False)(texts, k=3)
    for row, labels in zip(found, expected, strict=True):
        assert [label["id"] for label in row["labels"]] == [label.id for label in labels]
        np.testing.assert_allclose(
            [label["score"] for label in row["labels"]], [x.score for x in labels], rtol=1e-4
        )
    title_alone = Predictor.load(str(shop / "run"), warm=False)(["schön1"], k=3)
    assert abs(title_alone[0][0].score - expected[0][0].score) > 1e-3


def test_a_run_that_recorded_no_reading_is_read_as_before(shop, run):
    assert run_data.read_reading(run.workdir) is None
    path = shop / "run" / run_data.READING
    content = path.read_text("utf-8")
    path.write_text('{"kind": "csv"}')
    with pytest.raises(InputError, match=r"reading.json: .*columns.*remove it"):
        run_data.read_reading(str(shop / "run"))
    path.write_text(content, "utf-8")


def test_answers_that_min_score_leaves_out_are_counted(shop):
    queries, out = shop / "scores.jsonl", shop / "scores_out.jsonl"
    queries.write_text('{"title": "schön1", "brand": "Ömer1", "image": "x.png"}\n' * 3, "utf-8")
    printed = tiny.run_command(
        "predict", f"--workdir={shop}/run", f"--queries={queries}", f"--out={out}",
        "--min_score=1.5",
    )  # fmt: skip
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert len(rows) == 3 and all(row["labels"] == [] and row["best_score"] < 1.5 for row in rows)
    assert "3 queries without labels: none reaches --min_score; the best scores are" in printed
    assert "note of 3 queries: images are ignored" in printed
    assert "3 of 3 queries predicted" in printed
