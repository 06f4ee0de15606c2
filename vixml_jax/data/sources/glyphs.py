"""The built-in data set: characters of the DejaVu fonts and the words of their Unicode names.

It is made from Python's Unicode database and the fonts in Matplotlib's wheel, without downloads.
"""

import os
import unicodedata
from collections import Counter

import numpy as np
from jaxtyping import Float16
from scipy import sparse

from vixml_jax.data.images.image_embeddings import RawImages
from vixml_jax.data.sources.raw import RawDataset, RawItems, RawQueries, canonical

FONTS = (
    "DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "DejaVuSans-Bold", "DejaVuSans-Oblique",
)  # fmt: skip
SIDE = 32  # Height and width of an image in pixels.
MAX_IMAGES = 3
_FONT_SIZE = 20
_TRAIN_FRACTION = 0.8
_MIN_QUERIES = 2  # Least number of training queries of a label.
_MAX_FRACTION = 0.05  # Largest fraction of the training queries that have the same label.

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
    """Makes a data set with characters as queries and the words of their names as labels.

    The text of a query is the first word of the name and the category ("latin lowercase letter").
    Its images are up to three renderings of 32 x 32 pixels in different fonts. Labels are the other
    words of the name that occur in at least two and at most 5 % of the training characters; they
    have no images. Characters without a label, such as "SPACE", are left out.

    Args:
      seed: Seed of the split: 80 % of the characters are used for training.
    """
    import matplotlib
    import PIL

    fonts = _font_paths()
    fonts_of = _characters(fonts)
    characters = sorted(fonts_of)
    order = np.random.default_rng(seed).permutation(len(characters))
    num_train = round(_TRAIN_FRACTION * len(characters))
    train, test = order[:num_train], order[num_train:]

    words = [unicodedata.name(character).lower().split() for character in characters]
    texts = [
        f"{name[0]} {_CATEGORIES[unicodedata.category(character)]}"
        for name, character in zip(words, characters, strict=True)
    ]
    counts = Counter(word for row in train for word in set(words[row][1:]))
    max_count = _MAX_FRACTION * len(train)
    labels = sorted(word for word, count in counts.items() if _MIN_QUERIES <= count <= max_count)
    label_id = {word: index for index, word in enumerate(labels)}
    relevance = _relevance(
        [{label_id[word] for word in name[1:] if word in label_id} for name in words], len(labels)
    )
    labelled = np.diff(relevance.indptr) > 0
    train, test = train[labelled[train]], test[labelled[test]]

    pixels, present = _render(characters, fonts_of, fonts)
    # Subtracting the mean of all training images leaves what is particular to an image.
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
    """Paths of the fonts in Matplotlib's wheel."""
    import matplotlib

    directory = os.path.join(matplotlib.get_data_path(), "fonts", "ttf")
    return [os.path.join(directory, f"{name}.ttf") for name in FONTS]


def _characters(fonts: list[str]) -> dict[str, list[int]]:
    """Each named character and the indices of the fonts that have it."""
    from fontTools.ttLib import TTFont

    fonts_of: dict[str, list[int]] = {}
    for font_index, path in enumerate(fonts):
        with TTFont(path, lazy=True) as font:
            for code in font.getBestCmap():
                # Control, private and too recent characters have no name.
                if unicodedata.name(chr(code), ""):
                    fonts_of.setdefault(chr(code), []).append(font_index)
    return fonts_of


def _relevance(rows: list[set[int]], columns: int) -> sparse.csr_matrix:
    """The relevance matrix from the label ids of each query."""
    indptr = np.cumsum([0, *map(len, rows)])
    indices = np.array([label for row in rows for label in sorted(row)], np.int32)
    matrix = sparse.csr_matrix(
        (np.ones(len(indices), np.float32), indices, indptr.astype(np.int32)),
        shape=(len(rows), columns),
    )
    matrix.has_canonical_format = True
    return matrix


def _render(
    characters: list[str], fonts_of: dict[str, list[int]], fonts: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels, uint8 [n, 3, 1024], and a mask [n, 3] of the images that are not blank."""
    from PIL import Image, ImageDraw, ImageFont

    # Layout.BASIC, because raqm fails on a combining mark without a base character.
    loaded = [
        ImageFont.truetype(path, _FONT_SIZE, layout_engine=ImageFont.Layout.BASIC) for path in fonts
    ]
    pixels = np.zeros((len(characters), MAX_IMAGES, SIDE * SIDE), np.uint8)
    for row, character in enumerate(characters):
        for slot, font_index in enumerate(fonts_of[character][:MAX_IMAGES]):
            image = Image.new("L", (SIDE, SIDE))
            left, top, right, bottom = loaded[font_index].getbbox(character)
            corner = ((SIDE - left - right) / 2, (SIDE - top - bottom) / 2)
            ImageDraw.Draw(image).text(corner, character, fill=255, font=loaded[font_index])
            pixels[row, slot] = np.asarray(image).reshape(-1)
    return pixels, pixels.any(axis=2)


def _normalise(
    pixels: np.ndarray, present: np.ndarray, mean: np.ndarray
) -> Float16[np.ndarray, "n i v"]:
    """Pixels minus their mean, scaled to unit length; zeros where there is no image."""
    centred = pixels.astype(np.float32) - mean
    length = np.linalg.norm(centred, axis=2, keepdims=True)
    return np.where(present[:, :, None], centred / length, 0.0).astype(np.float16)
