"""Versions of what computes, and the commit of the checkout."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Iterable, Mapping

from settings import ROOT

import megatron_brain

PACKAGES = ("torch", "megatron-core", "transformers")


def versions() -> dict[str, str]:
    """Versions of Python and of what computes, and the commit of the checkout, as they are now."""
    found = {"python": platform.python_version(), "megatron_brain": megatron_brain.__version__}
    found |= {name: importlib.metadata.version(name) for name in PACKAGES}
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    git = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return found | {"commit": git.stdout.strip() if git.returncode == 0 else "unknown"}


def joined(several: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """One mapping of several: different versions of a package stand one after the other with commas between them."""
    found: dict[str, list[str]] = {}
    for each in several:
        for name, version in each.items():
            if version not in found.setdefault(name, []):
                found[name].append(version)
    return {name: ", ".join(each) for name, each in found.items()}
