"""How a sentence-transformers directory turns token states into a vector, read from its files.

The files are those that sentence-transformers 2 to 6 write: modules.json, the config.json of each
module, sentence_bert_config.json and config_sentence_transformers.json.
"""

import glob
import os
from typing import Any, NamedTuple

import msgspec

from vixml_jax.errors import InputError
from vixml_jax.models import hf_files

# Name of a pooling mode in its older config.json (each a boolean) and in its newer one -> ours.
_MODES = {
    "pooling_mode_cls_token": ("cls", "cls"),
    "pooling_mode_mean_tokens": ("mean", "mean"),
    "pooling_mode_max_tokens": ("max", ""),
    # The sum of the states divided by the root of their number. It has the direction of the mean,
    # and vectors are scaled to unit length.
    "pooling_mode_mean_sqrt_len_tokens": ("mean_sqrt_len_tokens", "mean"),
    "pooling_mode_weightedmean_tokens": ("weightedmean", "weighted_mean"),
    "pooling_mode_lasttoken": ("lasttoken", "last"),
}
_KINDS = dict(_MODES.values())
_LONG = 300  # Characters of a text of a file in a message.
_FOLLOWED = {"Transformer", "Pooling", "Normalize", "Dropout"}


class Pooling(NamedTuple):
    """How the states of a text become one vector.

    Attributes:
      kind: "cls", "mean", "last" or "weighted_mean".
      notes: What a user should know besides, one line each.
    """

    kind: str
    notes: tuple[str, ...] = ()


class _Text(msgspec.Struct):
    """How a transformer reads texts."""

    method_output_name: str | None = None


class _Modalities(msgspec.Struct):
    """How a transformer reads what it can read."""

    text: _Text | None = None


class _Transformer(msgspec.Struct):
    """The fields of sentence_bert_config.json that are used."""

    transformer_task: str | None = None
    modality_config: _Modalities | None = None
    do_lower_case: bool | None = None


class _PoolingConfig(msgspec.Struct):
    """The config.json of a pooling module, in its newer and its older form."""

    pooling_mode: str | list[str] | None = None
    pooling_mode_cls_token: bool | None = None
    pooling_mode_mean_tokens: bool | None = None
    pooling_mode_max_tokens: bool | None = None
    pooling_mode_mean_sqrt_len_tokens: bool | None = None
    pooling_mode_weightedmean_tokens: bool | None = None
    pooling_mode_lasttoken: bool | None = None

    @property
    def modes(self) -> list[str]:
        """All modes that are asked for."""
        if self.pooling_mode is None:
            return [mode for name, (mode, _) in _MODES.items() if getattr(self, name)] or ["mean"]
        return [self.pooling_mode] if isinstance(self.pooling_mode, str) else self.pooling_mode


class _Prompts(msgspec.Struct):
    """The fields of config_sentence_transformers.json that are used."""

    prompts: dict[str, str | None] | None = None
    default_prompt_name: str | None = None


class _Tokenizer(msgspec.Struct):
    """The fields of tokenizer.json that are used."""

    normalizer: dict[str, Any] | None = None


def read(directory: str) -> Pooling | None:
    """The pooling of a sentence-transformers directory; None if it is none.

    Raises:
      InputError: If the directory asks for more than a tower can do, such as a dense layer after
        pooling; the message says how to start from the transformer alone.
    """
    modules = hf_files.read_modules(directory)
    if not modules:
        return None
    path = os.path.join(directory, hf_files.MODULES)
    names = [_name(module.type) for module in modules]
    other = [name for name in names if name not in _FOLLOWED]
    if other or names[:2] != ["Transformer", "Pooling"] or len(set(names)) < len(names):
        raise _refused(
            path,
            f"modules {_shown(', '.join(names))}",
            "Transformer, Pooling and perhaps Normalize",
        )
    _check_transformer(os.path.join(directory, modules[0].path))
    kind = _pooling(os.path.join(directory, modules[1].path, hf_files.CONFIG))
    notes = [f"{path}: {kind} pooling"]
    if "Normalize" not in names:
        notes.append(f"{path}: no Normalize; vectors are scaled to unit length all the same")
    return Pooling(kind, (*notes, *_check_prompts(os.path.join(directory, hf_files.PROMPTS))))


def modes(kind: str) -> dict[str, bool]:
    """The fields of a pooling module's config.json that stand for a kind of pooling."""
    chosen = next(mode for mode, ours in _KINDS.items() if ours == kind)
    return {name: mode == chosen for name, (mode, _) in _MODES.items()}


def _shown(text: str) -> str:
    """A text of a file as a message has it: short, and without control characters."""
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= _LONG else f"{text[: _LONG - 1]}…"


def _name(kind: str) -> str:
    """The class of a module, if sentence-transformers has it; else its path, which is unknown."""
    return kind.rsplit(".", 1)[-1] if kind.startswith("sentence_transformers.") else kind


def _refused(path: str, found: str, expected: str, pooling: str = "mean") -> InputError:
    return InputError(
        f"{path}: {found}, expected {expected}; --model.pooling={pooling} starts from the "
        "transformer alone"
    )


def _check_transformer(directory: str) -> None:
    """Checks that tokens are read and states are taken as a tower does."""
    for path in sorted(glob.glob(os.path.join(glob.escape(directory), hf_files.LENGTHS))):
        fields = hf_files.read_json(path, _Transformer)
        task = fields.transformer_task or "feature-extraction"
        text = (fields.modality_config or _Modalities()).text or _Text()
        output = text.method_output_name or "last_hidden_state"
        if (task, output) != ("feature-extraction", "last_hidden_state"):
            found = _shown(f"{task} with {output}")
            raise _refused(path, found, "feature-extraction with last_hidden_state")
        if fields.do_lower_case and not _lowers(os.path.join(directory, "tokenizer.json")):
            raise _refused(
                path,
                "do_lower_case is true, but tokenizer.json keeps upper case",
                "a tokenizer that lowers texts (lower them before `prepare`)",
            )


def _lowers(path: str) -> bool:
    """Whether a tokenizer.json lowers texts; true if there is none to check."""
    if not os.path.lexists(path):
        return True
    normalizer = hf_files.read_json(path, _Tokenizer).normalizer or {}
    steps = normalizer.get("normalizers")
    parts = [normalizer, *map(_object, steps if isinstance(steps, list) else ())]
    return any(
        part.get("type") == "Lowercase"
        or (part.get("type") == "BertNormalizer" and part.get("lowercase"))
        for part in parts
    )


def _object(value: Any) -> dict[str, Any]:
    """A JSON object as it is, and everything else as an empty one."""
    return value if isinstance(value, dict) else {}


def _pooling(path: str) -> str:
    modes = hf_files.read_json(path, _PoolingConfig).modes
    kinds = [_KINDS.get(mode) for mode in modes]
    if len(kinds) != 1 or not kinds[0]:
        expected = "one of " + ", ".join(mode for mode, kind in _KINDS.items() if kind)
        raise _refused(path, f"pooling {_shown(' + '.join(modes))}", expected)
    return kinds[0]


def _check_prompts(path: str) -> list[str]:
    """Notes about prompts; only one that is added to every text is refused."""
    if not os.path.lexists(path):
        return []
    fields = hf_files.read_json(path, _Prompts)
    prompts = {name: text for name, text in (fields.prompts or {}).items() if text}
    default = fields.default_prompt_name
    if default in prompts:
        raise InputError(
            f"{path}: every text begins with the prompt {_shown(repr(prompts[default]))} "
            f"(default_prompt_name {_shown(repr(default))}); prepare the texts with it "
            f"(--text='{_shown(prompts[default])}{{title}}') and set --model.pooling, which skips "
            "this check"
        )
    shown = ", ".join(
        f"{_shown(name)} {_shown(repr(text))}" for name, text in sorted(prompts.items())[:2]
    )
    note = f"{path}: knows prompts ({shown}); none is added: see --text of `prepare`"
    return [note] if prompts else []
