"""The files of a Hugging Face model: where they are, and whether they are whole.

A name that a file of a model gives stays in the directory of the model: neither absolute paths nor
".." are followed. Symbolic links are, since the cache of the hub consists of them; whatever they
lead to is opened only if it is a regular file, and only read as JSON or safetensors.
"""

import os
import re
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple

import msgspec

from vixml_jax.errors import InputError
from vixml_jax.storage import hub, json_files, regular_files

CONFIG = "config.json"
PROCESSOR = "preprocessor_config.json"
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
MODULES = "modules.json"  # Of sentence-transformers, as the next two.
PROMPTS = "config_sentence_transformers.json"
LENGTHS = "sentence_*_config.json"
ADAPTER = "adapter_config.json"
_DESCRIPTIONS = [
    *(CONFIG, PROCESSOR, MODULES, PROMPTS, LENGTHS, ADAPTER),
    *(f"*/{name}" for name in (CONFIG, LENGTHS)),
]
_MAX_JSON = 1 << 25  # Bytes of a JSON file; the largest are indices of many tensors.
_MAX_HEADER = 1 << 23  # Bytes of the names and shapes in a safetensors file.
_LFS = b"version https://git-lfs"  # How a file begins whose content git-lfs has not fetched.


class Tensor(NamedTuple):
    """A tensor of a checkpoint.

    Attributes:
      name: Its name in the file.
      values: A lazy slice of it.
      path: Of the file.
    """

    name: str
    values: Any
    path: str


class _Index(msgspec.Struct):
    """model.safetensors.index.json: the file of each tensor."""

    weight_map: Annotated[
        dict[str, Annotated[str, msgspec.Meta(pattern=r"^[\w.-]+\.safetensors$")]],
        msgspec.Meta(min_length=1),
    ]


def resolve(directory_or_name: str, *, weights: bool = True) -> str:
    """The local directory of a model; a model on the Hugging Face hub is downloaded first.

    Args:
      directory_or_name: A local directory, or the name of a model on the hub.
      weights: Whether to download the weights too, or only the configuration.

    Raises:
      InputError: If there is neither a directory nor a model on the hub.
    """
    if os.path.isdir(directory_or_name):
        return directory_or_name
    try:
        directory = hub.download(directory_or_name, _DESCRIPTIONS)
        if weights:
            # Early models of sentence-transformers have their weights in a directory below.
            part = transformer_path(directory)
            files = [os.path.join(part, x) for x in (INDEX, "model*.safetensors")]
            directory = hub.download(directory_or_name, files)
        return directory
    except hub.NotFoundError as error:
        raise InputError(f"{directory_or_name}: {error}") from None


def transformer_path(directory: str) -> str:
    """Where in a model directory config.json and the weights are: "", or a path below.

    Only the first module in a modules.json of sentence-transformers has another path.

    Raises:
      InputError: If modules.json is no list of modules.
    """
    modules = read_modules(directory)
    return modules[0].path if modules else ""


def read_modules(directory: str) -> list[hub.Module]:
    """The modules of a sentence-transformers directory; none if it is another kind of directory.

    Raises:
      InputError: If modules.json is no list of modules in this directory.
    """
    path = os.path.join(directory, MODULES)
    return read_json(path, list[hub.Module]) if os.path.lexists(path) else []


def config_path(directory_or_name: str) -> str:
    """The path of the config.json of a model; no weights are downloaded."""
    directory = resolve(directory_or_name, weights=False)
    return os.path.join(directory, transformer_path(directory), CONFIG)


def read_json(path: str, kind: Any = dict[str, Any]) -> Any:
    """The content of a JSON file.

    Args:
      path: Of the file.
      kind: Expected type of the content; see `json_files.read`.

    Raises:
      InputError: If there is no such file, or it is not JSON of this type.
    """
    if not os.path.lexists(path):
        raise InputError(
            f"{path}: not found; expected a Hugging Face model directory with this file"
        )
    _refuse_pointer(path)
    return json_files.read(path, kind, "download the model again", max_bytes=_MAX_JSON)


def tensors(directory: str) -> Iterator[Tensor]:
    """Yields all tensors, from one file or from all files in the index.

    Raises:
      InputError: If a file is missing or broken.
    """
    import safetensors

    for path in _weight_files(directory):
        _refuse_pointer(path)
        _check_header(path)
        try:
            file = safetensors.safe_open(path, framework="np")
            yield from (Tensor(name, file.get_slice(name), path) for name in file.keys())
        except (safetensors.SafetensorError, OSError) as error:
            raise _no_safetensors(path, str(error).split("\n")[0]) from None


def _check_header(path: str) -> None:
    """Checks the size of what safetensors reads into memory; it checks all else itself."""
    with regular_files.open_binary(path) as file:
        size = int.from_bytes(file.read(8), "little")
    if size > _MAX_HEADER:
        raise _no_safetensors(path, f"a header of {size:,} bytes, expected at most {_MAX_HEADER:,}")


def _no_safetensors(path: str, reason: str) -> InputError:
    return InputError(f"{path}: truncated or not safetensors: {reason}")


def _weight_files(directory: str) -> list[str]:
    if os.path.lexists(os.path.join(directory, ADAPTER)):
        raise InputError(
            f"{directory}: holds adapters ({ADAPTER}), which are not read; merge them into the "
            "model first by merge_and_unload of peft"
        )
    weights, index = (os.path.join(directory, name) for name in (WEIGHTS, INDEX))
    if os.path.lexists(weights):
        return [weights]
    if not os.path.lexists(index):
        present = sorted(os.listdir(directory)) if os.path.isdir(directory) else []
        raise InputError(f"{weights}: not found; {_remedy(directory, present)}")
    files = sorted(set(read_json(index, _Index).weight_map.values()))
    lost = [name for name in files if not os.path.lexists(os.path.join(directory, name))]
    if lost:
        raise InputError(
            f"{os.path.join(directory, lost[0])}: not found; {len(lost)} of the {len(files)} files "
            f"in {INDEX} are missing: download the model again"
        )
    return [os.path.join(directory, name) for name in files]


def _remedy(directory: str, present: list[str]) -> str:
    """What to do about missing weights, by the files that are there."""
    if any(re.fullmatch(r"model-\d+-of-\d+\.safetensors", name) for name in present):
        return f"its parts need {INDEX}: download that file too"
    if any(re.fullmatch(r"pytorch_model.*\.bin", name) for name in present):
        return (
            "weights in pytorch_model.bin are not read, because they can run code; convert them: "
            f"transformers.AutoModel.from_pretrained({directory!r}).save_pretrained({directory!r})"
        )
    return (
        f"expected {WEIGHTS}, or the files listed in {INDEX}; weights in other formats, such as "
        "pytorch_model.bin, are not read"
    )


def _refuse_pointer(path: str) -> None:
    """Raises an `InputError` if git-lfs has not fetched the content of a file."""
    with regular_files.open_binary(path) as file:
        pointer = file.read(len(_LFS)) == _LFS
    if pointer:
        raise InputError(
            f"{path}: a git-lfs pointer instead of the file itself; run `git lfs pull` in its "
            "directory"
        )
