# Makes the virtual environment .venv (VENV=DIR chooses another) with megatron_brain and the extras named, and enters it.
#
#   source tools/environment.sh [extra ...]
#
# Reuses what is there. PYTHON names the interpreter (default python3.11, else python3); the versions are those of
# constraints-cpu-X.Y.txt for Python X.Y where there is such a file, else of constraints-cpu.txt.
# shellcheck shell=bash

venv=${VENV:-.venv}
extras=$(IFS=,; echo "$*")
interpreter=${PYTHON:-$(command -v python3.11 || command -v python3)}

if [ ! -x "$venv/bin/python" ]; then
    echo "making $venv with $("$interpreter" --version)"
    "$interpreter" -m venv "$venv" || {
        echo "no virtual environment can be made: on Debian or Ubuntu, apt-get install python3-venv" >&2
        exit 1
    }
fi
# shellcheck source=/dev/null # made above
source "$venv/bin/activate"

constraints=constraints-cpu-$(python -c 'import sys; print("{}.{}".format(*sys.version_info))').txt
[ -e "$constraints" ] || constraints="constraints-cpu.txt"

# What was installed is remembered by the text that decides it.
for extra in "$@"; do
    stamp="$venv/.installed-$extra-$(cat setup.py tools/install.py "$constraints" | sha256sum | cut -c1-16)"
    if [ ! -e "$stamp" ]; then
        echo "installing megatron_brain[$extras]"
        # The part that a Docker image brings, then what the Dockerfile runs.
        pip install --quiet --disable-pip-version-check -c "$constraints" torch
        python tools/install.py --constraints "$constraints" --extras "$extras"
        for each in "$@"; do touch "$venv/.installed-$each-${stamp##*-}"; done
        break
    fi
done
