"""Who may call whom: the imports of every module, read from its source."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1] / "vixml_jax"
MODULES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
HEAVY = {
    "grain",
    "matplotlib",
    "orbax",
    "scann",
    "tensorboardX",
    "tensorflow_datasets",
    "torch",
    "tqdm",
    "transformers",
}
LINEN = {
    "benchmarks/scaling.py",
    "labels/combiner.py",
    "training/step.py",
    "training/loop.py",
    "sharding.py",
    "runs.py",
    "train.py",
    "benchmarks/train_step.py",
    "benchmarks/encode.py",
    "benchmarks/memory.py",
    "benchmarks/predict.py",
    "benchmarks/vision.py",
}
# A room and the rooms that it must not reach, by the first parts of the module's name.
FORBIDDEN = {
    "axes": {"vixml_jax"},
    "structs": {"vixml_jax"},
    "data": {
        "jax",
        "flax",
        "optax",
        "vixml_jax.models",
        "vixml_jax.labels",
        "vixml_jax.training",
        "vixml_jax.search",
        "vixml_jax.encoding",
        "vixml_jax.config",
    },
    "evaluation": {
        "jax",
        "flax",
        "optax",
        "vixml_jax.models",
        "vixml_jax.labels",
        "vixml_jax.training",
        "vixml_jax.search",
        "vixml_jax.encoding",
        "vixml_jax.config",
    },
    "models": {
        "vixml_jax.data",
        "vixml_jax.labels",
        "vixml_jax.training",
        "vixml_jax.search",
        "vixml_jax.encoding",
        "vixml_jax.config",
    },
    "labels": {
        "vixml_jax.data",
        "vixml_jax.training",
        "vixml_jax.search",
        "vixml_jax.encoding",
        "vixml_jax.config",
    },
    "search": {
        "vixml_jax.data",
        "vixml_jax.training",
        "vixml_jax.models",
        "vixml_jax.encoding",
        "vixml_jax.config",
    },
    "encoding": {"vixml_jax.training", "vixml_jax.config"},
    "training": {"vixml_jax.train", "vixml_jax.evaluate", "vixml_jax.prepare"},
    "evaluate": {"vixml_jax.training"},
    "judging": {"vixml_jax.training", "vixml_jax.evaluate"},
    "serving": {"vixml_jax.training", "vixml_jax.evaluate", "vixml_jax.train"},
}


def imports(path):
    """(name, whether at the top level) of all that a module imports."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        top = node in tree.body
        if isinstance(node, ast.Import):
            yield from ((alias.name, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{node.module}.{alias.name}", top) for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_go_downwards(path):
    room = path.parts[0].removesuffix(".py")
    for name, top in imports(path):
        for banned in FORBIDDEN.get(room, ()):
            assert not (name == banned or name.startswith(banned + ".")), f"{path} imports {name}"
        first = name.split(".")[0]
        if top and room != "benchmarks":
            assert first not in HEAVY, f"{path} imports {first} at its top"
        if name.startswith("flax") and room != "models":
            assert path.as_posix() in LINEN, f"{path} imports {name}"
