"""Fields of nested dataclasses as command-line flags: `--group.field`, typed, with bounds."""

import dataclasses
import math
import typing
from collections.abc import Iterator
from typing import Any

from absl import flags

from vixml_jax.errors import InputError

_MOST = 1e15  # Larger integers are mistakes, and some libraries abort on them.
_DEFINE = {
    bool: flags.DEFINE_boolean,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    str: flags.DEFINE_string,
}


def flag(default: Any, help: str, **checks: Any) -> Any:
    """Returns a dataclass field that becomes a flag.

    Args:
      default: Default value; its type is the type of the flag.
      help: Help text. Its first sentence is shown in the short help.
      checks: `lower_bound`, `upper_bound` or `choices`.
    """
    value = (
        {"default_factory": lambda: default} if isinstance(default, list) else {"default": default}
    )
    return dataclasses.field(**value, metadata={"help": help, **checks})


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """Yields (name of the flag, field, value) of every field that is a flag."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, field, value


def lines(config: Any) -> list[str]:
    """Returns all flags of a configuration as lines of a flag file."""
    texts = {
        name: ",".join(map(str, value)) if isinstance(value, list) else str(value)
        for name, _, value in leaves(config)
    }
    return [f"--{name}={text}" for name, text in texts.items()]


def check_bounds(config: Any, prefix: str = "") -> None:
    """Checks the bounds and choices of all fields.

    Raises:
      InputError: If a value is out of bounds, not a number, or not one of the choices.
    """
    for name, field, value in leaves(config, prefix):
        low, high, choices = (
            field.metadata.get(key) for key in ("lower_bound", "upper_bound", "choices")
        )
        if choices and value not in choices:
            raise InputError(f"--{name}={value}: expected one of {', '.join(choices)}")
        numbers = [x for x in (value if isinstance(value, list) else [value]) if _is_number(x)]
        for number in numbers:
            check_number(name, number)
        if (low is not None and value < low) or (high is not None and value > high):
            expected = f"at least {low}" if high is None else f"from {low} to {high}"
            raise InputError(f"--{name}={value}: expected {expected}")


def check_number(name: str, number: Any) -> None:
    """Checks that the value of a numeric flag is a number that libraries can take.

    Raises:
      InputError: If it is not.
    """
    if not _is_number(number):
        return
    if isinstance(number, int) and abs(number) > _MOST:
        raise InputError(f"--{name}={str(number)[:20]}: expected at most {_MOST:.0e}")
    if math.isnan(number):
        raise InputError(f"--{name}={number}: expected a number")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def define(config: Any, values: flags.FlagValues, prefix: str = "") -> None:
    """Defines a flag for each field; the defaults are the values of the configuration.

    Bounds are checked by `check_bounds`, so flags and saved files pass the same checks.
    """
    for name, field, value in leaves(config, prefix):
        text = field.metadata["help"]
        if field.metadata.get("choices"):
            text += f" One of: {', '.join(field.metadata['choices'])}."
        if isinstance(value, list):
            flags.DEFINE_list(name, [str(item) for item in value], text, flag_values=values)
        else:
            _DEFINE[type(value)](name, value, text, flag_values=values)


def parsed(config: Any, values: flags.FlagValues, prefix: str = "") -> dict[str, Any]:
    """Returns the values of parsed flags as a nested dict, by group.

    Raises:
      InputError: If an item of a list is not of the type that the field declares.
    """
    tree: dict[str, Any] = {}
    for name, field, default in leaves(config, prefix):
        value = values[name].value
        if isinstance(default, list):
            (item_type,) = typing.get_args(field.type)
            try:
                value = [item_type(item) for item in value]
            except ValueError:
                raise InputError(
                    f"--{name}={','.join(value)}: expected integers separated by commas"
                ) from None
        group, dot, _ = name.rpartition(".")
        (tree.setdefault(group, {}) if dot else tree)[field.name] = value
    return tree


def names(tree: dict[str, Any], prefix: str = "") -> set[str]:
    """Returns the names of all values of a nested dict, as `group.field`."""
    found: set[str] = set()
    for name, value in tree.items():
        full_name = f"{prefix}{name}"
        found |= names(value, f"{full_name}.") if isinstance(value, dict) else {full_name}
    return found
