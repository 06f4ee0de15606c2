"""Embeds the image files that a data set or queries name, with a frozen vision tower."""

import concurrent.futures
import dataclasses
import functools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import jax
import numpy as np
from jaxtyping import Bool, Float32

from vixml_jax.data.images import (
    download,
    image_embeddings,
    image_files,
    image_reader,
    named_images,
)
from vixml_jax.data.images.image_embeddings import EmbeddingStore, FileImages
from vixml_jax.data.images.image_reader import ImageSource
from vixml_jax.data.sources.raw import RawDataset
from vixml_jax.errors import InputError
from vixml_jax.models import hf_checkpoints, hf_configs, hf_files, hf_names
from vixml_jax.models.siglip import VisionTower
from vixml_jax.runtime import progress


class ImageEncoder:
    """A frozen vision tower and how it wants its pixels; several threads may use it.

    Attributes:
      width: Of the embeddings.
      about: What the embeddings depend on, as JSON.
    """

    def __init__(self, model: str, *, keep_aspect: bool, dtype: str):
        """Loads the tower.

        Args:
          model: Directory or Hugging Face name of a SigLIP model.
          keep_aspect: See `image_files.load_pixels`.
          dtype: Compute dtype of the model.

        Raises:
          InputError: If there is no such model, or it cannot embed images.
        """
        self._processor = check_model(model)
        config, params = hf_checkpoints.load_hf_vision(model, dtype=dtype)
        config = dataclasses.replace(config, dtype=dtype)
        self._keep_aspect, self.width = keep_aspect, config.width
        self.about = {
            "model": model,
            "config": dataclasses.asdict(config),
            "processor": json.loads(json.dumps(self._processor)),
            "keep_aspect": keep_aspect,
            "reader": image_reader.VERSION,
        }
        tower = VisionTower.on(jax.devices()[0], config)
        self._params = jax.device_put(params)
        self._encode = jax.jit(lambda params, pixels: tower.apply({"params": params}, pixels))

    def pixels(self, source: ImageSource) -> Float32[np.ndarray, "h w 3"] | str:
        """Pixels of an image as the tower reads them, or why they cannot be decoded."""
        try:
            return image_files.load_pixels(source, self._processor, keep_aspect=self._keep_aspect)
        except (OSError, ValueError) as error:
            return " ".join(str(error).split())

    def encode(
        self, pixels: Sequence[Float32[np.ndarray, "h w 3"]], size: int
    ) -> tuple[Float32[np.ndarray, "b v"], Bool[np.ndarray, " b"]]:
        """Embeds images.

        Args:
          pixels: Of at most `size` images.
          size: Images to which the batch is padded; each size is a program of its own.

        Returns:
          The embeddings, and which of them are finite in float16.
        """
        batch = np.zeros((size, self._processor.height, self._processor.width, 3), np.float32)
        for row, image in enumerate(pixels):
            batch[row] = image
        vectors = np.asarray(self._encode(self._params, batch))[: len(pixels)]
        with np.errstate(over="ignore"):
            return vectors, np.isfinite(vectors.astype(np.float16)).all(axis=1)


def model_of(images: str) -> tuple[str, bool]:
    """Returns the vision model of a run's serving artifacts, and whether it keeps the aspect.

    Args:
      images: As in the artifacts; empty: no model embedded the images.
    """
    model, _, aspect = images.rpartition(", ")
    return model, aspect == "aspect kept"


def encoder_of(images: str, dtype: str) -> ImageEncoder | None:
    """Returns the vision model that embedded the images of a run; None: none did.

    Args:
      images: Of the run's serving artifacts.
      dtype: Compute dtype of the model.
    """
    model, keep_aspect = model_of(images)
    return ImageEncoder(model, keep_aspect=keep_aspect, dtype=dtype) if model else None


NOT_FINITE = "the embedding is not finite in float16"


def embed_files(
    encoder: ImageEncoder,
    sources: Sequence[ImageSource],
    store: EmbeddingStore,
    *,
    batch: int,
    threads: int,
) -> tuple[dict[ImageSource, int], dict[ImageSource, str]]:
    """Embeds images that are not in the store yet, each distinct content once, in order.

    Args:
      encoder: Of the images.
      sources: Paths of the files, or their contents; several may have the same content.
      store: Stored embeddings, to which the new ones are added.
      batch: Number of images embedded at a time.
      threads: Number of threads that read and decode files.

    Returns:
      The row in the store for each image, and the reason for each image without embedding.
    """
    sources = list(dict.fromkeys(sources))
    errors: dict[str, str] = {}  # By digest.

    def digest_of(source: ImageSource) -> str | OSError:
        """SHA-256 of the content, or why it cannot be read."""
        try:
            return image_reader.digest(source)
        except OSError as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        digests = dict(zip(sources, pool.map(digest_of, sources), strict=True))
        first_of: dict[str, ImageSource] = {}  # Digest -> first image with this content.
        for source, digest in digests.items():
            if isinstance(digest, str) and digest not in store.row_of:
                first_of.setdefault(digest, source)
        new = list(first_of.items())
        with progress.track("images", len(new), shown=bool(new)) as update:
            for start in range(0, len(new), batch):
                part = new[start : start + batch]
                decoded = list(pool.map(encoder.pixels, (source for _, source in part)))
                valid = [i for i, pixels in enumerate(decoded) if not isinstance(pixels, str)]
                vectors, finite = encoder.encode([decoded[i] for i in valid], batch)
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
    for source, digest in digests.items():
        if isinstance(digest, OSError):
            faults[source] = str(digest)
        elif digest in store.row_of:
            row_of[source] = store.row_of[digest]
        else:
            faults[source] = errors.get(digest, NOT_FINITE)
    return row_of, faults


def check_model(model: str) -> image_files.ImageProcessor:
    """Checks the description of a vision model, which is quick, and returns its image processor.

    Raises:
      InputError: If there is no such model, or it cannot embed images.
    """
    directory = hf_files.resolve(model)
    path = os.path.join(directory, hf_files.CONFIG)
    _, config = hf_configs.read_config(path, hf_files.read_json(path), hf_names.VISION)
    processor = image_files.read_processor(os.path.join(directory, "preprocessor_config.json"))
    if (processor.height, processor.width) != (config.image_size,) * 2:
        raise InputError(
            f"--images={model}: preprocessor_config.json has images of {processor.height} x "
            f"{processor.width}, but the model expects {config.image_size} x {config.image_size}"
        )
    return processor


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
      broken: Reason for each image that could not be embedded, by its path, its URL or, for an
        image whose content a table has, `image_reader.describe`.
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
    def _opened(self) -> tuple[ImageEncoder, EmbeddingStore]:
        """Vision tower and store; opened when first needed."""
        encoder = ImageEncoder(self._model, keep_aspect=self._keep_aspect, dtype=self._dtype)
        store = EmbeddingStore(self._directory, width=encoder.width, about=encoder.about)
        return encoder, store

    @property
    def used(self) -> bool:
        """Whether any image was given to embed."""
        return self._named > 0

    def embed_dataset(self, raw: RawDataset) -> RawDataset:
        """The data set with the embeddings of the images that it names.

        Raises:
          InputError: If it names images, but none of them could be embedded, or embeddings that
            come with it have another width.
        """
        named = named_images.parts(raw)
        items = [names for images in named.values() for names in images.by_item()]
        origins = {path: where for i in named.values() for path, where in i.origins.items()}
        embedded = self.embed(", ".join(i.path for i in named.values()), items, origins)
        if self._named and (embedded.rows < 0).all():
            name, fault = next(iter(self.broken.items()))
            raise InputError(
                f"--images={self._model}: none of the {self._named:,} images that {raw.name} names "
                f"could be embedded; the first is {name}: {fault}"
            )
        ends = np.cumsum([len(images.at) - 1 for images in named.values()])[:-1]
        parts = zip(named.items(), np.split(embedded.rows, ends), strict=True)
        images_of = {
            part: FileImages(rows, embedded.vectors, images.path)
            for (part, images), rows in parts
            if (rows >= 0).any()
        }
        raw = named_images.replace(raw, dict.fromkeys(named) | images_of)
        all_images = {part: queries.items.images for part, queries in raw.splits.items()}
        image_embeddings.check_widths(all_images | {"labels": raw.labels.images}, raw.name)
        return raw

    def embed(
        self,
        name: str,
        images: Sequence[Sequence[ImageSource]],
        origins: Mapping[str, str] = MappingProxyType({}),
    ) -> FileImages:
        """Embeds the images of items.

        Args:
          name: Where the images are named, for messages.
          images: The images of each item: paths, URLs or contents.
          origins: Names of some of the paths, for messages.
        """
        encoder, store = self._opened
        file_of, faults = self._download(source for item in images for source in item)
        files = [[file_of[source] for source in item if source in file_of] for item in images]
        row_of, broken = embed_files(
            encoder,
            [file for item in files for file in item],
            store,
            batch=self._batch,
            threads=os.cpu_count() or 1,
        )
        self._named += sum(map(len, images))
        faults |= {source: broken[file] for source, file in file_of.items() if file in broken}
        self.broken |= {
            origins.get(source, image_reader.describe(source)): fault
            for source, fault in faults.items()
        }
        with open(os.path.join(self._directory, "broken.txt"), "w", encoding="utf-8") as file:
            file.writelines(f"{name}\t{fault}\n" for name, fault in self.broken.items())
        rows_of_items = [[row_of[file] for file in item if file in row_of] for item in files]
        width = max(1, max(map(len, rows_of_items), default=1))
        rows = np.full((len(images), width), -1, np.int64)
        for i, item in enumerate(rows_of_items):
            rows[i, : len(item)] = item
        return FileImages(rows, store.vectors(), name)

    def _download(
        self, sources: Iterable[ImageSource]
    ) -> tuple[dict[ImageSource, ImageSource], dict[ImageSource, str]]:
        """The file of each image (URLs are downloaded), and the reason for each failure."""
        sources = list(dict.fromkeys(sources))
        urls = [x for x in sources if isinstance(x, str) and download.is_url(x)]
        if not urls:
            return {source: source for source in sources}, {}
        directory = os.path.join(self._directory, "files")
        downloaded, faults = download.download(urls, directory, settings=self._bounds)
        file_of = {x: downloaded.get(x, x) for x in sources if x not in faults}
        return file_of, dict(faults)

    def describe(self) -> str:
        """A line on the number of images, and on those that could not be embedded."""
        line = f"images: {self._named} named in the source, embeddings in {self._directory}"
        if self.broken:
            path = os.path.join(self._directory, "broken.txt")
            name, fault = next(iter(self.broken.items()))
            line += f"; {len(self.broken)} missing or broken, listed in {path}"
            line += f"; the first is {name}: {fault}"
        return line
