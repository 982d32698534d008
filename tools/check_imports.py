"""Imports every module of megatron_brain and prints the versions of what it needs; no GPU is needed.

Transformer Engine may need the driver's libraries, which a machine that builds an image lacks. It is imported as a run
imports it, and any problem is printed.
"""

import importlib
import pkgutil
from importlib.metadata import PackageNotFoundError, version

import megatron_brain
from megatron_brain.runtime import transformer_engine

PACKAGES = ("torch", "megatron-core", "transformer-engine", "apex", "transformers")


def main() -> None:
    """Import everything. An error of an import is raised."""
    problem = transformer_engine.problem()  # before anything imports megatron-core
    names = [module.name for module in pkgutil.walk_packages(megatron_brain.__path__, "megatron_brain.")]
    for name in names:
        importlib.import_module(name)
    print(f"{len(names)} modules of megatron_brain {megatron_brain.__version__} imported, with")
    for package in PACKAGES:
        print(f"  {package} {_version(package)}")
    print(f"Transformer Engine here: {problem or 'can be imported'}")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    main()
