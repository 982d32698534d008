"""Run a script and write the peak of this process's memory, pages of mapped files included, to a file.

python peak_memory.py FOLDER SCRIPT [ARGUMENT ...]
"""

import os
import runpy
import sys
from pathlib import Path


def main(folder: str, script: str, *arguments: str) -> None:
    sys.argv = [script, *arguments]
    # `python SCRIPT` puts this folder there.
    sys.path[0] = str(Path(script).parent)
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        # This is the peak of this program only; getrusage may give that of the process that started it.
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        peak = int(status["VmHWM"].split()[0]) * 1024
        (Path(folder) / os.environ.get("RANK", "0")).write_text(str(peak))


if __name__ == "__main__":
    main(*sys.argv[1:])
