"""Tests of public data sets by name: the command `prepare`, and the facts of the catalogue."""

import dataclasses
import pathlib
import re

import numpy as np
import pytest
from absl import flags

from tests.data.sources.published_files import (
    SIZES,
    random_rows,
    relevance_of,
    shrink_catalogue,
    titles_and_contents,
    write_filters,
    write_json,
)
from vixml_jax import prepare
from vixml_jax.data.sources import catalog
from vixml_jax.data.store import PreparedDataset
from vixml_jax.errors import InputError

ROOT = pathlib.Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    shrink_catalogue(monkeypatch)


def run_command(tmp_path, **options):
    """The data set that `python -m vixml_jax.prepare` writes with some options."""
    values = flags.FlagValues()
    prepare.define_flags(values)
    options = {
        "source": "lf_wikiseealso_320k",
        "out": tmp_path / "out",
        "manual_dir": tmp_path / "raw",
        "data_dir": tmp_path / "tfds",
        "vocab_size": 64,
        "max_tokens": 8,
    } | options
    values(["prepare", *(f"--{name}={value}" for name, value in options.items())])
    prepare.run(values)
    return PreparedDataset.open(options["out"]) if not options.get("dry_run") else None


def test_prepare_a_public_data_set(tmp_path, capsys):
    held = write_json(tmp_path / "raw", random_rows())
    write_filters(tmp_path / "raw")
    embeddings = np.random.default_rng(0).normal(size=(SIZES["train"], 2, 4)).astype(np.float32)
    np.save(tmp_path / "raw" / "trn_image_embeddings.npy", embeddings)
    dataset = run_command(tmp_path)
    kept = [number for number, row in enumerate(held["train"]) if row["target_ind"]]
    assert 0 < len(kept) < SIZES["train"]
    assert list(dataset.train.texts) == [titles_and_contents(held["train"])[row] for row in kept]
    assert list(dataset.labels.texts) == titles_and_contents(held["labels"])
    assert list(dataset.train.ids) == [held["train"][row]["uid"] for row in kept]
    np.testing.assert_array_equal(
        dataset.train_relevance.toarray(), relevance_of(held["train"])[kept]
    )
    np.testing.assert_array_equal(
        dataset.train.images.values, embeddings[kept].reshape(-1, 4).astype(np.float16)
    )
    assert len(dataset.test_filter) == 6
    assert dataset.name == "LF-WikiSeeAlso-320K"
    assert (dataset.propensity_a, dataset.propensity_b) == (0.55, 1.5)
    capsys.readouterr()
    run_command(tmp_path)
    assert "already prepared" in capsys.readouterr().out
    with pytest.raises(InputError, match="differs in propensity_b"):
        run_command(tmp_path, propensity_b=0.4)


def test_explicit_propensity_constants_take_precedence(tmp_path):
    write_json(tmp_path / "raw", random_rows())
    dataset = run_command(tmp_path, propensity_a=0.0, source="lf_wikititles_500k")
    assert (dataset.propensity_a, dataset.propensity_b) == (0.0, 0.4)
    dataset = run_command(tmp_path, source="glyphs", out=tmp_path / "glyphs")
    assert (dataset.propensity_a, dataset.propensity_b) == (0.6, 2.6)


def test_directory_with_the_name_of_a_data_set_takes_precedence(tmp_path, monkeypatch):
    held = write_json(tmp_path / "lf_wikipedia_500k", random_rows())
    monkeypatch.chdir(tmp_path)
    dataset = run_command(tmp_path, source="lf_wikipedia_500k")
    assert list(dataset.labels.ids) == [row["uid"] for row in held["labels"]]
    assert (dataset.propensity_a, dataset.propensity_b) == (0.5, 0.4)  # Recognised by its name.
    assert not (tmp_path / "tfds").exists()


def test_dry_run_prints_the_citation(tmp_path, capsys):
    write_json(tmp_path / "raw", random_rows())
    run_command(tmp_path, dry_run=True)
    output = capsys.readouterr().out
    assert "@misc{Bhatia16" in output and "LF-WikiSeeAlso-320K from http" in output
    assert not (tmp_path / "out").exists()


def test_catalog_flag_prints_the_catalogue(capsys):
    values = flags.FlagValues()
    prepare.define_flags(values)
    values(["prepare", "--catalog"])
    prepare.run(values)
    lines = capsys.readouterr().out.splitlines()
    for key, dataset in catalog.CATALOG.items():
        line = next(line for line in lines if line.split()[0] == key)
        assert dataset.homepage in line
        for fact in (*SIZES.values(), dataset.propensity_a, dataset.propensity_b):
            assert str(fact) in line.split()


def test_unknown_names_are_refused():
    with pytest.raises(InputError, match="expected one of lf_amazontitles_131k, "):
        catalog.builder("lf_amazontitles")


DATASETS = list(catalog.CATALOG.values())  # With the published sizes.
# Train, labels, test, A, B from the papers.
FACTS = {
    "LF-AmazonTitles-131K": (294805, 131073, 134835, 0.6, 2.6),
    "LF-Amazon-131K": (294805, 131073, 134835, 0.6, 2.6),
    "MM-AmazonTitles-300K": (586781, 303296, 260536, 0.6, 2.6),
    "LF-AmazonTitles-1.3M": (2248619, 1305265, 970237, 0.6, 2.6),
    "LF-WikiSeeAlso-320K": (693082, 312330, 177515, 0.55, 1.5),
    "LF-WikiSeeAlsoTitles-320K": (693082, 312330, 177515, 0.55, 1.5),
    "LF-Wikipedia-500K": (1813391, 501070, 783743, 0.5, 0.4),
    "LF-WikiTitles-500K": (1813391, 501070, 783743, 0.5, 0.4),
    "EURLex-4K": (15449, 3956, 3865, 0.55, 1.5),
}


def test_catalogue_is_complete():
    assert [dataset.name for dataset in DATASETS] == list(FACTS)


@pytest.mark.parametrize("dataset", DATASETS, ids=lambda dataset: dataset.key)
def test_published_facts(dataset):
    sizes = (dataset.train, dataset.labels, dataset.test)
    assert (*sizes, dataset.propensity_a, dataset.propensity_b) == FACTS[dataset.name]
    assert dataset.key == dataset.name.lower().replace("-", "_")
    assert dataset.fields == (
        ("title",)
        if "Titles" in dataset.name or dataset.key == "eurlex_4k"
        else ("title", "content")
    )
    for fact in dataclasses.fields(dataset):
        assert getattr(dataset, fact.name), fact.name
    entries = re.findall(r"^@\w+\{\w+,$", dataset.citation, re.MULTILINE)
    assert len(entries) == dataset.citation.count("@") > 0
    assert dataset.citation.count("{") == dataset.citation.count("}")
    for part in ("author", "title", "year"):
        assert dataset.citation.count(f"  {part} = {{") == len(entries)
    assert re.fullmatch(r"https?://\S+", dataset.homepage)


@pytest.mark.parametrize(
    "path",
    [p for p in sorted((ROOT / "experiments").glob("[lm][fm]_*.flags")) if "_" in p.stem[3:]],
    ids=lambda path: path.stem,
)
def test_experiments_match_the_catalogue(path):
    """A, B and the text length in the prepare command of each flag file."""
    content = path.read_text()
    dataset = {dataset.name: dataset for dataset in DATASETS}[content[2 : content.index(",")]]
    assert f"--source=RAW/{dataset.name} " in content
    explicit = [float(x) for x in re.findall(r"--propensity_[ab]=(\S+)", content)]
    expected = (dataset.propensity_a, dataset.propensity_b)
    assert tuple(explicit or catalog.DEFAULT_PROPENSITY) == expected
    tokens = int(re.search(r"--max_tokens=(\d+)", content)[1])
    assert (tokens == 32) == (dataset.fields == ("title",))
