"""Hostile tokenizers: no code of theirs runs, none ends the process or takes all memory."""

import base64
import json
import os
import pathlib
import struct
import subprocess
import sys

import numpy as np
import pytest

from tests.security import mutations
from vixml_jax.data.text import batch_tokenizer
from vixml_jax.data.text import tokenizer as tokenizer_lib
from vixml_jax.errors import InputError

ROOT = pathlib.Path(__file__).parents[2]
TEXTS = ["", "a", "b a", "Ünï 漢字 \U0001f600 12, x!", "ab " * 50, "b" * 300]


def tokens(*names):
    return {name: i for i, name in enumerate(names)}


def about(**parts):
    """The content of a tokenizer.json: words by spaces, unless `parts` say otherwise."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": tokens("[UNK]", "a", "b"), "unk_token": "[UNK]"},
        **parts,
    }


def special(id, content):
    return {
        "id": id, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
        "normalized": False, "special": True,
    }  # fmt: skip


def charsmap(units, texts):
    trie = struct.pack(f"<{len(units)}I", *units)
    return base64.b64encode(struct.pack("<I", len(trie)) + trie + texts).decode()


def trie_of(byte, value):
    """A double-array trie with one key of one byte, whose leaf points at a text."""
    units = [0] * 1024
    base = 256  # Children of the root are at base ^ byte.
    units[0] = base << 10
    node = base ^ byte
    leaf = 512  # The node's children are at 512 ^ label; its leaf has label 0.
    units[node] = ((node ^ leaf) << 10) | 0x100 | byte
    units[leaf] = 0x80000000 | value
    return units


TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}},
               {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"[CLS]": {"id": "[CLS]", "ids": [3], "tokens": ["[CLS]"]}},
}  # fmt: skip
VALID = {
    "words": about(added_tokens=[special(3, "[CLS]")], post_processor=TEMPLATE),
    "word_piece": about(
        added_tokens=[special(3, "[CLS]"), special(4, "[SEP]")],
        normalizer={"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
                    "strip_accents": None, "lowercase": True},
        pre_tokenizer={"type": "BertPreTokenizer"},
        post_processor={"type": "BertProcessing", "sep": ["[SEP]", 4], "cls": ["[CLS]", 3]},
        decoder={"type": "WordPiece", "prefix": "##", "cleanup": True},
        model={"type": "WordPiece", "vocab": tokens("[UNK]", "a", "##b", "[CLS]", "[SEP]"),
               "unk_token": "[UNK]", "continuing_subword_prefix": "##",
               "max_input_chars_per_word": 100},
    ),
    "bytes": about(
        normalizer={"type": "Sequence", "normalizers": [
            {"type": "NFC"}, {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}]},
        pre_tokenizer={"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "\\p{L}+|\\s+|[^\\p{L}\\s]+"},
             "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
             "use_regex": False}]},
        post_processor={"type": "RobertaProcessing", "sep": ["b", 1], "cls": ["Ġ", 2],
                        "trim_offsets": True, "add_prefix_space": False},
        decoder={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                 "use_regex": True},
        model={"type": "BPE", "dropout": None, "unk_token": None,
               "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
               "byte_fallback": False, "ignore_merges": False,
               "vocab": tokens("a", "b", "Ġ", "ab", "Ġab"),
               "merges": [["a", "b"], ["Ġ", "ab"]]},
    ),
    "unigram": about(
        normalizer={"type": "Sequence", "normalizers": [
            {"type": "Precompiled", "precompiled_charsmap": charsmap(trie_of(98, 2), b"x\0a\0")},
            {"type": "Prepend", "prepend": "▁"}]},
        pre_tokenizer={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always",
                       "split": True},
        model={"type": "Unigram", "unk_id": 0, "byte_fallback": False,
               "vocab": [["<unk>", 0.0], ["▁", -2.0], ["a", -3.0], ["▁a", -1.5]]},
    ),
}  # fmt: skip


def write(directory, content):
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(content))
    return str(directory)


@pytest.mark.parametrize("kind", VALID)
def test_valid_tokenizers_give_what_the_library_gives(kind, tmp_path):
    from tokenizers import Tokenizer

    name = write(tmp_path, VALID[kind])
    expected = Tokenizer.from_file(f"{name}/tokenizer.json")
    values, lengths, _ = batch_tokenizer.encode(tokenizer_lib.load(name, 600), TEXTS)
    for row, text in zip(np.split(values, np.cumsum(lengths)[:-1]), TEXTS, strict=True):
        assert row.tolist() == expected.encode(text).ids


def model(**changes):
    return about(model={**about()["model"], **changes})


def pairs(**changes):
    return about(model={**VALID["bytes"]["model"], **changes})


def normalized(*steps):
    return about(normalizer={"type": "Sequence", "normalizers": list(steps)})


def replaced(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}


def mapped(text):
    return normalized({"type": "Precompiled", "precompiled_charsmap": text})


HOSTILE = {
    "an id of 4e9": model(vocab={"[UNK]": 2**32 - 1}),
    "an id of 1e9": model(vocab={"[UNK]": 10**9}),
    "an id below zero": model(vocab={"[UNK]": -1}),
    "an added id of 1e9": about(added_tokens=[special(10**9, "x")]),
    "no words": model(vocab={}),
    "no unknown word": model(unk_token="[MASK]"),
    "a merge of absent tokens": pairs(merges=[["a", "c"]]),
    "a merge into an absent token": pairs(merges=[["b", "a"]]),
    "a prefix longer than tokens": pairs(continuing_subword_prefix="xxxxxxxxxx"),
    "a prefix within a character": pairs(
        vocab=tokens("a", "é", "aé"), merges=[["a", "é"]], continuing_subword_prefix="x"
    ),
    "random merges": pairs(dropout=0.5),
    "an unknown token that is none": about(model={**VALID["unigram"]["model"], "unk_id": 9}),
    "no unknown token": about(model={**VALID["unigram"]["model"], "unk_id": None}),
    "an empty trie": mapped(""),
    "a trie of 4 GiB": mapped("/////wAA"),
    "a trie that leads outside": mapped(charsmap([0xFFFFFF00], b"x\0")),
    "a text outside": mapped(charsmap(trie_of(98, 999), b"x\0")),
    "a text within a character": mapped(charsmap(trie_of(98, 1), "é\0".encode())),
    "a text of a megabyte": mapped(charsmap(trie_of(98, 0), b"x" * 10**6)),
    "texts 4e9 times as long": normalized(*[replaced({"String": "a"}, "a" * 16)] * 8),
    "an empty pattern": normalized(replaced({"String": ""}, "aa")),
    "no pattern": normalized(replaced({}, "aa")),
    "two patterns": normalized(replaced({"String": "a", "Regex": "b"}, "")),
    "a regular expression that is none": normalized(replaced({"Regex": "(a"}, "")),
    "endless recursion": normalized(replaced({"Regex": "(?<x>\\g<x>)"}, "")),
    "pieces of no length": about(pre_tokenizer={"type": "FixedLength", "length": 0}),
    "an unknown step": about(pre_tokenizer={"type": "Exec", "command": "id"}),
    "a template without its token": about(post_processor={**TEMPLATE, "special_tokens": {}}),
    "a template of a second text": about(post_processor={**TEMPLATE, "single": TEMPLATE["pair"]}),
    "a frame outside of the vocabulary": about(
        post_processor={"type": "BertProcessing", "sep": ["[SEP]", 10**6], "cls": ["a", 1]}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(name, tmp_path):
    with pytest.raises(InputError) as error:
        tokenizer_lib.load(write(tmp_path, HOSTILE[name]), 8)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_saved_truncation_and_padding_are_not_used(tmp_path):
    name = write(tmp_path, about(
        truncation={"direction": "Right", "max_length": 2**62, "strategy": "LongestFirst",
                    "stride": 2**61},
        padding={"strategy": {"Fixed": 2**62}, "direction": "Right", "pad_to_multiple_of": 0,
                 "pad_id": 0, "pad_type_id": 0, "pad_token": "x"},
    ))  # fmt: skip
    assert tokenizer_lib.load(name, 3).encode("a b a b a").ids == [1, 2, 1]


def test_a_slow_regular_expression_is_one_line(tmp_path):
    """The library gives up on a text by a panic."""
    content = about(pre_tokenizer={
        "type": "Split", "pattern": {"Regex": "((a+a+)+)+c"},
        "behavior": "Isolated", "invert": False,
    })  # fmt: skip
    tokenizer = tokenizer_lib.load(write(tmp_path, content), 8)
    with pytest.raises(InputError, match="the tokenizer of the texts") as error:
        batch_tokenizer.encode(tokenizer, ["a" * 60])
    assert "\n" not in str(error.value)


def test_a_model_does_not_say_its_type(tmp_path):
    """As in files of 2020, such as that of GPT-2."""
    for kind, content in VALID.items():
        untyped = {name: value for name, value in content["model"].items() if name != "type"}
        old = tokenizer_lib.load(write(tmp_path, {**content, "model": untyped}), 50)
        new = tokenizer_lib.load(write(tmp_path, content), 50)
        assert old.encode("b a ab").ids == new.encode("b a ab").ids, kind


@pytest.mark.parametrize("with_json", [True, False])
def test_code_of_a_tokenizer_is_never_run(with_json, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    mark = tmp_path / "ran"
    code = f"open({str(mark)!r}, 'w').close()\nclass Own:\n    pass\n"
    for name in ("own.py", "tokenization_own.py", "__init__.py"):
        (tmp_path / name).write_text(code)
    settings = {
        "tokenizer_class": "Own",
        "auto_map": {"AutoTokenizer": ["own.Own", None]},
        "chat_template": f"{{{{ ''.__class__.__mro__[1].__subclasses__() }}}}{mark}",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", **settings}))
    if with_json:
        write(tmp_path, about())
    with pytest.raises(InputError, match=r"auto_map.*never run"):
        tokenizer_lib.load(str(tmp_path), 8)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["tokenizer.model", "spiece.model", "vocab.json", "tokenizer.pkl"])
def test_other_files_of_tokenizers_are_not_read(name, tmp_path):
    (tmp_path / name).write_bytes(b"\x80\x04cos\nsystem\n(S'false'\ntR.")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(tokenizer_lib.NoTokenizerError, match="without a tokenizer"):
        tokenizer_lib.load(str(tmp_path), 8)


@pytest.mark.parametrize("path", ["../x", "/x", "a/../../x", "a\0b"])
def test_modules_stay_in_the_directory(path, tmp_path):
    write(tmp_path / "x", about())
    (tmp_path / "model").mkdir()
    modules = [{"path": path, "type": "sentence_transformers.models.Transformer"}]
    (tmp_path / "model" / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(InputError, match="outside of the directory"):
        tokenizer_lib.load(str(tmp_path / "model"), 8)


WORKER = """
import json, pathlib, resource, sys, tempfile, time
import numpy as np
from tests.security import mutations, test_tokenizers
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
seed, count = map(int, sys.argv[1:])
rng = np.random.default_rng(seed)
counts = {}
with tempfile.TemporaryDirectory() as directory:
    for n in range(count):
        print(json.dumps(n), flush=True)
        kind = sorted(test_tokenizers.VALID)[n % len(test_tokenizers.VALID)]
        start = time.process_time()
        found = test_tokenizers.outcome(rng, kind, pathlib.Path(directory))
        assert time.process_time() - start < 10, (kind, n)
        counts[found] = counts.get(found, 0) + 1
print(json.dumps(counts))
"""


def outcome(rng, kind, directory):
    """Loads a damaged tokenizer and uses it; "refused" or "read"."""
    content = json.dumps(VALID[kind], indent=1, ensure_ascii=False).encode()
    (directory / "tokenizer.json").write_bytes(mutations.damaged(rng, content))
    try:
        tokenizer = tokenizer_lib.load(str(directory), 16)
        values = batch_tokenizer.encode(tokenizer, TEXTS).values
    except InputError as error:
        assert "\n" not in str(error)
        return "refused"
    assert 0 <= values.min(initial=0) <= values.max(initial=0) < tokenizer_lib.vocab_size(tokenizer)
    return "read"


def run_worker(seed, count):
    command = [sys.executable, "-c", WORKER, str(seed), str(count)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"seed {seed}: {done.stdout[-200:]}\n{done.stderr[-3000:]}"
    counts = json.loads(done.stdout.splitlines()[-1])
    assert sum(counts.values()) == count and min(counts.values()) > count / 50, counts


def test_damaged_files_are_read_or_refused():
    run_worker(0, 600)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_many_damaged_files_are_read_or_refused(seed):
    run_worker(seed, 1000)
