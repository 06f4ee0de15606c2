"""The built-in data set: characters that DejaVu fonts draw, and the words of their Unicode names.

Everything comes with Python and matplotlib's wheel; nothing is downloaded.
"""

import os
import unicodedata
from collections import Counter

import numpy as np
from jaxtyping import Float16
from scipy import sparse

from vixml_jax.data.images.image_files import RawImages
from vixml_jax.data.sources.raw import RawDataset, RawItems, RawQueries, canonical

FONTS = (
    "DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "DejaVuSans-Bold", "DejaVuSans-Oblique",
)  # fmt: skip
SIDE = 32  # Pixels of a picture, each way.
MAX_PICTURES = 3
_FONT_SIZE = 20
_TRAIN_SHARE = 0.8
_MIN_QUERIES = 2  # Training queries that a label needs.
_MAX_SHARE = 0.05  # Of the training queries that may have a label.

# https://www.unicode.org/reports/tr44/#General_Category_Values
_CATEGORIES = {
    "Lu": "uppercase letter", "Ll": "lowercase letter", "Lt": "titlecase letter",
    "Lm": "modifier letter", "Lo": "other letter",
    "Mn": "nonspacing mark", "Mc": "spacing mark", "Me": "enclosing mark",
    "Nd": "decimal number", "Nl": "letter number", "No": "other number",
    "Pc": "connector punctuation", "Pd": "dash punctuation", "Ps": "open punctuation",
    "Pe": "close punctuation", "Pi": "initial punctuation", "Pf": "final punctuation",
    "Po": "other punctuation",
    "Sm": "math symbol", "Sc": "currency symbol", "Sk": "modifier symbol", "So": "other symbol",
    "Zs": "space separator", "Zl": "line separator", "Zp": "paragraph separator",
    "Cc": "control", "Cf": "format", "Cs": "surrogate", "Co": "private use", "Cn": "unassigned",
}  # fmt: skip


def make(seed: int = 0) -> RawDataset:
    """Characters as queries, the words of their names as labels, the same for the same seed.

    A query's text is the first word of the name and the category ("latin lowercase letter"), its
    pictures are up to three renderings of 32 x 32 pixels in different fonts. Labels are the other
    words of the name, if at least two training characters have them and no more than 5 % do; they
    have no pictures. Characters that are left without a label ("SPACE") are no queries.

    Args:
      seed: Of the split, 80 % of the characters to training.
    """
    import matplotlib
    import PIL

    fonts = _font_paths()
    drawn_by = _characters(fonts)
    characters = sorted(drawn_by)
    order = np.random.default_rng(seed).permutation(len(characters))
    cut = round(_TRAIN_SHARE * len(characters))
    train, test = order[:cut], order[cut:]

    words = [unicodedata.name(character).lower().split() for character in characters]
    texts = [
        f"{word[0]} {_CATEGORIES[unicodedata.category(character)]}"
        for word, character in zip(words, characters, strict=True)
    ]
    counts = Counter(word for row in train for word in set(words[row][1:]))
    most = _MAX_SHARE * len(train)
    labels = sorted(word for word, count in counts.items() if _MIN_QUERIES <= count <= most)
    column = {word: at for at, word in enumerate(labels)}
    relevance = _relevance(
        [{column[word] for word in row[1:] if word in column} for row in words], len(labels)
    )
    labelled = np.diff(relevance.indptr) > 0
    train, test = train[labelled[train]], test[labelled[test]]

    pixels, present = _render(characters, drawn_by, fonts)
    # The mean over all training pictures, so that a picture says how it differs from them.
    mean = pixels[train][present[train]].mean(axis=0, dtype=np.float64).astype(np.float32)
    embeddings = _normalise(pixels, present, mean)

    def queries(rows: np.ndarray) -> RawQueries:
        raw = RawImages(embeddings[rows], present[rows], "glyphs")
        items = RawItems(len(rows), lambda: [[texts[row] for row in rows]], raw)
        return RawQueries(items, canonical(relevance[rows]), filter=np.zeros((0, 2), np.int64))

    return RawDataset(
        name="glyphs",
        fingerprint={
            "path": "glyphs",
            "seed": seed,
            "unicode": unicodedata.unidata_version,
            "matplotlib": matplotlib.__version__,
            "pillow": PIL.__version__,
        },
        labels=RawItems(len(labels), lambda: [labels]),
        train=queries(train),
        test=queries(test),
    )


def _font_paths() -> list[str]:
    import matplotlib

    directory = os.path.join(matplotlib.get_data_path(), "fonts", "ttf")
    return [os.path.join(directory, f"{name}.ttf") for name in FONTS]


def _characters(fonts: list[str]) -> dict[str, list[int]]:
    """The fonts that draw each named character."""
    from fontTools.ttLib import TTFont

    drawn_by: dict[str, list[int]] = {}
    for number, path in enumerate(fonts):
        with TTFont(path, lazy=True) as font:
            for code in font.getBestCmap():
                if unicodedata.name(chr(code), ""):  # Unnamed: control, private, newer Unicode.
                    drawn_by.setdefault(chr(code), []).append(number)
    return drawn_by


def _relevance(rows: list[set[int]], columns: int) -> sparse.csr_matrix:
    indptr = np.cumsum([0, *map(len, rows)])
    indices = np.array([label for row in rows for label in sorted(row)], np.int32)
    matrix = sparse.csr_matrix(
        (np.ones(len(indices), np.float32), indices, indptr.astype(np.int32)),
        shape=(len(rows), columns),
    )
    matrix.has_canonical_format = True
    return matrix


def _render(
    characters: list[str], drawn_by: dict[str, list[int]], fonts: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 [n, 3, 1024] and which pictures there are; a blank one is none."""
    from PIL import Image, ImageDraw, ImageFont

    # Layout.BASIC: raqm fails on combining marks that stand alone.
    loaded = [
        ImageFont.truetype(path, _FONT_SIZE, layout_engine=ImageFont.Layout.BASIC) for path in fonts
    ]
    pixels = np.zeros((len(characters), MAX_PICTURES, SIDE * SIDE), np.uint8)
    for row, character in enumerate(characters):
        for slot, number in enumerate(drawn_by[character][:MAX_PICTURES]):
            picture = Image.new("L", (SIDE, SIDE))
            left, top, right, bottom = loaded[number].getbbox(character)
            corner = ((SIDE - left - right) / 2, (SIDE - top - bottom) / 2)
            ImageDraw.Draw(picture).text(corner, character, fill=255, font=loaded[number])
            pixels[row, slot] = np.asarray(picture).reshape(-1)
    return pixels, pixels.any(axis=2)


def _normalise(
    pixels: np.ndarray, present: np.ndarray, mean: np.ndarray
) -> Float16[np.ndarray, "n i v"]:
    """Pixels less their mean, at unit length; zero where there is no picture."""
    centred = pixels.astype(np.float32) - mean
    length = np.linalg.norm(centred, axis=2, keepdims=True)
    return np.where(present[:, :, None], centred / length, 0.0).astype(np.float16)
