"""Downloads chosen files of models on the Hugging Face hub; the list of parts of a model."""

import re

import msgspec

from vixml_jax.errors import InputError


class NotFoundError(InputError):
    """There is no such model, or it cannot be downloaded."""


class Module(msgspec.Struct):
    """A part of a sentence-transformers model, as modules.json lists it.

    Attributes:
      path: Its directory below that of the model; "" for the directory of the model itself.
      type: The name of its class, which is compared with known ones and never looked up.
    """

    path: str
    type: str

    def __post_init__(self) -> None:
        if self.path.startswith("/") or ".." in self.path.split("/") or "\0" in self.path:
            raise ValueError(f"path {self.path[:100]!r} is outside of the directory")


def download(name: str, patterns: list[str]) -> str:
    """The local directory with the files of a model that match patterns; its path in the cache.

    Files in the cache are symbolic links, so readers of model directories follow links.

    Raises:
      NotFoundError: If there is no such model; the message does not repeat the name.
    """
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise NotFoundError(
            "no such directory; expected a Hugging Face model directory or the name of a model on "
            "the hub"
        )
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return huggingface_hub.snapshot_download(name, allow_patterns=patterns)
    except (OSError, ValueError, errors.HfHubHTTPError) as error:
        reason = " ".join(str(error).split())
        raise NotFoundError(
            "not a directory, and cannot be downloaded from the Hugging Face hub "
            f"({type(error).__name__}: {reason})"
        ) from None
