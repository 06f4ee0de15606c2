"""One letter, one dimension, one logical axis: the vocabulary of every einsum in the package."""

# letter: (what it counts, its logical axis, or None where it is never sharded)
LETTERS = {
    "b": ("queries of a batch", "batch"),
    "c": ("candidate labels of a batch", "batch"),
    "p": ("packed rows", "batch"),
    "o": (
        "packed rows, while their width lies over the devices that share the weights",
        "looked_up",
    ),
    "s": ("positions of a row", None),
    "t": ("key positions of a row", None),
    "i": ("pictures of a batch", "batch"),
    "y": ("rows of a patch", None),
    "x": ("columns of a patch", None),
    "z": ("colours of a pixel", None),
    "j": ("query, key and value together", None),
    "v": ("width of an image embedding", None),
    "n": ("rows of the label table or of the bank", "label"),
    "f": ("free vectors", "label"),
    "q": ("search queries", None),
    "k": ("results or negatives kept", None),
    "d": ("tower width", "embed"),
    "m": ("width of the feed-forward layer", "mlp"),
    "h": ("query heads", "heads"),
    "g": ("key and value heads", "kv_heads"),
    "a": ("width of a head", None),
    "e": ("embedding width", None),
    "r": ("LoRA rank", "rank"),
    "w": ("vocabulary", "vocab"),
}


def logical(letters: str) -> tuple[str | None, ...]:
    """The logical axes of an array whose shape is spelled with `letters`."""
    return tuple(LETTERS[letter][1] for letter in letters)
