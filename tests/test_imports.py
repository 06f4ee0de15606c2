"""Which package may import which: read from the source of every module."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1] / "vixml_jax"
MODULES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
NAMES = {str(path.with_suffix("")).replace("/", ".").removesuffix(".__init__") for path in MODULES}
# From the entry points down to the ground. A module imports its own package and lower layers, but
# no other package of its own layer.
LAYERS = (
    ("benchmarks", "__main__"),
    ("train", "export"),
    ("evaluate",),
    ("predict", "prepare"),
    ("command_line",),
    ("service",),
    ("serving", "training", "report"),
    ("evaluator",),
    ("augmentation",),
    ("saved_model",),
    ("workdir", "image_encoding"),
    ("frozen_weights", "modeling", "run_data"),
    ("search",),
    ("labels",),
    ("models",),
    ("config",),
    ("flag_groups",),
    ("evaluation",),
    ("data",),
    ("parallel",),
    ("storage", "structs"),
    ("runtime",),
    ("errors", "__init__"),
)
RANK = {package: rank for rank, layer in enumerate(LAYERS) for package in layer}
# Beside the layers: packages that run without JAX.
WITHOUT_JAX = ("data", "evaluation", "errors", "config", "flag_groups", "command_line", "structs")
HEAVY = {
    "grain", "jinja2", "markdown_it", "matplotlib", "orbax", "prometheus_client", "scann",
    "starlette", "tensorboardX", "tensorflow_datasets", "torch", "tqdm", "transformers", "uvicorn",
}  # fmt: skip
# Modules outside models/ that define or initialise Flax modules.
FLAX = {"labels/prototypes.py", "parallel/sharding.py", "training/build.py"}
# Modules of packages that are commands too, and that the package itself loads on demand.
COMMANDS = {
    "evaluation/compare.py", "report/curves.py", "report/dashboard.py", "service/serve.py"
}  # fmt: skip


def imports(path):
    """(module or name in it, whether at the top level) of all that a module imports."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        top = node in tree.body
        if isinstance(node, ast.Import):
            yield from ((alias.name, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{node.module}.{alias.name}", top) for alias in node.names)


def module_of(name):
    """The module of this package that an imported name is, or is in; None: of another package."""
    while name.startswith("vixml_jax"):
        if name.removeprefix("vixml_jax.") in NAMES or name == "vixml_jax":
            return name.removeprefix("vixml_jax").removeprefix(".") or "__init__"
        name = name.rpartition(".")[0]
    return None


def package_of(path):
    return path.parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_go_downwards(path):
    package = package_of(path)
    for name, _ in imports(path):
        module = module_of(name)
        if module is None:
            continue
        other = module.split(".")[0]
        if (path.as_posix() in COMMANDS and other == "command_line") or path.name == "__init__.py":
            continue  # `vixml_jax.Predictor` is imported on first use.
        allowed = RANK[other] > RANK[package] or other == package or other == "__init__"
        assert allowed, f"{path} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_heavy_libraries_are_imported_where_they_are_used(path):
    for name, top in imports(path):
        first = name.split(".")[0]
        if top and package_of(path) not in ("benchmarks", "report", "service"):
            assert first not in HEAVY, f"{path} imports {first} at its top"
        if package_of(path) in WITHOUT_JAX:
            assert first not in ("jax", "flax", "optax"), f"{path} imports {name}"
        if name.startswith("flax") and package_of(path) not in ("models", "benchmarks"):
            assert path.as_posix() in FLAX, f"{path} imports {name}"


def test_no_module_imports_itself_in_a_circle():
    graph = {}
    for path in MODULES:
        name = str(path.with_suffix("")).replace("/", ".").removesuffix(".__init__")
        found = {module_of(imported) for imported, _ in imports(path)}
        graph[name] = {other for other in found if other and other not in (name, "__init__")}
    done = set()

    def visit(name, trail):
        assert name not in trail, " -> ".join([*trail, name])
        if name in done:
            return
        for other in graph.get(name, ()):
            visit(other, [*trail, name])
        done.add(name)

    for name in graph:
        visit(name, [])


def test_every_package_says_what_it_is_for():
    for path in ROOT.rglob("__init__.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), f"{path} has no docstring"


def test_files_and_directories_stay_small():
    for path in MODULES:
        lines = (ROOT / path).read_text(encoding="utf-8").count("\n")
        assert lines <= 500, f"{path} has {lines} lines"
    for directory in {path.parent for path in MODULES}:
        count = len(list((ROOT / directory).glob("*.py")))
        assert count <= 19, f"{directory} has {count} modules"
