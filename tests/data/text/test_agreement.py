"""Data that were tokenized for another model than the one trained on them are refused."""

import json
import re
import shlex

import pytest
import tokenizers
from absl import flags

from vixml_jax import prepare
from vixml_jax.data import prepare_line
from vixml_jax.data.store import PreparedDataset
from vixml_jax.data.text import agreement
from vixml_jax.errors import InputError

WORDS = "red green blue wool silk scarf hat glove coat Sock".split()


def write_tokenizer(directory, words, *, lowercase=False, frame=True, **changes):
    """Writes a tokenizer of whole words, numbered in the given order after the special tokens."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    ids = {word: number for number, word in enumerate([*special, *words])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if lowercase:
        made.normalizer = tokenizers.normalizers.Lowercase()
    if frame:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    if changes.pop("truncates", False):
        made.enable_truncation(3)
        made.enable_padding(length=7)
    if changes.pop("adds_token", False):
        made.add_tokens(["<unused>"])
    directory.mkdir(parents=True, exist_ok=True)
    made.save(str(directory / "tokenizer.json"))
    return str(directory)


def prepared(tmp_path, *arguments):
    """Prepares a table by the command, with a test split in order; returns the data set."""
    rows = [f"{a} {b},{b},train" for a in WORDS[:3] for b in WORDS[3:9]]
    rows += [f"{word} hat,hat,test" for word in WORDS]
    table = tmp_path / "my shop.csv"
    table.write_text("\n".join(["title,tags,split", *rows]))
    run(f"--source={table}", f"--out={tmp_path / 'data'}", *arguments)
    return PreparedDataset.open(str(tmp_path / "data"))


def run(*arguments):
    values = flags.FlagValues()
    prepare.define_flags(values)
    values(["prepare", *arguments])
    prepare.run(values)


def test_command_in_the_message_mends_it(tmp_path):
    model = write_tokenizer(tmp_path / "model", WORDS)
    dataset = prepared(tmp_path, "--max_tokens=9", "--text={title} {tags}", "--nodry_run")
    assert dataset.info["settings"]["tokenizer"] == "train"
    with pytest.raises(InputError, match="was not tokenized by the tokenizer of --model") as caught:
        agreement.check(dataset, model)
    assert "\n" not in str(caught.value)
    command = re.search(r"python -m vixml_jax\.prepare .*", str(caught.value))[0]
    words = shlex.split(command)
    assert "--text={title} {tags}" in words and "--max_tokens=9" in words
    run(*words[3:])
    mended = PreparedDataset.open(dataset.path)
    agreement.check(mended, model)
    assert list(mended.train.texts) == list(dataset.train.texts)
    assert mended.max_tokens == 9 and mended.train.texts[0] == "red wool wool"


@pytest.mark.parametrize(
    "changes",
    [
        {"words": WORDS[::-1]},  # As many rows: no id is beyond those of the model.
        {"words": WORDS[:-1]},  # Another id for a word of the last test query alone.
        {"lowercase": True},  # "Sock" of the last test query is unknown.
        {"frame": False},
    ],
    ids=["order", "last row", "case", "frame"],
)
def test_one_other_token_is_refused(tmp_path, changes):
    model = write_tokenizer(tmp_path / "model", **{"words": WORDS, **changes})
    own = write_tokenizer(tmp_path / "own", WORDS)
    dataset = prepared(tmp_path, f"--tokenizer={own}")
    with pytest.raises(InputError, match=f"--tokenizer={model} --overwrite"):
        agreement.check(dataset, model)
    agreement.check(dataset, own)


@pytest.mark.parametrize(
    "changes", [{"truncates": True}, {"adds_token": True}, {"words": [*WORDS, "more"]}], ids=str
)
def test_tokenizers_that_give_the_same_tokens_agree(tmp_path, changes):
    own = write_tokenizer(tmp_path / "own", WORDS)
    model = write_tokenizer(tmp_path / "model", **{"words": WORDS, **changes})
    agreement.check(prepared(tmp_path, f"--tokenizer={own}"), model)


def test_early_sentence_transformers_have_the_tokenizer_below(tmp_path):
    model = tmp_path / "model"
    write_tokenizer(model / "0_Transformer", WORDS)
    modules = [{"path": "0_Transformer", "type": "sentence_transformers.models.Transformer"}]
    (model / "modules.json").write_text(json.dumps(modules))
    dataset = prepared(tmp_path, f"--tokenizer={model}")
    assert dataset.vocab_size == 4 + len(WORDS)
    agreement.check(dataset, str(model))


def test_a_model_without_a_tokenizer_is_told_and_cannot_prepare(tmp_path, capsys):
    """`transformers` makes a tokenizer without words of it; all texts would be unknown words."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": 99}))
    dataset = prepared(tmp_path)
    capsys.readouterr()
    agreement.check(dataset, str(model))
    said = capsys.readouterr().out
    assert said.startswith(f"warning: --model.pretrained={model} comes without a tokenizer")
    with pytest.raises(InputError, match="a model without a tokenizer"):
        run("--source=glyphs", f"--out={tmp_path / 'other'}", f"--tokenizer={model}")


def test_command_for_data_of_earlier_versions():
    """They do not keep the flags that were given, but what these led to."""
    settings = {
        "tokenizer": "train", "max_tokens": 32, "encoding": "utf-8", "vocab_size": 8192,
        "propensity_a": 0.6, "propensity_b": 2.6, "valid": 0.1, "test": 0.2,
        "split_by": "random", "filters": "auto", "seed": 0,
        "images": "org/siglip, aspect kept",
        "source": {
            "path": "/raw/shop.csv", "files": {},
            "columns": {"id": "", "text": "{a} by {b}", "labels": "tags", "labels_are": "auto"},
        },
    }  # fmt: skip
    command = prepare_line.again({"settings": settings}, "data/shop", tokenizer="org/model")
    assert command == (
        "python -m vixml_jax.prepare --source=/raw/shop.csv --max_tokens=32 --encoding=utf-8 "
        "--valid=0.1 --test=0.2 --split_by=random --propensity_a=0.6 --propensity_b=2.6 --seed=0 "
        "'--text={a} by {b}' --labels_column=tags --images=org/siglip --keep_aspect=true "
        "--out=data/shop --tokenizer=org/model --overwrite"
    )
