"""tools/install.py leaves PyTorch and what is compiled for it alone. pip is a stand-in on PYTHONPATH."""

import os
import re
import runpy
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools/install.py"
CONSTRAINTS = ROOT / "constraints-cpu-3.12.txt"

# As NVIDIA's images name theirs.
IMAGE = {"torch": "2.13.0a0+8145d630e8.nv26.06", "transformer_engine": "2.16.0+5671fd3", "pyarrow": "1.0"}

# Writes down what it was called with; REPLACE=name==version puts such a package where the image's is.
PIP = """
import os, pathlib, shutil, sys
folder = pathlib.Path(__file__).parents[1]
(folder / "called").write_text("\\n".join(sys.argv[1:]))
shutil.copy(sys.argv[sys.argv.index("--constraint") + 1], folder / "constraints")
if "REPLACE" in os.environ:
    name, version = os.environ["REPLACE"].split("==")
    for old in folder.glob(f"{name}-*.dist-info"):
        shutil.rmtree(old)
    new = folder / f"{name}-{version}.dist-info"
    new.mkdir()
    (new / "METADATA").write_text(f"Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
sys.exit(int(os.environ.get("STATUS", "0")))
"""


@pytest.fixture(scope="module")
def functions():
    return runpy.run_path(str(SCRIPT))


@pytest.fixture
def image(tmp_path, monkeypatch):
    """A folder of packages that come before those installed here, pip among them."""
    for name, version in IMAGE.items():
        (tmp_path / f"{name}-{version}.dist-info").mkdir()
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (tmp_path / f"{name}-{version}.dist-info/METADATA").write_text(text)
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip/__init__.py").touch()
    (tmp_path / "pip/__main__.py").write_text(PIP)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def run(image, **environment):
    """The script in a folder without a setup.py, where the real pip would find nothing to install."""
    command = [sys.executable, SCRIPT, "--constraints", CONSTRAINTS, "--ngc-image", "26.06-py3"]
    settings = {"capture_output": True, "text": True, "timeout": 60, "check": False, "cwd": image}
    return subprocess.run(command, env=os.environ | environment, **settings)


def test_pip_is_told_to_keep_what_is_compiled_and_to_install_the_pair_of_the_image(image):
    result = run(image)
    assert result.returncode == 0, result.stderr
    assert "torch 2.13.0a0+8145d630e8.nv26.06, transformer-engine 2.16.0+5671fd3" in result.stdout
    assert (image / "called").read_text().splitlines()[-2:] == ["--editable", "."]
    told = (image / "constraints").read_text().splitlines()
    assert {"torch==2.13.0a0+8145d630e8.nv26.06", "transformer-engine==2.16.0+5671fd3"} <= set(told)
    assert "megatron-core==0.19.2" in told
    assert len([line for line in told if re.match(r"torch[=<]", line)]) == 1


@pytest.mark.parametrize(
    ("replaced", "told"),
    [
        ("torch==2.14.1", "torch 2.13.0a0+8145d630e8.nv26.06 -> 2.14.1"),
        ("transformer_engine==2.20.2", "transformer-engine 2.16.0+5671fd3 -> 2.20.2"),
        ("apex==0.9.10.dev0", "apex (none) -> 0.9.10.dev0"),
    ],
)
def test_it_fails_where_pip_has_replaced_one_of_them(image, replaced, told):
    result = run(image, REPLACE=replaced)
    assert result.returncode == 1
    assert result.stderr.strip() == f"the installation replaced what it must leave alone: {told}"


def test_it_fails_where_pip_does(image):
    result = run(image, STATUS="3")
    assert result.returncode == 1 and "failed with status 3" in result.stderr


def test_without_an_image_every_package_comes_as_tested_but_the_compiled_ones(functions):
    tested = {"torch": "2.13.0", "megatron-core": "0.16.1", "rich": "15.0.0"}
    told = functions["constraints"](tested, {"torch": "2.13.0+cpu", "rich": "13.0"}, None)
    assert told == {"torch": "==2.13.0+cpu", "megatron-core": "==0.16.1", "rich": "==15.0.0"}


def test_what_an_image_brings_stays_or_becomes_the_tested_version(functions):
    tested = {"megatron-core": "0.19.2", "numpy": "2.10.1", "protobuf": "7.36.2", "rich": "15.0.0"}
    installed = {"torch": "2.13.0a0+nv", "numpy": "2.9.0+nv", "protobuf": "8.0"}
    told = functions["constraints"](tested, installed, "25.11-py3")
    assert told == {
        "megatron-core": "==0.16.1",
        "numpy": "<=2.10.1",
        "protobuf": "<=8.0",
        "rich": "==15.0.0",
        "torch": "==2.13.0a0+nv",
    }


def test_an_image_that_no_megatron_core_is_known_for_is_refused(functions):
    with pytest.raises(SystemExit, match=r"image 24\.01-py3; known: 26\.06-py3, 25\.11-py3"):
        functions["constraints"]({}, {"torch": "2.2"}, "24.01-py3")


@pytest.mark.parametrize("name", ["apex", "transformer-engine"])
def test_it_is_never_taken_from_the_package_index(functions, name):
    for file in ROOT.glob("constraints-cpu*.txt"):
        assert name not in functions["read_pins"](file)
    asking = [line for line in requires("megatron_brain") if re.match(rf"{name}\b", line)]
    # By hand, beside a torch for CUDA: pip install .[gpu].
    assert all('extra == "gpu"' in line.replace("'", '"') for line in asking)
    assert "gpu" not in (ROOT / "tools/environment.sh").read_text()
