"""The door that prepares data: `python -m vixml_jax.prepare --source=DIR --out=DIR`."""

import dataclasses
import functools
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags

from vixml_jax import errors
from vixml_jax.data import images, preparation
from vixml_jax.errors import InputError


def main(argv: Sequence[str]) -> None:
    del argv
    values = flags.FLAGS
    for name in ("source", "out"):
        if not values[name].value:
            raise InputError(f"--{name}: missing")
    pictures = {}
    if values.images:
        if values.source == preparation.GLYPHS:
            raise InputError("--images: 'glyphs' has its pictures already")
        named = [f"{prefix}_images.txt" for prefix in ("trn", "tst", "lbl")]
        if not any(os.path.exists(os.path.join(values.source, name)) for name in named):
            raise InputError(f"--source={values.source}: has none of {', '.join(named)}")
        pictures = {
            "find_images": ImageFinder(
                values.images,
                os.path.normpath(values.out) + ".images",
                keep_aspect=values.keep_aspect,
                batch=values.image_batch,
                dtype=values.image_dtype,
            ),
            "images": f"{values.images}, {'aspect kept' if values.keep_aspect else 'stretched'}",
        }
    settings = preparation.Settings(
        **{
            field.name: values[field.name].value
            for field in dataclasses.fields(preparation.Settings)
        }
    )
    raw = preparation.read_source(
        values.source,
        encoding=values.encoding,
        seed=values.seed,
        find_images=pictures.get("find_images"),
    )
    dataset = preparation.prepare(
        raw,
        values.out,
        settings,
        images=pictures.get("images", ""),
        overwrite=values.overwrite,
    )
    print(preparation.describe(dataset))
    if pictures:
        print(pictures["find_images"].describe())


class ImageFinder:
    """Embeds the image files that a source names, as `--images` says; resumes where it stopped."""

    def __init__(self, model: str, directory: str, *, keep_aspect: bool, batch: int, dtype: str):
        self._model, self._directory = model, directory
        self._keep_aspect, self._batch, self._dtype = keep_aspect, batch, dtype
        self._broken: list[str] = []
        self._named = 0

    @functools.cached_property
    def _tower(self) -> tuple[Any, ...]:
        """Vision tower, parameters, image processor and store; loaded where a file is named."""
        from vixml_jax.models import hf
        from vixml_jax.models.siglip import VisionTower

        where = hf.resolve(self._model)
        config, params = hf.load_hf_vision(where, dtype=self._dtype)
        processor = images.read_processor(os.path.join(where, "preprocessor_config.json"))
        if (processor.height, processor.width) != (config.image_size,) * 2:
            raise InputError(
                f"--images={self._model}: pictures of {processor.height} x {processor.width} for "
                f"a model of {config.image_size} x {config.image_size}"
            )
        config = dataclasses.replace(config, dtype=self._dtype)
        about = {
            "model": self._model,
            "config": dataclasses.asdict(config),
            "processor": json.loads(json.dumps(processor)),
            "keep_aspect": self._keep_aspect,
        }
        store = images.EmbeddingStore(self._directory, width=config.width, about=about)
        return VisionTower(config), params, processor, store

    def __call__(self, directory: str, prefix: str, count: int) -> images.FileImages | None:
        """The pictures of one of the files, embedded."""
        from vixml_jax import encoding

        paths = images.read_paths(directory, prefix, count)
        if paths is None:
            return None
        tower, params, processor, store = self._tower
        row_of, faults = encoding.embed_files(
            tower,
            params,
            [path for item in paths for path in item],
            store,
            processor,
            batch=self._batch,
            keep_aspect=self._keep_aspect,
            threads=os.cpu_count() or 1,
        )
        self._named += sum(map(len, paths))
        self._broken += [f"{path}\t{fault}" for path, fault in faults.items()]
        with open(os.path.join(self._directory, "broken.txt"), "w", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in self._broken)
        found = [[row_of[path] for path in item if path in row_of] for item in paths]
        rows = np.full((count, max(1, max(map(len, found), default=1))), -1, np.int64)
        for i, item in enumerate(found):
            rows[i, : len(item)] = item
        name = os.path.join(directory, f"{prefix}_images.txt")
        return images.FileImages(rows, store.vectors(), name)

    def describe(self) -> str:
        """What was embedded, and what could not be."""
        line = f"pictures: {self._named} named, vectors in {self._directory}"
        if self._broken:
            listed = os.path.join(self._directory, "broken.txt")
            line += f"; {len(self._broken)} files missing or broken, listed in {listed}"
        return line


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
    flags.DEFINE_string(
        "images",
        "",
        "Hugging Face directory or name of a SigLIP vision model: embeds the image files that "
        "{trn,tst,lbl}_images.txt of the source name, a line an item, tabs between paths.",
    )
    flags.DEFINE_boolean(
        "keep_aspect", False, "Shrink pictures into the frame, on white, rather than stretch them."
    )
    flags.DEFINE_integer("image_batch", 64, "Pictures embedded together.", lower_bound=1)
    flags.DEFINE_enum(
        "image_dtype", "float32", ["float32", "bfloat16"], "What the vision model computes in."
    )
    flags.DEFINE_integer("max_tokens", 32, "Tokens of a text at most, special ones included.")
    flags.DEFINE_enum(
        "encoding", "utf-8", list(preparation.ENCODINGS), "What the source's texts are encoded in."
    )
    flags.DEFINE_integer("vocab_size", 8192, "Tokens at most of a tokenizer that is trained.")
    flags.DEFINE_float("propensity_a", 0.6, "A of the inverse propensities, for sampling and PSP.")
    flags.DEFINE_float("propensity_b", 2.6, "B of the inverse propensities.")
    flags.DEFINE_float(
        "valid", 0.0, "Share of the training queries held out to choose by: 0.02, say; 0: none."
    )
    flags.DEFINE_float(
        "test",
        0.2,
        "Share of the queries held out to judge on, where the source has no test split.",
    )
    flags.DEFINE_string(
        "split_by",
        "random",
        "How they are drawn: 'random'; 'text', equal texts together; 'group:COLUMN', equal values "
        "together; 'time:COLUMN', the newest.",
    )
    flags.DEFINE_enum(
        "filters",
        "auto",
        list(preparation.FILTERS),
        "Pairs of a query and the label that is itself, which are never predicted: 'auto', as the "
        "source gives them, made where it gives none; 'none', as the source gives them alone.",
    )
    flags.DEFINE_integer("seed", 0, "Of all that is drawn.")
    flags.DEFINE_boolean("overwrite", False, "Replace a prepared data set in --out.")


if __name__ == "__main__":
    define_flags()
    errors.launch(main)
