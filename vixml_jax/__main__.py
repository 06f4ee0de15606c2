"""Lists the commands or runs one: `python -m vixml_jax COMMAND`, installed as `vixml_jax`."""

import difflib
import importlib
import sys

COMMANDS = {
    "prepare": ("vixml_jax.prepare", "prepare a data set: read, split, tokenize, embed images"),
    "train": ("vixml_jax.train", "train a model and evaluate it"),
    "evaluate": ("vixml_jax.evaluate", "evaluate a run, write its report, tune it"),
    "compare": ("vixml_jax.evaluation.compare", "compare two runs, query by query"),
    "report": ("vixml_jax.report.dashboard", "compare runs on a page: curves, metrics, flags"),
    "predict": ("vixml_jax.predict", "predict labels of new queries; add and remove labels"),
    "serve": ("vixml_jax.service.serve", "answer queries over HTTP"),
    "export": ("vixml_jax.export", "export a run for other programs"),
}


def main() -> None:
    """Runs the command that the first argument names."""
    from vixml_jax.runtime import signals

    signals.end_at_once(resumable=sys.argv[1:2] == ["train"])
    from vixml_jax import command_line

    name, rest = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    if name in ("--version", "-version"):
        print(command_line.version())
    elif name in ("--help", "-h", "help"):
        print("Extreme multi-label classification with text and images.\n")
        print("Usage: vixml_jax COMMAND [--flag=value ...]\n\nCommands:")
        for command, (_, about) in COMMANDS.items():
            print(f"  {command:9} {about}")
        print("\n`vixml_jax COMMAND --help` lists the flags of a command.")
    elif name not in COMMANDS:
        similar = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"; did you mean {similar[0]}?" if similar else ""
        print(
            f"error: {name}: expected one of {', '.join(COMMANDS)}{hint}",
            file=sys.stderr,
        )
        sys.exit(2)
    else:
        module = importlib.import_module(COMMANDS[name][0])
        sys.argv = [f"vixml_jax {name}", *rest]
        command_line.launch(
            module.main,
            module.define_flags,
            common=getattr(module, "COMMON_FLAGS", ()),
            resumable=name == "train",
        )


if __name__ == "__main__":
    main()
