"""How a sentence-transformers directory turns token states into a vector, read from its files.

The files are those that sentence-transformers 2 to 6 write: modules.json, the config.json of each
module, sentence_bert_config.json and config_sentence_transformers.json.
"""

import glob
import os
from typing import Any, NamedTuple

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
_FOLLOWED = {"Transformer", "Pooling", "Normalize", "Dropout"}


class Pooling(NamedTuple):
    """How the states of a text become one vector.

    Attributes:
      kind: "cls", "mean", "last" or "weighted_mean".
      notes: What a user should know besides, one line each.
    """

    kind: str
    notes: tuple[str, ...] = ()


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
            path, f"modules {', '.join(names)}", "Transformer, Pooling and perhaps Normalize"
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
        fields = hf_files.read_json(path)
        task = fields.get("transformer_task") or "feature-extraction"
        text = _object(_object(fields.get("modality_config")).get("text"))
        output = text.get("method_output_name") or "last_hidden_state"
        if (task, output) != ("feature-extraction", "last_hidden_state"):
            found = f"{task} with {output}"
            raise _refused(path, found, "feature-extraction with last_hidden_state")
        if fields.get("do_lower_case") and not _lowers(os.path.join(directory, "tokenizer.json")):
            raise _refused(
                path,
                "do_lower_case is true, but tokenizer.json keeps upper case",
                "a tokenizer that lowers texts (lower them before `prepare`)",
            )


def _lowers(path: str) -> bool:
    """Whether a tokenizer.json lowers texts; true if there is none to check."""
    if not os.path.exists(path):
        return True
    normalizer = _object(hf_files.read_json(path).get("normalizer"))
    parts = [normalizer, *map(_object, normalizer.get("normalizers") or [])]
    return any(
        part.get("type") == "Lowercase"
        or (part.get("type") == "BertNormalizer" and part.get("lowercase"))
        for part in parts
    )


def _object(value: Any) -> dict[str, Any]:
    """A JSON object as it is, and everything else as an empty one."""
    return value if isinstance(value, dict) else {}


def _pooling(path: str) -> str:
    fields = hf_files.read_json(path)
    modes: Any = fields.get("pooling_mode")
    if modes is None:
        chosen = [mode for name, (mode, _) in _MODES.items() if fields.get(name)]
        modes = chosen or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes
    kinds = [_KINDS.get(mode) if isinstance(mode, str) else None for mode in modes]
    if len(kinds) != 1 or not kinds[0]:
        expected = "one of " + ", ".join(mode for mode, kind in _KINDS.items() if kind)
        raise _refused(path, f"pooling {' + '.join(map(str, modes))}", expected)
    return kinds[0]


def _check_prompts(path: str) -> list[str]:
    """Notes about prompts; only one that is added to every text is refused."""
    if not os.path.exists(path):
        return []
    fields = hf_files.read_json(path)
    prompts = {name: text for name, text in _object(fields.get("prompts")).items() if text}
    default = fields.get("default_prompt_name")
    if default in prompts:
        raise InputError(
            f"{path}: every text begins with the prompt {prompts[default]!r} (default_prompt_name "
            f"{default!r}); prepare the texts with it (--text='{prompts[default]}{{title}}') and "
            "set --model.pooling, which skips this check"
        )
    shown = ", ".join(f"{name} {text!r}" for name, text in sorted(prompts.items())[:2])
    note = f"{path}: knows prompts ({shown}); none is added: see --text of `prepare`"
    return [note] if prompts else []
