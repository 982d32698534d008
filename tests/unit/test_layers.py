"""The layers of the package, lowest first: a module imports from its own layer and from those below, nowhere else."""

import ast
from collections.abc import Iterator
from pathlib import Path

import megatron_brain

PACKAGE = Path(megatron_brain.__file__).parent

LAYERS = (
    "errors",
    "flag_types",
    "files",
    "user_functions",
    "config",
    "runtime",
    "data",
    "models",
    "checkpointing",
    "conversion",
    "startup",
    "generation",
    "objectives",
    "planning",
    "training",
    "stages",
    "dry_run",
    "commands",
    "__main__",
)


def layer(module: str) -> str:
    """The part of a module's name that says its layer, e.g. `data` of `megatron_brain.data.records`."""
    return module.split(".")[1]


def imports(source: str) -> Iterator[str]:
    """Modules of the package that a source imports, wherever in the file it does, or may import from."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "megatron_brain":
            names = [f"megatron_brain.{alias.name}" for alias in node.names]
        else:
            names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        yield from (name for name in names if name.startswith("megatron_brain."))


def arrows_back(module: str, source: str) -> list[str]:
    """Imports of a module from layers above its own."""
    mine = LAYERS.index(layer(module))
    return [f"{module} -> {name}" for name in imports(source) if LAYERS.index(layer(name)) > mine]


def modules() -> dict[str, Path]:
    """Files of the package by the name of their module, without the package itself, which registers the stages."""
    names = {path: ".".join(("megatron_brain", *path.relative_to(PACKAGE).with_suffix("").parts)) for path in files()}
    return {name: path for path, name in names.items() if name != "megatron_brain.__init__"}


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def test_every_module_is_in_a_layer_and_every_layer_has_modules():
    assert {layer(name) for name in modules()} == set(LAYERS)


def test_no_import_runs_back_up():
    found = [arrow for name, path in modules().items() for arrow in arrows_back(name, path.read_text(encoding="utf-8"))]
    assert not found


def test_an_arrow_back_is_seen_in_a_function_and_in_every_form():
    planted = "def f():\n    from megatron_brain.training.run import Run\n    import megatron_brain.stages.answers\n"
    planted += "    from megatron_brain import commands, files\n"
    assert arrows_back("megatron_brain.data.corpus", planted) == [
        "megatron_brain.data.corpus -> megatron_brain.training.run",
        "megatron_brain.data.corpus -> megatron_brain.stages.answers",
        "megatron_brain.data.corpus -> megatron_brain.commands",
    ]


def test_objectives_know_no_other_layer_but_errors():
    of_objectives = {
        layer(name)
        for module, path in modules().items()
        if layer(module) == "objectives"
        for name in imports(path.read_text(encoding="utf-8"))
    }
    assert of_objectives <= {"errors", "objectives"}
