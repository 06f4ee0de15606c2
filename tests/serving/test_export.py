"""Exports give the same vectors as the run: in transformers, StableHLO, npy and parquet."""

import dataclasses
import json
import shutil
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.special
import sentence_transformers
import torch
import transformers

from tests import tiny
from vixml_jax import train
from vixml_jax.config import LoraConfig, PromptConfig, SearchConfig
from vixml_jax.data.store import PreparedDataset
from vixml_jax.models import hf_checkpoints
from vixml_jax.serving import exporting, label_updates
from vixml_jax.serving.predictor import Predictor
from vixml_jax.structs import Queries

KINDS = ["encoder", "adapted", "decoder", "head", pytest.param("roberta", marks=pytest.mark.slow)]
READ_BACK = """
import sys, jax, numpy as np
program = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
given = np.load(sys.argv[2])
np.save(sys.argv[3], program.call(given["ids"], given["mask"]))
assert not any(name.startswith(("vixml", "flax")) for name in sys.modules)
"""


def make_roberta(path, data):
    """Writes a random RoBERTa, whose positions begin at 1; returns its path."""
    torch.manual_seed(0)
    vocab_size = PreparedDataset.open(data).vocab_size
    config = transformers.RobertaConfig(
        vocab_size=vocab_size, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, type_vocab_size=1, pad_token_id=0,
    )  # fmt: skip
    transformers.RobertaModel(config).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module", params=KINDS)
def exported(request, run, head_run, tmp_path_factory):
    """A run with one label added and one removed, and the directory of its export."""
    root = tmp_path_factory.mktemp(request.param)
    workdir = root / "run"
    if request.param in ("encoder", "head"):
        shutil.copytree((run if request.param == "encoder" else head_run).workdir, workdir)
    else:
        config = tiny.configuration(run.data, workdir)
        model, more = {"family": "decoder"}, {}
        if request.param == "roberta":
            model = {"pretrained": make_roberta(root / "roberta", run.data), "pooling": "cls"}
        if request.param == "adapted":
            model = {
                "pooling": "weighted_mean",
                "pretrained": tiny.make_qwen(
                    root / "qwen",
                    vocab_size=PreparedDataset.open(run.data).vocab_size,
                    hidden_size=16,
                    intermediate_size=24,
                    num_attention_heads=2,
                ),
            }
            more = {
                "lora": LoraConfig(rank=2, alpha=4.0, maps=["query", "down"]),
                "prompt": PromptConfig(text="a1", images="b1"),
            }
        config = dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, **model),
            batch=dataclasses.replace(config.batch, row_width=24),
            loop=dataclasses.replace(config.loop, epochs=1),
            **more,
        )
        train.train(config)
    predictor = Predictor.load(str(workdir), warm=False)
    artifacts = predictor.artifacts
    new = np.eye(1, predictor.label_width, dtype=np.float32)
    label_updates.remove(str(workdir), artifacts, [artifacts.ids[4]])
    label_updates.add(str(workdir), artifacts, ["new"], ["a new one"], new)
    predictor.refresh()
    printed = tiny.run_command("export", f"--workdir={workdir}", f"--out={root / 'out'}")
    assert f"20 labels exported: {root / 'out'} (README.md, export.json" in printed
    return predictor, root / "out"


def random_texts(rng, count):
    words = [f"{stem}{n}" for stem in "ab" for n in range(10)]
    return [" ".join(rng.choice(words, rng.integers(1, 6))) for _ in range(count)]


def test_transformers_computes_the_same_vectors(exported):
    predictor, out = exported
    about = json.loads((out / "export.json").read_text())
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(out / "tower")
    tower = transformers.AutoModel.from_pretrained(out / "tower").eval()
    texts = random_texts(np.random.default_rng(), 12)
    first, last = about["trimmed"]
    for text, expected in zip(texts, predictor.encode(texts), strict=True):
        ids = tokenizer(text, truncation=True)["input_ids"]
        ids = about["before"] + ids[first : len(ids) - last] + about["after"]
        with torch.no_grad():
            states = tower(torch.tensor([ids])).last_hidden_state[0].numpy()
        ranks = np.arange(1, len(ids) + 1)
        weights = {"mean": ranks * 0 + 1, "cls": ranks == 1, "weighted_mean": ranks}
        pooled = weights[about["pooling"]] @ states
        np.testing.assert_allclose(pooled / np.linalg.norm(pooled), expected, atol=1e-4)


def test_the_program_computes_the_same_vectors_with_only_jax_installed(exported, tmp_path):
    predictor, out = exported
    texts = random_texts(np.random.default_rng(), 9)
    ids, mask = exporting.rows_of(predictor, texts)
    np.savez(tmp_path / "given.npz", ids=ids, mask=mask)
    files = [str(path) for path in (out / "tower.stablehlo", tmp_path / "given.npz")]
    command = [sys.executable, "-c", READ_BACK, *files, str(tmp_path / "found.npy")]
    subprocess.run(command, check=True, cwd=tmp_path)
    found = np.load(tmp_path / "found.npy")
    expected = predictor.query_vectors(predictor.queries(texts))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    scores = found.astype(np.float64) @ np.load(out / "labels.npy").T
    names = pq.read_table(out / "labels.parquet")["id"].to_pylist()
    if predictor.fusion is not None:
        scores = scipy.special.softmax(scores, axis=1)
    predictor.mixing = None
    for row, predictions in zip(scores, predictor(texts, k=20), strict=True):
        of_name = dict(zip(names, row, strict=True))
        assert len(predictions) == 20
        for label in predictions:
            assert label.score == pytest.approx(of_name[label.id], abs=1e-4)


def test_exported_labels_are_the_searched_ones(exported):
    predictor, out = exported
    vectors, table = np.load(out / "labels.npy"), pq.read_table(out / "labels.parquet")
    ids, texts = table["id"].to_pylist(), table["text"].to_pylist()
    np.testing.assert_array_equal(np.stack(table["vector"].to_numpy()), vectors)
    assert len(ids) == len(set(ids)) == 20 and "new" in ids
    assert predictor.artifacts.ids[4] not in ids
    rows = np.array([predictor.row_of(name) for name in ids])
    assert [predictor.label(row) for row in rows] == list(zip(ids, texts, strict=True))
    np.testing.assert_array_equal(vectors, predictor.label_vectors(rows))
    if predictor.fusion is None:
        # Vectors of an untrained tower are nearly equal: another label may be as good as itself.
        best = predictor.label_vectors(predictor.search(Queries(vectors), 1).ids[:, 0])
        np.testing.assert_allclose(np.sum(best * vectors, axis=1), 1.0, atol=2e-6)


def test_the_code_of_the_readme_computes_the_scores_of_the_run(exported, tmp_path):
    predictor, out = exported
    readme = (out / "README.md").read_text()
    code = "\n".join(line[4:] for line in readme.splitlines() if line.startswith("    "))
    code += "\nassert scores.shape == (1, 20), scores.shape"
    has_head = predictor.fusion is not None
    code += (
        f"\nnp.save({str(tmp_path / 'scores.npy')!r}, {'probabilities' if has_head else 'scores'})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=out)
    ids = pq.read_table(out / "labels.parquet")["id"].to_pylist()
    found = dict(zip(ids, np.load(tmp_path / "scores.npy")[0], strict=True))
    predictor.mixing = None
    for label in predictor(["a query"], k=20)[0]:
        assert label.score == pytest.approx(found[label.id], abs=1e-4)
    assert has_head == (out / "head.npz").exists()


@pytest.mark.parametrize(
    "exported",
    ["head", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[:3]), KINDS[4]],
    indirect=True,
)
def test_first_columns_and_8_bits(exported, tmp_path):
    """The code of the README computes the scores of a predictor of this width, also from int8."""
    whole, _ = exported
    out = tmp_path / "out"
    flags = "--search.width=8", "--search.dtype=int8"
    tiny.run_command("export", f"--workdir={whole.workdir}", f"--out={out}", *flags)
    predictor = Predictor.load(
        whole.workdir, search_config=SearchConfig(width=8), with_neighbours=False, warm=False
    )
    readme = (out / "README.md").read_text()
    assert "only the first 8 numbers" in readme
    lines = [line[4:] for line in readme.splitlines() if line.startswith("    ")]
    at = next(i for i, line in enumerate(lines) if line.startswith("int8 = "))
    left = "fused" if predictor.fusion is not None else "query"
    code = [*lines, f"again = {left}.numpy() @ labels.T"]
    assert at > 0
    code.append(f"np.savez({str(tmp_path / 'scores.npz')!r}, scores=scores, again=again)")
    subprocess.run([sys.executable, "-c", "\n".join(code)], check=True, cwd=out)
    found = np.load(tmp_path / "scores.npz")
    ids = pq.read_table(out / "labels.parquet")["id"].to_pylist()
    rows = np.array([predictor.row_of(name) for name in ids])
    vectors = predictor.prefix.labels(predictor.label_vectors(rows))
    np.testing.assert_array_equal(np.load(out / "labels.npy"), vectors)
    queries = predictor.query_vectors(predictor.queries(["a query"]))
    expected = predictor.prefix.queries(queries) @ vectors.T
    np.testing.assert_allclose(found["scores"], expected, atol=3e-4)
    np.testing.assert_allclose(found["again"], expected, atol=0.02 * np.abs(expected).max() + 0.01)
    best = predictor(["a query"], k=1)[0][0]
    assert best.id == ids[np.argmax(expected[0])]


def test_sentence_transformers_reads_the_pooling(exported):
    predictor, out = exported
    if not (out / "tower" / "modules.json").exists():
        assert not hasattr(predictor.model.tower.config, "type_vocab_size")  # A decoder.
        return
    model = sentence_transformers.SentenceTransformer(str(out / "tower"), device="cpu")
    texts = random_texts(np.random.default_rng(), 5)
    np.testing.assert_allclose(model.encode(texts), predictor.encode(texts), atol=1e-4)
    kind = predictor.model.tower.config.pooling
    assert hf_checkpoints.read_pooling(str(out / "tower")).kind == kind


def test_the_image_projection_is_exported(exported):
    predictor, out = exported
    found = np.load(out / "image_projection.npz")
    assert found["kernel"].shape == (12, predictor.model.tower.config.width)


def test_wrong_flags_are_refused(run, tmp_path):
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "mine.txt").write_text("mine")
    error = tiny.run_command("export", f"--workdir={run.workdir}", f"--out={occupied}", status=2)
    assert error.count("\n") == 1 and "exists and is not an export of a run" in error
    assert (occupied / "mine.txt").read_text() == "mine"
    out = tmp_path / "out"
    error = tiny.run_command(
        "export", f"--workdir={run.workdir}", f"--out={out}", "--like=/nowhere", status=2
    )
    assert error.count("\n") == 1 and "/nowhere" in error and not out.exists()


def test_a_program_that_differs_is_not_written(run, predictor, tmp_path):
    from vixml_jax.errors import InputError

    tower = exporting.host_tower(predictor.model, predictor.params)
    tower = {**tower, "word_embeddings": tower["word_embeddings"][::-1]}
    with pytest.raises(InputError, match="differ from those of the run by"):
        exporting.write_program(str(tmp_path / "x"), predictor, tower, ["a1 b2", "a3"])
    assert not (tmp_path / "x").exists()


def test_tolerance_follows_the_precision_of_products():
    """Entries of products whose factors were rounded as the device rounds them stay within it."""
    rng = np.random.default_rng()
    factors = rng.normal(size=(64, 384)), rng.normal(size=(384, 384)) / np.sqrt(384)

    def unit(bits):
        def rounded(x):
            mantissa, exponent = np.frexp(x)
            return np.ldexp(np.round(mantissa * 2.0**bits) / 2.0**bits, exponent)

        product = rounded(factors[0]) @ rounded(factors[1])
        return product / np.linalg.norm(product, axis=1, keepdims=True)

    significant = {
        ("cpu", "default", "float32"): 24,
        ("gpu", "highest", "float32"): 24,
        ("gpu", "default", "float32"): 11,
        ("tpu", "default", "float32"): 8,
        ("cpu", "default", "bfloat16"): 8,
    }
    for setting, bits in significant.items():
        tolerance = exporting.tolerance_of(*setting)
        assert np.abs(unit(bits) - unit(52)).max() < tolerance
        if bits < 24:  # A tower has many products, so the rounding of one is not much below.
            assert np.abs(unit(bits) - unit(52)).max() > tolerance / 100
