"""Synthetic data sets of published sizes, in the XML repository's text layout.

    python -m vixml_jax.benchmarks.support.synthetic_data --like=lf_amazontitles_1.3m --dir=DIR

Words are drawn by Zipf's law: the frequent ones from a tokenizer's vocabulary, the others made of
syllables and numbers, and a fiftieth uniformly from a million, so that a tokenizer meets new words
throughout: 28 % are not among the 10,000 most frequent (in docstrings of Python packages: 18 %).
Few labels are frequent and most are rare. Image embeddings are random bits, which do not compress.
"""

import dataclasses
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from absl import flags
from jaxtyping import Float, Int

from vixml_jax import command_line
from vixml_jax.data.text import tokenizer as tokenizer_lib

_CHUNK = 1 << 14  # Items drawn at a time.
_MAX_WORDS = 1_000_000
_RARE = 0.02  # Fraction of words drawn uniformly.
_ONSETS = "b c d f g h j k l m n p r s t v w br ch cl dr fl gr kl pr sh st str th tr".split()
_NUCLEI = "a e i o u ai ea ee io ou".split()
_CODAS = ["", "", "", "", "n", "r", "l", "s", "t", "x", "ng", "rd", "st"]


@dataclasses.dataclass(frozen=True)
class Like:
    """Sizes of a data set.

    Attributes:
      train, test, labels: Number of items. Test queries are 1 % of training, fewer than published.
      labels_per_query: Mean.
      words, label_words: Minimum and maximum number of words of a query's and of a label's text.
      max_tokens: Length at which texts are truncated.
      images: Image embeddings per item.
      width: Of an embedding.
    """

    train: int
    test: int
    labels: int
    labels_per_query: float
    words: tuple[int, int]
    label_words: tuple[int, int]
    max_tokens: int
    images: int = 3
    width: int = 1152

    def scaled(self, scale: float) -> "Like":
        """The same with fewer items; labels per query and words per text stay."""
        sizes = {
            name: max(64, round(getattr(self, name) * scale))
            for name in ("train", "test", "labels")
        }
        return dataclasses.replace(self, **sizes)

    @property
    def items(self) -> int:
        return self.train + self.test + self.labels

    @property
    def image_bytes(self) -> int:
        return 2 * self.items * self.images * self.width

    @property
    def text_bytes(self) -> int:
        """Approximate size of all texts."""
        queries = (self.train + self.test) * sum(self.words)
        return 4 * (queries + self.labels * sum(self.label_words))  # Words have about 7 characters.

    @property
    def pairs(self) -> float:
        """Approximate number of relevant pairs."""
        return (self.train + self.test) * self.labels_per_query


LIKE = {
    "lf_amazontitles_1.3m": Like(2_248_619, 22_486, 1_305_265, 22.2, (10, 20), (10, 20), 32),
    "lf_wikipedia_500k": Like(1_813_391, 18_134, 501_070, 4.77, (100, 400), (2, 6), 256),
}


class Words(NamedTuple):
    """Forms of words, the most frequent first: lower case, capitalised, with comma, in brackets."""

    forms: list[str]  # Four per word.

    @staticmethod
    def make(count: int, tokenizer: str, rng: np.random.Generator) -> "Words":
        """Makes `count` words; first the words that are single tokens of a given tokenizer."""
        known = [] if tokenizer == tokenizer_lib.TRAIN else _single_token_words(tokenizer)
        made = _make_up(max(0, count - len(known)), rng)
        forms = []
        for word in itertools.chain(known[:count], made):
            forms += (word, word.capitalize(), f"{word},", f"({word})")
        return Words(forms)

    def texts(
        self, count: int, words: tuple[int, int], rng: np.random.Generator
    ) -> Iterator[list[str]]:
        """Yields texts in chunks."""
        num_words = len(self.forms) // 4
        num_common = -(-num_words // 10)
        for start in range(0, count, _CHUNK):
            lengths = rng.integers(words[0], words[1] + 1, min(_CHUNK, count - start))
            total = int(lengths.sum())
            ranks = zipf(num_common, rng.random(total) ** 1.5, shift=20.0)
            rare = rng.random(total) < _RARE
            ranks[rare] = rng.integers(num_words, size=int(rare.sum()))
            forms = np.searchsorted([0.6, 0.93, 0.98], rng.random(total))
            drawn = map(self.forms.__getitem__, (4 * ranks + forms).tolist())
            yield [" ".join(itertools.islice(drawn, length)) for length in lengths.tolist()]


def zipf(count: int, uniform: Float[np.ndarray, " n"], shift: float = 1.0) -> Int[np.ndarray, " n"]:
    """Ranks below `count` by Zipf's law: rank r has weight 1 / (r + shift).

    Args:
      count: Number of ranks.
      uniform: Random numbers in [0, 1).
      shift: Number of first ranks that are about equally frequent.
    """
    ranks = shift * (np.exp(uniform * np.log((count + shift) / shift)) - 1)
    return np.minimum(ranks.astype(np.int64), count - 1)


def _single_token_words(tokenizer: str) -> list[str]:
    """Words that are a single token of the tokenizer, in the order of their ids."""
    vocabulary = tokenizer_lib.load(tokenizer, 8).get_vocab()
    words = sorted((number, word) for word, number in vocabulary.items())
    return [word for _, word in words if len(word) > 1 and word.isascii() and word.isalpha()]


def _make_up(count: int, rng: np.random.Generator) -> list[str]:
    """Words of two to four syllables; a tenth are numbers or model numbers."""
    syllables = [a + b + c for a in _ONSETS for b in _NUCLEI for c in _CODAS]
    lengths = rng.integers(2, 5, count).tolist()
    drawn = map(syllables.__getitem__, rng.integers(len(syllables), size=4 * count).tolist())
    numbers = rng.integers(100_000, size=count).tolist()
    words = []
    for i, length in enumerate(lengths):
        word = "".join(itertools.islice(drawn, length))
        if i % 10 == 9:
            word = str(numbers[i]) if length < 4 else f"{word[:2].upper()}-{numbers[i]}"
        words.append(word)
    return words


def write(directory: str, like: Like, *, tokenizer: str, seed: int = 0) -> None:
    """Writes the data set in chunks.

    Args:
      directory: An existing directory.
      like: Sizes.
      tokenizer: Its single-token words are the frequent ones; 'train': all words are synthetic.
      seed: Of all random choices.
    """
    rng = np.random.default_rng(seed)
    count = min(_MAX_WORDS, 1000 + round(like.text_bytes / 7 / 8))
    words = Words.make(count, tokenizer, rng)
    tokens = [f"{label}:1" for label in range(like.labels)]
    for prefix, items, lengths in (
        ("trn", like.train, like.words),
        ("tst", like.test, like.words),
        ("lbl", like.labels, like.label_words),
    ):
        with open(os.path.join(directory, f"{prefix}.raw.txt"), "w", encoding="utf-8") as file:
            for chunk in words.texts(items, lengths, rng):
                file.write("\n".join(chunk) + "\n")
        if prefix != "lbl":
            path = os.path.join(directory, f"{prefix}_X_Y.txt")
            _write_relevance(path, items, like.labels_per_query, tokens, rng)
        if like.images:
            path = os.path.join(directory, f"{prefix}_image_embeddings.npy")
            _write_images(path, (items, like.images, like.width), rng)


def _write_relevance(
    path: str, count: int, mean: float, tokens: list[str], rng: np.random.Generator
) -> None:
    """Writes label lists of geometric length; the first labels occur some thousand times."""
    num_labels = len(tokens)
    frequent = rng.permutation(num_labels)
    with open(path, "w", encoding="ascii") as file:
        file.write(f"{count} {num_labels}\n")
        for start in range(0, count, _CHUNK):
            lengths = rng.geometric(1 / mean, min(_CHUNK, count - start))
            owner = np.repeat(np.arange(len(lengths)), lengths)
            labels = frequent[zipf(num_labels, rng.random(len(owner)), shift=1000.0)]
            owner, labels = np.divmod(np.unique(owner * num_labels + labels), num_labels)
            drawn = map(tokens.__getitem__, labels.tolist())
            for length in np.bincount(owner, minlength=len(lengths)).tolist():
                file.write(" ".join(itertools.islice(drawn, length)) + "\n")


def _write_images(path: str, shape: tuple[int, int, int], rng: np.random.Generator) -> None:
    """Writes random float16 values below 2 in magnitude."""
    with open(path, "wb") as file:
        header = {"descr": "<f2", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        left = 2 * shape[0] * shape[1] * shape[2]
        while left > 0:
            bits = rng.integers(2**64, size=1 << 20, dtype=np.uint64)
            bits &= np.uint64(0xBFFF_BFFF_BFFF_BFFF)  # Clears the top bit of the exponent.
            file.write(memoryview(bits).cast("B")[:left])
            left -= bits.nbytes


def main(argv: Sequence[str]) -> None:
    """Writes the data set."""
    del argv
    values = flags.FLAGS
    os.makedirs(values.dir, exist_ok=True)
    write(values.dir, LIKE[values.like].scaled(values.scale), tokenizer=values.tokenizer)


def define_flags() -> None:
    """The flags of this benchmark."""
    flags.DEFINE_enum("like", "lf_amazontitles_1.3m", list(LIKE), "Data set whose sizes to use.")
    flags.DEFINE_float("scale", 1.0, "Fraction of its items.", lower_bound=0.0, upper_bound=1.0)
    flags.DEFINE_string("dir", None, "Directory to write to.", required=True)
    flags.DEFINE_string(
        "tokenizer",
        tokenizer_lib.TRAIN,
        "Tokenizer whose words are the frequent ones.",
    )


if __name__ == "__main__":
    command_line.launch(main, define_flags)
