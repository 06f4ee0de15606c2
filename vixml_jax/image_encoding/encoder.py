"""A frozen vision tower on all devices of the machine, and how it wants its pixels."""

import dataclasses
import json
import os
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float32, UInt8

from vixml_jax.data.images import image_files, image_reader
from vixml_jax.data.images.image_reader import ImageSource
from vixml_jax.errors import InputError
from vixml_jax.models import hf_checkpoints, hf_configs, hf_files, hf_names
from vixml_jax.models.siglip import VisionTower

NOT_FINITE = "the embedding is not finite in float16"
_IMAGES = "images"  # The axis of the mesh.

# Embeddings of a batch, and which of them are finite in float16.
Embedded = tuple[Float32[np.ndarray, "b v"], Bool[np.ndarray, " b"]]


class ImageEncoder:
    """A frozen vision tower and how it wants its pixels; several threads may use it.

    A batch is sharded over all local devices, each of which runs the whole tower on its images.

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
        self._processor = processor = check_model(model)
        config, params = hf_checkpoints.load_hf_vision(model, dtype=dtype)
        config = dataclasses.replace(config, dtype=dtype)
        self._keep_aspect, self.width = keep_aspect, config.width
        self.about = {
            "model": model,
            "config": dataclasses.asdict(config),
            "processor": json.loads(json.dumps(processor)),
            "keep_aspect": keep_aspect,
            "reader": image_reader.VERSION,
        }
        devices = jax.local_devices()
        mesh = jax.make_mesh(
            (len(devices),), (_IMAGES,), axis_types=(AxisType.Auto,), devices=devices
        )
        tower = VisionTower.on(devices[0], config)

        def embed(params: dict, pixels: UInt8[Array, "b h w 3"]) -> Float32[Array, "b v"]:
            return tower.apply({"params": params}, image_files.normalize(pixels, processor))

        self._encode = jax.jit(
            jax.shard_map(
                embed, mesh=mesh, in_specs=(P(), P(_IMAGES)), out_specs=P(_IMAGES), check_vma=False
            )
        )
        self._params = jax.device_put(params, NamedSharding(mesh, P()))
        self._sharding, self._num_devices = NamedSharding(mesh, P(_IMAGES)), len(devices)

    def batch_size(self, least: int) -> int:
        """The smallest multiple of the number of devices that is at least `least`."""
        return -(-least // self._num_devices) * self._num_devices

    def pixels(self, source: ImageSource) -> UInt8[np.ndarray, "h w 3"] | str:
        """Pixels of an image at the size that the tower reads, or why they cannot be decoded."""
        try:
            return image_files.load_pixels(source, self._processor, keep_aspect=self._keep_aspect)
        except (OSError, ValueError) as error:
            return " ".join(str(error).split())

    def start(
        self, pixels: Sequence[UInt8[np.ndarray, "h w 3"] | None], size: int
    ) -> Callable[[], Embedded]:
        """Starts to embed images on the devices, and does not wait for them.

        Args:
          pixels: Of at most `size` images; None: nothing is in this place of the batch. What is
            elsewhere in it does not change the embedding of an image.
          size: Images to which the batch is padded, from `batch_size`; each size is a program of
            its own.

        Returns:
          A function that waits for the devices and returns the embeddings of all places, and which
          of them are finite in float16.
        """
        batch = np.zeros((size, self._processor.height, self._processor.width, 3), np.uint8)
        for row, image in enumerate(pixels):
            if image is not None:
                batch[row] = image
        vectors = self._encode(self._params, jax.device_put(batch, self._sharding))

        def finish() -> Embedded:
            found = np.asarray(vectors)[: len(pixels)]
            with np.errstate(over="ignore"):
                return found, np.isfinite(found.astype(np.float16)).all(axis=1)

        return finish


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
