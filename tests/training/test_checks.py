"""What a run checks of its data before it trains: few labels, few queries, tokenizer, metrics."""

import dataclasses
import re

import numpy as np
import pytest

from tests.data.text.test_agreement import write_tokenizer
from tests.tiny import configuration
from vixml_jax import evaluator, train
from vixml_jax.data import on_demand
from vixml_jax.errors import InputError
from vixml_jax.training import build, checks
from vixml_jax.training.memory_planner import DataSizes


def configure(data, workdir):
    config = configuration(data, workdir)
    return changed(config, "batch", row_width=32)


def write_table(path, num_labels, rows=60):
    """A table in which query "wordI J" has label I."""
    lines = [f"word{n % num_labels} {n},tag{n % num_labels}" for n in range(rows)]
    path.write_text("\n".join(["title,tags", *lines]))
    return str(path)


def changed(config, group, **values):
    return dataclasses.replace(
        config, **{group: dataclasses.replace(getattr(config, group), **values)}
    )


@pytest.mark.parametrize(
    "num_labels, last_cut", [pytest.param(1, 1, marks=pytest.mark.slow), (4, 3)]
)
def test_few_labels_and_queries_are_trained_and_evaluated(tmp_path, capsys, num_labels, last_cut):
    config = configure(write_table(tmp_path / "shop.csv", num_labels), tmp_path / "run")
    config = changed(config, "batch", size=512)
    config = changed(config, "loop", epochs=1, eval_every=1)
    config = changed(config, "eval", tune=["P@1", "P@5", "PSP@5"])
    train.train(config, data_cache=str(tmp_path / "cache"))
    printed = capsys.readouterr().out
    assert (
        f"--eval.tune=P@1 in place of P@1,P@5,PSP@5: with {num_labels} labels per query there is "
        "no P@5, PSP@5"
    ) in printed
    assert "--batch.size=512 is more than the 43 training queries: using --batch.size=10" in printed
    results = next(line for line in printed.splitlines() if "P@1" in line and "PSP@1" in line)
    assert max(int(cut) for cut in re.findall(r" P@(\d)", results)) == last_cut
    if num_labels == 4:
        train.train(config, data_cache=str(tmp_path / "cache"))
        assert "resumed at step 5 of 5" in capsys.readouterr().out


@pytest.mark.parametrize("num_labels, cuts", [(1, [1]), (2, [1]), (3, [1, 3]), (5, [1, 3, 5])])
def test_metrics_end_at_the_number_of_labels(num_labels, cuts):
    names = evaluator.metric_names(num_labels)
    assert [int(name[2:]) for name in names if name.startswith("P@")] == cuts


def data_of(tmp_path, num_labels):
    source = write_table(tmp_path / "shop.csv", num_labels)
    return on_demand.open_source(source, "", str(tmp_path / "cache"))


def test_metrics_that_the_data_lack_are_refused_before_training(tmp_path):
    dataset = data_of(tmp_path, 4)
    config = configure(dataset.path, tmp_path / "run")
    for group, flag, values in (
        ("loop", "loop.monitor", {"monitor": "P@5", "eval_every": 1}),
        ("eval", "eval.tune", {"tune": ["P@5"]}),
        ("eval", "eval.tune", {"tune": ["P@1", "P@2"]}),
    ):
        with pytest.raises(InputError, match=rf"--{flag}=P@\d: expected metrics among P@1, "):
            checks.with_metrics(changed(config, group, **values), dataset)
    assert not (tmp_path / "run").exists()


def test_few_results_per_query_count_as_few_labels(tmp_path):
    dataset = data_of(tmp_path, 12)
    config = changed(configure(dataset.path, tmp_path / "run"), "eval", k=3, tune=["P@3", "P@5"])
    assert checks.with_metrics(config, dataset).eval.tune == ["P@3"]


@pytest.mark.parametrize(
    "queries, size, negatives, expected",
    [
        (90, 1024, 10, (22, 10)),
        (90, 91, 10, (22, 10)),
        (90, 90, 10, (90, 10)),
        (20, 64, 10, (5, 4)),
        (9, 64, 10, (2, 1)),
        (2, 64, 10, (2, 1)),
    ],
)
def test_batch_size_adapts_to_the_data(capsys, queries, size, negatives, expected):
    config = changed(configuration("data", "run"), "batch", size=size)
    config = changed(config, "loss", num_negatives=negatives)
    found = build.fit_batch(config, DataSizes(queries, 5, 1.0))
    assert (found.batch.size, found.loss.num_negatives) == expected
    said = capsys.readouterr().out
    if expected[0] == size:
        assert said == ""
    else:
        assert f"--batch.size={size} is more than the {queries} training queries: using" in said
        assert said.count("\n") == 1 and f"--batch.size={expected[0]}" in said


def test_a_single_training_query_is_refused():
    config = changed(configuration("data", "run"), "batch", size=64)
    with pytest.raises(InputError, match="found 1 training query; expected at least 2"):
        build.fit_batch(config, DataSizes(1, 5, 1.0))


def test_data_of_another_tokenizer_are_refused_before_training(tmp_path):
    """All ids are below the model's rows, so that nothing but the tokenizer shows the mistake."""
    import torch
    import transformers

    words = [f"word{n}" for n in range(6)] + list(map(str, np.arange(60)))
    model = write_tokenizer(tmp_path / "model", words)
    torch.manual_seed(0)
    sizes = dict(vocab_size=500, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    transformers.BertModel(
        transformers.BertConfig(**sizes, intermediate_size=32, max_position_embeddings=64)
    ).save_pretrained(model)
    source, cache = write_table(tmp_path / "shop.csv", 6), str(tmp_path / "cache")
    wrong = on_demand.open_source(source, "", cache)
    assert wrong.vocab_size < 500
    config = configure(wrong.path, tmp_path / "run")
    config = changed(changed(config, "model", pretrained=model), "loop", epochs=1)
    with pytest.raises(InputError, match=f"--tokenizer={model} --overwrite"):
        train.train(config, data_cache=cache)
    assert not (tmp_path / "run").exists()
    train.train(dataclasses.replace(config, data=source), data_cache=cache)
    assert (tmp_path / "run" / "config.json").exists()
