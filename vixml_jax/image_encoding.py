"""Embeds the image files that a data set or queries name, with a frozen vision tower."""

import concurrent.futures
import dataclasses
import functools
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from vixml_jax.data.images import download, image_files
from vixml_jax.data.images.image_embeddings import EmbeddingStore, FileImages
from vixml_jax.errors import InputError
from vixml_jax.models import hf_checkpoints
from vixml_jax.models.siglip import VisionTower
from vixml_jax.runtime import progress


def embed_files(
    tower: VisionTower,
    params: Any,
    paths: Sequence[str],
    store: EmbeddingStore,
    processor: image_files.ImageProcessor,
    *,
    batch: int,
    keep_aspect: bool,
    threads: int,
) -> tuple[dict[str, int], dict[str, str]]:
    """Embeds image files that are not in the store yet, each distinct content once, in order.

    Args:
      tower: A vision tower.
      params: Parameters of the tower.
      paths: Paths of the files; several may have the same content.
      store: Stored embeddings, to which the new ones are added.
      processor: Size and normalisation of the pixels.
      batch: Number of images embedded at a time.
      keep_aspect: See `image_files.load_pixels`.
      threads: Number of threads that read and decode files.

    Returns:
      The row in the store for each path, and an error message for each path without embedding.
    """
    encode = jax.jit(lambda params, pixels: tower.apply({"params": params}, pixels))
    params = jax.device_put(params)
    paths = list(dict.fromkeys(paths))
    errors: dict[str, str] = {}  # By digest.

    def decode(path: str) -> np.ndarray | str:
        """Pixels of a file, or why they cannot be decoded."""
        try:
            return image_files.load_pixels(path, processor, keep_aspect=keep_aspect)
        except (OSError, ValueError) as error:
            return " ".join(str(error).split())

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        digests = dict(zip(paths, pool.map(image_files.digest, paths), strict=True))
        new_paths: dict[str, str] = {}  # Digest -> first path with this content.
        for path, digest in digests.items():
            if digest is not None and digest not in store.row_of:
                new_paths.setdefault(digest, path)
        new = list(new_paths.items())
        with progress.track("images", len(new), shown=bool(new)) as update:
            for start in range(0, len(new), batch):
                part = new[start : start + batch]
                decoded = list(pool.map(decode, (path for _, path in part)))
                valid = [i for i, pixels in enumerate(decoded) if not isinstance(pixels, str)]
                pixels = np.zeros((batch, processor.height, processor.width, 3), np.float32)
                for row, i in enumerate(valid):
                    pixels[row] = decoded[i]
                vectors = np.asarray(encode(params, pixels))[: len(valid)]
                with np.errstate(over="ignore"):
                    finite = np.isfinite(vectors.astype(np.float16)).all(axis=1)
                store.add(
                    [part[i][0] for i, ok in zip(valid, finite, strict=True) if ok],
                    vectors[finite],
                )
                errors |= {
                    digest: pixels
                    for (digest, _), pixels in zip(part, decoded, strict=True)
                    if isinstance(pixels, str)
                }
                update(len(part))
    row_of, faults = {}, {}
    for path, digest in digests.items():
        if digest in store.row_of:
            row_of[path] = store.row_of[digest]
        elif digest is None:
            faults[path] = "cannot be read"
        else:
            faults[path] = errors.get(digest, "the embedding is not finite in float16")
    return row_of, faults


class ImageFinder:
    """Embeds image files and URLs with a SigLIP model; resumes after an interruption.

    Args:
      model: Directory or Hugging Face name of the model.
      directory: Where embeddings and downloaded files are kept.
      keep_aspect: See `image_files.load_pixels`.
      batch: Number of images embedded together.
      dtype: Compute dtype of the model.
      bounds: Limits of downloads.

    Attributes:
      broken: Reason for each file or URL that could not be embedded.
    """

    def __init__(
        self,
        model: str,
        directory: str,
        *,
        keep_aspect: bool,
        batch: int,
        dtype: str,
        bounds: download.DownloadSettings,
    ):
        self._model, self._directory, self._bounds = model, directory, bounds
        self._keep_aspect, self._batch, self._dtype = keep_aspect, batch, dtype
        self.broken: dict[str, str] = {}
        self._named = 0

    @functools.cached_property
    def _tower(self) -> tuple[Any, ...]:
        """Vision tower, parameters, image processor and store; loaded when first needed."""
        directory = hf_checkpoints.resolve(self._model)
        config, params = hf_checkpoints.load_hf_vision(directory, dtype=self._dtype)
        processor = image_files.read_processor(os.path.join(directory, "preprocessor_config.json"))
        if (processor.height, processor.width) != (config.image_size,) * 2:
            raise InputError(
                f"--images={self._model}: preprocessor_config.json has images of "
                f"{processor.height} x {processor.width}, but the model expects "
                f"{config.image_size} x {config.image_size}"
            )
        config = dataclasses.replace(config, dtype=self._dtype)
        about = {
            "model": self._model,
            "config": dataclasses.asdict(config),
            "processor": json.loads(json.dumps(processor)),
            "keep_aspect": self._keep_aspect,
        }
        store = EmbeddingStore(self._directory, width=config.width, about=about)
        return VisionTower(config), params, processor, store

    @property
    def used(self) -> bool:
        """Whether any image file was named."""
        return self._named > 0

    def find(self, directory: str, prefix: str, count: int) -> FileImages | None:
        """Embeds the images named in `{prefix}_images.txt`; see `image_files.read_paths`."""
        paths = image_files.read_paths(directory, prefix, count)
        if paths is None:
            return None
        return self.embed(os.path.join(directory, f"{prefix}_images.txt"), paths)

    def embed(self, name: str, paths: list[list[str]]) -> FileImages:
        """Embeds the images of items.

        Args:
          name: Where the images are named, for messages.
          paths: Paths or URLs of the images of each item.
        """
        tower, params, processor, store = self._tower
        file_of, faults = self._download(name for item in paths for name in item)
        files = [[file_of[name] for name in item if name in file_of] for item in paths]
        row_of, broken = embed_files(
            tower,
            params,
            [path for item in files for path in item],
            store,
            processor,
            batch=self._batch,
            keep_aspect=self._keep_aspect,
            threads=os.cpu_count() or 1,
        )
        self._named += sum(map(len, paths))
        faults |= {name: broken[path] for name, path in file_of.items() if path in broken}
        self.broken |= faults
        with open(os.path.join(self._directory, "broken.txt"), "w", encoding="utf-8") as file:
            file.writelines(f"{name}\t{fault}\n" for name, fault in self.broken.items())
        rows_of_items = [[row_of[path] for path in item if path in row_of] for item in files]
        width = max(1, max(map(len, rows_of_items), default=1))
        rows = np.full((len(paths), width), -1, np.int64)
        for i, item in enumerate(rows_of_items):
            rows[i, : len(item)] = item
        return FileImages(rows, store.vectors(), name)

    def _download(self, names: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
        """The file of each path or URL (downloaded first), and the reason for each failure."""
        names = list(dict.fromkeys(names))
        urls = [name for name in names if download.is_url(name)]
        if not urls:
            return {name: name for name in names}, {}
        directory = os.path.join(self._directory, "files")
        downloaded, faults = download.download(urls, directory, settings=self._bounds)
        file_of = {name: downloaded.get(name, name) for name in names if name not in faults}
        return file_of, faults

    def describe(self) -> str:
        """A line on the number of images, and on those that could not be embedded."""
        line = f"images: {self._named} named in the source, embeddings in {self._directory}"
        if self.broken:
            path = os.path.join(self._directory, "broken.txt")
            line += f"; {len(self.broken)} missing or broken, listed in {path}"
        return line
