# Makes the virtual environment .venv (VENV=DIR chooses another) with megatron_brain and the extras named, and enters it.
#
#   source tools/environment.sh [extra ...]
#
# Reuses what is there. The versions are those of constraints-cpu.txt; PYTHON names the interpreter (default python3.11,
# else python3).

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
source "$venv/bin/activate"

# What was installed is remembered by the text that decides it.
for extra in "$@"; do
    stamp="$venv/.installed-$extra-$(cat setup.py constraints-cpu.txt | sha256sum | cut -c1-16)"
    if [ ! -e "$stamp" ]; then
        echo "installing megatron_brain[$extras]"
        pip install --quiet --disable-pip-version-check -c constraints-cpu.txt -e ".[$extras]"
        for each in "$@"; do touch "$venv/.installed-$each-${stamp##*-}"; done
        break
    fi
done
