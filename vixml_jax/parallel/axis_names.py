"""Letters of the dimensions in einsums and shapes, and the logical axis of each."""

# Letter -> (what the dimension counts, its logical axis, or None if it is never sharded).
LETTERS = {
    "b": ("queries of a batch", "batch"),
    "c": ("candidate labels of a batch", "batch"),
    "p": ("packed rows", "batch"),
    "o": ("packed rows, while their width is sharded over fsdp during the lookup", "looked_up"),
    "s": ("positions of a row", None),
    "t": ("key positions of a row", None),
    "i": ("images of a batch", "batch"),
    "y": ("rows of a patch", None),
    "x": ("columns of a patch", None),
    "z": ("colours of a pixel", None),
    "j": ("query, key and value together", None),
    "l": ("buckets of the distance between positions", None),
    "u": ("activated and gating half of a feed-forward layer", None),
    "v": ("width of an image embedding", None),
    "n": ("rows of the label table or of the query bank", "label"),
    "f": ("free vectors", "label"),
    "q": ("search queries", None),
    "k": ("search results or negatives", None),
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
    """Logical axes of an array whose dimensions are spelled with `letters`."""
    return tuple(LETTERS[letter][1] for letter in letters)
