"""The files of a Hugging Face model: where they are, and whether they are whole."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from vixml_jax.errors import InputError

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
_LFS = b"version https://git-lfs"  # How a file begins whose content git-lfs has not fetched.


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
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", directory_or_name):
        raise InputError(
            f"{directory_or_name}: no such directory; expected a Hugging Face model directory or "
            "the name of a model on the hub"
        )
    import huggingface_hub
    from huggingface_hub import errors

    def download(patterns: list[str]) -> str:
        return huggingface_hub.snapshot_download(directory_or_name, allow_patterns=patterns)

    try:
        directory = download(_DESCRIPTIONS)
        if weights:
            # Early models of sentence-transformers have their weights in a directory below.
            part = transformer_path(directory)
            directory = download([os.path.join(part, x) for x in (INDEX, "model*.safetensors")])
        return directory
    except (OSError, ValueError, errors.HfHubHTTPError) as error:
        if isinstance(error, InputError):
            raise
        reason = " ".join(str(error).split())
        raise InputError(
            f"{directory_or_name}: not a directory, and cannot be downloaded from the Hugging Face "
            f"hub ({type(error).__name__}: {reason})"
        ) from error


def transformer_path(directory: str) -> str:
    """Where in a model directory config.json and the weights are: "", or a path below.

    Only the first module in a modules.json of sentence-transformers has another path.

    Raises:
      InputError: If modules.json is no list of modules.
    """
    modules = read_modules(directory)
    return modules[0]["path"] if modules else ""


def read_modules(directory: str) -> list[dict[str, str]]:
    """The modules of a sentence-transformers directory, each with `path` and `type`; else none.

    Raises:
      InputError: If modules.json is no list of modules.
    """
    path = os.path.join(directory, MODULES)
    if not os.path.exists(path):
        return []
    modules = read_json(path, list)
    for module in modules:
        names = module.keys() if isinstance(module, dict) else ()
        if not {"path", "type"} <= set(names) or not all(
            isinstance(module[name], str) for name in ("path", "type")
        ):
            raise InputError(f"{path}: expected a list of modules with path and type")
        outside = os.path.isabs(module["path"]) or ".." in module["path"].split("/")
        if outside:
            raise InputError(f"{path}: path {module['path']!r} is outside of the directory")
    return modules


def config_path(directory_or_name: str) -> str:
    """The path of the config.json of a model; no weights are downloaded."""
    directory = resolve(directory_or_name, weights=False)
    return os.path.join(directory, transformer_path(directory), CONFIG)


def read_json(path: str, kind: type = dict) -> Any:
    """The content of a JSON file.

    Args:
      path: Of the file.
      kind: Expected type of the content, `dict` or `list`.

    Raises:
      InputError: If there is no such file, or it is not JSON of this type.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except FileNotFoundError:
        raise InputError(
            f"{path}: not found; expected a Hugging Face model directory with this file"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        _refuse_pointer(path)
        raise InputError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, kind):
        expected = "object" if kind is dict else "list"
        raise InputError(f"{path}: expected a JSON {expected}, found {type(content).__name__}")
    return content


def tensors(directory: str) -> Iterator[tuple[str, Any]]:
    """Yields (name, lazy slice) of each tensor, from one file or from all files in the index.

    Raises:
      InputError: If a file is missing or broken.
    """
    import safetensors

    for path in _weight_files(directory):
        _refuse_pointer(path)
        try:
            with open(path, "rb"):  # safetensors does not say which file it cannot open.
                file = safetensors.safe_open(path, framework="np")
            yield from ((name, file.get_slice(name)) for name in file.keys())
        except (safetensors.SafetensorError, OSError) as error:
            reason = str(error).split("\n")[0]
            raise InputError(f"{path}: truncated or not safetensors: {reason}") from None


def _weight_files(directory: str) -> list[str]:
    if os.path.exists(os.path.join(directory, ADAPTER)):
        raise InputError(
            f"{directory}: holds adapters ({ADAPTER}), which are not read; merge them into the "
            "model first by merge_and_unload of peft"
        )
    weights, index = (os.path.join(directory, name) for name in (WEIGHTS, INDEX))
    if os.path.exists(weights):
        return [weights]
    if not os.path.exists(index):
        present = sorted(os.listdir(directory)) if os.path.isdir(directory) else []
        raise InputError(f"{weights}: not found; {_remedy(directory, present)}")
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, Mapping) or not listed:
        raise InputError(f"{index}: weight_map is missing; download the file again")
    files = sorted({str(name) for name in listed.values()})
    lost = [name for name in files if not os.path.exists(os.path.join(directory, name))]
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
    try:
        with open(path, "rb") as file:
            pointer = file.read(len(_LFS)) == _LFS
    except OSError:
        return  # The caller says what is wrong with it.
    if pointer:
        raise InputError(
            f"{path}: a git-lfs pointer instead of the file itself; run `git lfs pull` in its "
            "directory"
        )
