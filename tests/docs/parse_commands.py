"""Parses commands with the real flags of their modules; `test_docs` runs it as a program.

Reads `[[module, [argument, ...]], ...]` as JSON from standard input and writes JSON: for each
command why it does not parse ("" if it does), and for each module its flags and its help.
"""

import importlib
import json
import sys

from absl import flags

from vixml_jax import command_line, config
from vixml_jax.errors import InputError


def find(name):
    """The module that `python -m NAME` runs."""
    module = importlib.import_module(name)
    return importlib.import_module(f"{name}.__main__") if hasattr(module, "__path__") else module


def define(module):
    """The flags that a command defines, on a `FlagValues` of their own."""
    before = set(flags.FLAGS)
    module.define_flags()
    own = [name for name in flags.FLAGS if name not in before]
    values = flags.FlagValues()
    for name in (*own, "quiet", "verbose"):
        values[name] = flags.FLAGS[name]
    return own, values


def undefine(names):
    for name in names:
        delattr(flags.FLAGS, name)


def why_not(module, arguments):
    """What is wrong with the arguments of a command; '' if nothing is."""
    own, values = define(module)
    try:
        if {"--help", "--help=all", "--version"} & set(arguments):
            return ""
        rest = values([module.__name__, *command_line.expand(arguments)])[1:]
        if rest:
            return f"arguments that are no flags: {rest}"
        if module.__name__ == "vixml_jax.train":
            config.from_flags(values)
        return ""
    except (flags.Error, InputError) as error:
        return str(error)
    finally:
        undefine(own)


def main():
    for name in ("quiet", "verbose"):  # As `command_line.launch` does.
        flags.DEFINE_boolean(name, False, "")
    commands = json.load(sys.stdin)
    modules = {name: find(name) for name, _ in commands}
    about = {}
    for name, module in modules.items():
        own, _ = define(module)
        help = command_line.full_help(module.main, own) if hasattr(module, "main") else ""
        about[name] = {"flags": own, "help": help}
        undefine(own)
    faults = [why_not(modules[name], arguments) for name, arguments in commands]
    json.dump({"faults": faults, "modules": about}, sys.stdout)


if __name__ == "__main__":
    main()
