"""Data sets of the catalogue under any path: recognised by name or by sizes, with their A and B."""

import pytest
from absl import flags

from vixml_jax import prepare
from vixml_jax.data.sources import catalog
from vixml_jax.data.store import PreparedDataset


@pytest.mark.parametrize("dataset", catalog.CATALOG.values(), ids=lambda dataset: dataset.key)
@pytest.mark.parametrize(
    "path",
    ["raw/{name}", "/data/{key}/", "./{name}.raw", "{plain}", "~/{name}/train.csv", "/a b/{name}"],
)
def test_by_name(dataset, path):
    plain = dataset.name.upper().replace("-", "_")
    path = path.format(name=dataset.name, key=dataset.key, plain=plain)
    sizes = {part: getattr(dataset, part) for part in ("train", "labels", "test")}
    for known in (None, sizes, {"train": sizes["train"], "labels": sizes["labels"]}):
        found = catalog.propensity(path, known)
        assert found[:2] == (dataset.propensity_a, dataset.propensity_b)
        assert dataset.name in found.origin and "differ" not in found.origin
    other = catalog.propensity(path, sizes | {"test": 17})
    assert other[:2] == found[:2] and "although its sizes differ" in other.origin


@pytest.mark.parametrize("dataset", catalog.CATALOG.values(), ids=lambda dataset: dataset.key)
def test_by_sizes(dataset):
    """Data sets of the same sizes have the same constants."""
    sizes = {part: getattr(dataset, part) for part in ("train", "labels", "test")}
    found = catalog.propensity("/mnt/unpacked", sizes)
    assert found[:2] == (dataset.propensity_a, dataset.propensity_b)
    assert f"{dataset.labels:,} labels" in found.origin
    for part in sizes:
        assert catalog.recognise("/mnt/unpacked", sizes | {part: sizes[part] - 1}) is None
    assert catalog.recognise("/mnt/unpacked") is None


@pytest.mark.parametrize("path", ["shop.csv", "lf", "/amazon/shop", "lf-amazontitles", "wikipedia"])
def test_other_data_are_not_recognised(path):
    assert catalog.recognise(path, {"train": 10, "labels": 3}) is None
    assert catalog.propensity(path)[:2] == (0.6, 2.6)


def write_repository(path):
    path.mkdir(parents=True)
    (path / "lbl.raw.txt").write_text("wool\nsilk\n")
    for prefix in ("trn", "tst"):
        (path / f"{prefix}.raw.txt").write_text("red wool\nblue silk\n")
        (path / f"{prefix}_X_Y.txt").write_text("2 2\n0:1\n1:1\n")


@pytest.mark.parametrize(
    "name, arguments, expected, printed",
    [
        ("LF-WikiSeeAlso-320K", [], (0.55, 1.5), "A 0.55, B 1.5 (LF-WikiSeeAlso-320K, recognised"),
        ("LF-WikiTitles-500K", [], (0.5, 0.4), "A 0.5, B 0.4 (LF-WikiTitles-500K, recognised"),
        ("shop", [], (0.6, 2.6), "A 0.6, B 2.6 (the default; no data set of the catalogue)"),
        (
            "LF-WikiTitles-500K",
            ["--propensity_a=0.7"],
            (0.7, 0.4),
            "A 0.7, B 0.4 (--propensity_a; LF-WikiTitles-500K, recognised",
        ),
        (
            "LF-WikiTitles-500K",
            ["--propensity_a=0.7", "--propensity_b=1"],
            (0.7, 1.0),
            "A 0.7, B 1 (--propensity_a; --propensity_b)",
        ),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_prepare_takes_and_prints_them(
    tmp_path, capsys, name, arguments, expected, printed, dry_run
):
    write_repository(tmp_path / name)
    values = flags.FlagValues()
    prepare.define_flags(values)
    out = tmp_path / "out"
    values(
        [
            "prepare",
            f"--source={tmp_path / name}",
            f"--out={out}",
            f"--dry_run={dry_run}",
            *arguments,
        ]
    )
    prepare.run(values)
    assert f"inverse propensity: {printed}" in capsys.readouterr().out
    if not dry_run:
        dataset = PreparedDataset.open(str(out))
        assert (dataset.propensity_a, dataset.propensity_b) == expected
