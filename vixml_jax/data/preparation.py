"""The recipe of prepare: a source is read, checked, tokenised and written, a chunk at a time."""

import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Int
from scipy import sparse

from vixml_jax.data import formats, glyphs, store, tokenize
from vixml_jax.data.formats import RawDataset, RawItems
from vixml_jax.data.store import PreparedDataset, Writer
from vixml_jax.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

GLYPHS = "glyphs"
ENCODINGS = ("utf-8", "latin-1")
MIN_VOCAB_SIZE = 64


def prepare(
    source: str,
    out: str,
    *,
    tokenizer: str,
    max_tokens: int,
    encoding: str = "utf-8",
    vocab_size: int = 8192,
    propensity_a: float = 0.6,
    propensity_b: float = 2.6,
    seed: int = 0,
    overwrite: bool = False,
    find_images: formats.FindImages | None = None,
    images: str = "",
) -> PreparedDataset:
    """Prepares a data set and opens it; one that is there already, of the same settings, is kept.

    Args:
      source: A directory in the XML repository's layout, or 'glyphs'.
      out: Directory to be made.
      tokenizer: A directory, a name on the Hugging Face hub, or 'train': one is trained on the
        texts of the training queries and the labels.
      max_tokens: Tokens of an item at most, special ones included.
      encoding: Of the source's texts, 'utf-8' or 'latin-1'.
      vocab_size: Of a tokenizer that is trained.
      propensity_a, propensity_b: Constants of inverse propensity, for sampling and for PSP.
      seed: Of the split of 'glyphs'.
      overwrite: Whether a prepared data set in `out` is made anew.
      find_images: Where pictures come from, if not as embeddings beside the texts,
      images: and a name for it that `dataset.json` keeps.

    Raises:
      InputError: If the source or a setting is at fault, or `out` holds something else.
    """
    _check_settings(encoding, vocab_size, max_tokens, propensity_a, propensity_b, seed)
    raw = read_source(source, encoding=encoding, seed=seed, find_images=find_images)
    settings = {
        "source": raw.fingerprint,
        "tokenizer": os.path.abspath(tokenizer) if os.path.isdir(tokenizer) else tokenizer,
        "encoding": encoding,
        "vocab_size": vocab_size if tokenizer == tokenize.TRAIN else None,
        "max_tokens": max_tokens,
        "propensity_a": propensity_a,
        "propensity_b": propensity_b,
        "images": images,
    }
    if not overwrite and os.path.isfile(os.path.join(out, store.INFO)):
        return _reuse(out, settings)
    with store.write(out, overwrite=overwrite) as writer:
        kept = np.diff(raw.train_relevance.indptr) > 0
        if not kept.any():
            raise InputError(f"--source={source}: no training query has a label")
        rows = {
            "train": np.flatnonzero(kept),
            "test": np.arange(raw.test.count),
            "labels": np.arange(raw.labels.count),
        }
        fast = _make_tokenizer(tokenizer, raw, kept, vocab_size, max_tokens)
        counts = {
            split: _write_items(writer, split, getattr(raw, split), rows[split], fast)
            for split in store.SPLITS
        }
        relevance = {"train": raw.train_relevance[kept], "test": raw.test_relevance}
        filters = {"train": _renumber(raw.train_filter, kept), "test": raw.test_filter}
        for split in ("train", "test"):
            writer.add_relevance(split, relevance[split])
            writer.add(f"{split}_filter", filters[split])
        info = _describe_content(raw, kept, counts, relevance, filters)
        settled = {
            "vocab_size": tokenize.vocab_size(fast),
            "max_tokens": max_tokens,
            "propensity_a": propensity_a,
            "propensity_b": propensity_b,
            "settings": settings,
        }
        writer.finish(info | settled, fast.to_str())
    return PreparedDataset.open(out)


def _describe_content(
    raw: RawDataset,
    kept: Bool[np.ndarray, " n"],
    counts: dict[str, dict[str, int]],
    relevance: dict[str, sparse.csr_matrix],
    filters: dict[str, Int[np.ndarray, "f 2"]],
) -> dict[str, Any]:
    """Sizes for `dataset.json`."""
    pictures = [items.images for items in (raw.train, raw.test, raw.labels)]
    widths = [images.width for images in pictures if images is not None]
    return {
        "name": raw.name,
        "num_train": counts["train"]["items"],
        "num_test": counts["test"]["items"],
        "num_labels": counts["labels"]["items"],
        "image_width": widths[0] if widths else 0,  # All are equal.
        "train_without_labels_dropped": int(np.count_nonzero(~kept)),
        "test_without_labels_kept": int(np.sum(np.diff(raw.test_relevance.indptr) == 0)),
        "counts": counts,
        "relevant_pairs": {split: matrix.nnz for split, matrix in relevance.items()},
        "filter_pairs": {split: len(pairs) for split, pairs in filters.items()},
    }


def read_source(
    source: str,
    *,
    encoding: str = "utf-8",
    seed: int = 0,
    find_images: formats.FindImages | None = None,
) -> RawDataset:
    """The data set of a directory, or the built-in one.

    Raises:
      InputError: If the source is at fault.
    """
    if source == GLYPHS:
        return glyphs.make(seed)
    found = {} if find_images is None else {"find_images": find_images}
    return formats.read_xml_repository(source, encoding=encoding, **found)


def _check_settings(
    encoding: str, vocab_size: int, max_tokens: int, a: float, b: float, seed: int
) -> None:
    if encoding not in ENCODINGS:
        raise InputError(f"--encoding={encoding}: expected one of {', '.join(ENCODINGS)}")
    for name, value, least in (
        ("vocab_size", vocab_size, MIN_VOCAB_SIZE),
        ("max_tokens", max_tokens, 1),
        ("seed", seed, 0),
    ):
        if value < least:
            raise InputError(f"--{name}={value}: expected at least {least}")
    for name, value in (("a", a), ("b", b)):
        if not 0.0 <= value < np.inf:
            raise InputError(f"--propensity_{name}={value}: expected a finite number, not negative")


def _reuse(out: str, settings: dict[str, Any]) -> PreparedDataset:
    """Opens what is there if it was prepared from the same source by the same settings."""
    found = store.read_info(out).get("settings", {})
    changed = sorted(key for key in settings if found.get(key) != settings[key])
    if changed:
        raise InputError(
            f"--out={out}: holds a data set prepared otherwise (other {', '.join(changed)}); "
            "--overwrite replaces it, or choose another directory"
        )
    print(
        f"{out}: prepared already from the same source by the same settings, and kept as it is "
        "(--overwrite prepares it anew)"
    )
    return PreparedDataset.open(out)


def _make_tokenizer(
    name: str, raw: RawDataset, kept: Bool[np.ndarray, " n"], vocab_size: int, max_tokens: int
) -> "Tokenizer":
    if name != tokenize.TRAIN:
        return tokenize.load(name, max_tokens)

    def texts() -> Iterator[list[str]]:
        yield from _select(raw.train.read_texts(), kept)
        yield from raw.labels.read_texts()

    return tokenize.train(texts, vocab_size=vocab_size, max_tokens=max_tokens)


def _select(chunks: Iterable[list[str]], kept: Bool[np.ndarray, " n"]) -> Iterator[list[str]]:
    """The texts that are kept."""
    start = 0
    for chunk in chunks:
        stay = kept[start : start + len(chunk)]
        start += len(chunk)
        yield (
            chunk if stay.all() else [text for text, keep in zip(chunk, stay, strict=True) if keep]
        )


def _write_items(
    writer: Writer, split: str, items: RawItems, rows: Int[np.ndarray, " r"], fast: "Tokenizer"
) -> dict[str, int]:
    """Writes texts, tokens and pictures of the rows; returns how much there is of each."""
    import tqdm

    kept = np.zeros(items.count, bool)
    kept[rows] = True
    sizes, lengths = [np.zeros(1, np.int64)], [np.zeros(1, np.int64)]
    with (
        writer.array(f"{split}_texts", np.uint8) as text_file,
        writer.array(f"{split}_tokens", np.int32) as token_file,
        tqdm.tqdm(total=len(rows), desc=f"{split} texts", unit="", delay=1, disable=None) as bar,
    ):
        for chunk in _select(items.read_texts(), kept):
            encoded = [text.encode("utf-8") for text in chunk]
            tokens, counts, _ = tokenize.encode(fast, chunk)
            text_file.append(np.frombuffer(b"".join(encoded), np.uint8))
            token_file.append(tokens)
            sizes.append(np.fromiter(map(len, encoded), np.int64, len(encoded)))
            lengths.append(counts)
            bar.update(len(chunk))
    text_offsets, token_offsets = (np.cumsum(np.concatenate(part)) for part in (sizes, lengths))
    writer.add(f"{split}_texts_offsets", text_offsets)
    writer.add(f"{split}_tokens_offsets", token_offsets)
    counts = {"items": len(rows), "tokens": int(token_offsets[-1]), "images": 0, "with_image": 0}
    if items.images is not None:
        offsets = items.images.offsets(rows)
        writer.add(f"{split}_images_offsets", offsets)
        with (
            writer.array(f"{split}_images", np.float16, (items.images.width,)) as file,
            tqdm.tqdm(
                total=int(offsets[-1]), desc=f"{split} images", unit="", delay=1, disable=None
            ) as bar,
        ):
            for block in items.images.read(rows):
                file.append(block)
                bar.update(len(block))
        counts["images"] = int(offsets[-1])
        counts["with_image"] = int(np.count_nonzero(np.diff(offsets)))
    return counts


def _renumber(
    pairs: Int[np.ndarray, "f 2"], kept: Bool[np.ndarray, " n"]
) -> Int[np.ndarray, "g 2"]:
    """Filter pairs of the queries that are kept, by their new rows."""
    pairs = pairs[kept[pairs[:, 0]]]
    return np.stack([np.cumsum(kept)[pairs[:, 0]] - 1, pairs[:, 1]], axis=1)


def describe(dataset: PreparedDataset) -> str:
    """A few lines on what was prepared and where it lies."""
    info, counts = dataset.info, dataset.info["counts"]
    lines = [
        f"{split:6} {counts[split]['items']:>11,} items {counts[split]['tokens']:>13,} tokens"
        f" {counts[split]['images']:>11,} pictures (of {counts[split]['with_image']:,} items)"
        for split in store.SPLITS
    ]
    lines.append(
        f"{info['relevant_pairs']['train'] / info['num_train']:.2f} labels a training query; "
        f"filter pairs {info['filter_pairs']['train']:,} train, {info['filter_pairs']['test']:,} "
        f"test; {info['vocab_size']:,} tokens known; pictures {info['image_width']} wide"
    )
    for key, fate in (("train", "dropped"), ("test", "kept")):
        if count := info[f"{key}_without_labels_{fate}"]:
            lines.append(f"{count:,} {key} queries without a label were {fate}")
    lines.append(f"{dataset.name}: in {os.path.abspath(dataset.path)}")
    return "\n".join(lines)
