"""The door that prepares data: `python -m vixml_jax.prepare --source=DIR --out=DIR`."""

from collections.abc import Sequence

from absl import flags

from vixml_jax import errors
from vixml_jax.data import preparation
from vixml_jax.errors import InputError


def main(argv: Sequence[str]) -> None:
    del argv
    values = flags.FLAGS
    for name in ("source", "out"):
        if not values[name].value:
            raise InputError(f"--{name}: missing")
    dataset = preparation.prepare(
        values.source,
        values.out,
        tokenizer=values.tokenizer,
        max_tokens=values.max_tokens,
        encoding=values.encoding,
        vocab_size=values.vocab_size,
        propensity_a=values.propensity_a,
        propensity_b=values.propensity_b,
        seed=values.seed,
        overwrite=values.overwrite,
    )
    print(preparation.describe(dataset))


def define_flags() -> None:
    """The flags of this door."""
    flags.DEFINE_string(
        "source", "", "Directory in the XML repository's layout, or 'glyphs', the built-in data."
    )
    flags.DEFINE_string("out", "", "Directory to be made; it appears whole or not at all.")
    flags.DEFINE_string(
        "tokenizer",
        "train",
        "Directory or Hugging Face name of a fast tokenizer; 'train': one is trained on the "
        "training queries and labels, for a tower from scratch.",
    )
    flags.DEFINE_integer("max_tokens", 32, "Tokens of a text at most, special ones included.")
    flags.DEFINE_enum(
        "encoding", "utf-8", list(preparation.ENCODINGS), "What the source's texts are encoded in."
    )
    flags.DEFINE_integer("vocab_size", 8192, "Tokens at most of a tokenizer that is trained.")
    flags.DEFINE_float("propensity_a", 0.6, "A of the inverse propensities, for sampling and PSP.")
    flags.DEFINE_float("propensity_b", 2.6, "B of the inverse propensities.")
    flags.DEFINE_integer("seed", 0, "Splits 'glyphs' into training and test.")
    flags.DEFINE_boolean("overwrite", False, "Replace a prepared data set in --out.")


if __name__ == "__main__":
    define_flags()
    errors.launch(main)
