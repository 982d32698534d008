"""Installs megatron_brain and what it needs. The PyTorch that is already installed stays unchanged.

    python tools/install.py --constraints FILE [--extras test,examples] [--ngc-image TAG]

The Dockerfile runs this on NVIDIA's image, tools/environment.sh in a virtual environment with a PyTorch from the
package index. It needs only the standard library and pip. FILE pins the versions that the tests ran with.
"""

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path

NGC_MEGATRON_CORE = {"26.06-py3": "0.19.2", "25.11-py3": "0.16.1"}
"""Tags of nvcr.io/nvidia/pytorch that we support, and for each the megatron-core whose release was developed with it
(docs/docker.md). The pairs were not run."""

# These are built for each other and for CUDA: a package of the index in place of one of them breaks the others.
_COMPILED = re.compile(r"torch|torch(vision|audio|-tensorrt)|(pytorch-)?triton|transformer-engine.*|apex|flash-attn.*")

_PIN = re.compile(r"([A-Za-z0-9._-]+)==([^\s;#]+)")


def main(argv: list[str] | None = None) -> None:
    """Install, and check that no compiled package was replaced.

    Raises:
        SystemExit: PyTorch is missing or would be replaced, pip failed, or the image is not one of ours.
    """
    arguments = _parser().parse_args(argv)
    before = installed_versions()
    if "torch" not in before:
        raise SystemExit("PyTorch is not installed: install it first, or build on an image that has it")
    specifiers = constraints(read_pins(arguments.constraints), before, arguments.ngc_image)
    with tempfile.NamedTemporaryFile("w", prefix="constraints-", suffix=".txt") as file:
        file.writelines(f"{name}{specifier}\n" for name, specifier in specifiers.items())
        file.flush()
        _pip_install(file.name, arguments.extras)
    importlib.invalidate_caches()
    after = installed_versions()
    if changes := changed_versions(compiled(before), compiled(after)):
        raise SystemExit("the installation replaced what it must leave alone: " + "; ".join(changes))
    kept = ", ".join(f"{name} {version}" for name, version in compiled(after).items())
    print(f"installed megatron_brain with megatron-core {after.get('megatron-core')}; as before: {kept}")


def installed_versions() -> dict[str, str]:
    """Version by normalized name of every installed distribution."""
    versions = {}
    for distribution in distributions():
        versions.setdefault(_normalized(distribution.metadata["Name"]), distribution.version)
    return versions


def read_pins(path: Path) -> dict[str, str]:
    """Version by normalized name of the `name==version` lines of a constraints file."""
    pins = (_PIN.match(line) for line in path.read_text().splitlines())
    return {_normalized(pin[1]): pin[2] for pin in pins if pin}


def constraints(tested: Mapping[str, str], installed: Mapping[str, str], ngc_image: str | None) -> dict[str, str]:
    """The constraints for pip: a version specifier for each package.

    Compiled packages keep their installed version. The others get the tested version; but a package of an image stays
    as long as it satisfies the requirements, and is never replaced by a later version than the tested one.

    Raises:
        SystemExit: `ngc_image` is not one of ours.
    """
    kept = {name: f"=={version}" for name, version in compiled(installed).items()}
    specifiers = {name: f"=={version}" for name, version in tested.items()}
    if ngc_image is None:
        return {**specifiers, **kept}
    if ngc_image not in NGC_MEGATRON_CORE:
        known = ", ".join(NGC_MEGATRON_CORE)
        raise SystemExit(
            f"no megatron-core is known to go with the image {ngc_image}; known: {known} (tools/install.py)"
        )
    # A specifier such as >= has no local part (+...).
    brought = {
        name: "<=" + max(tested[name], installed[name], key=_release).partition("+")[0]
        for name in tested
        if name in installed
    }
    return {**specifiers, **brought, **kept, "megatron-core": f"=={NGC_MEGATRON_CORE[ngc_image]}"}


def compiled(versions: Mapping[str, str]) -> dict[str, str]:
    """Those of the packages that an installation must not change, by name."""
    return {name: versions[name] for name in sorted(versions) if _COMPILED.fullmatch(name)}


def changed_versions(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """The differences, each as `name before -> after`."""
    names = sorted({*before, *after})
    return [
        f"{name} {before.get(name, '(none)')} -> {after.get(name, '(none)')}"
        for name in names
        if before.get(name) != after.get(name)
    ]


def _pip_install(constraints: str, extras: str) -> None:
    target = f".[{extras}]" if extras else "."
    command = ["install", "--quiet", "--disable-pip-version-check", "--constraint", constraints, "--editable", target]
    status = subprocess.run([sys.executable, "-m", "pip", *command], check=False).returncode
    if status:
        raise SystemExit(f"pip {' '.join(command)} failed with status {status}")


def _release(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version.partition("+")[0])]


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--constraints", type=Path, required=True, metavar="FILE", help="pins of the tested versions")
    parser.add_argument("--extras", default="", help="extras of setup.py, separated by commas")
    parser.add_argument("--ngc-image", metavar="TAG", help="tag of nvcr.io/nvidia/pytorch that this runs on")
    return parser


if __name__ == "__main__":
    main()
