"""Whether a place can be written to, told before anything is."""

import os
import tempfile
from pathlib import Path

import pytest

from megatron_brain.files import file_problem, folder_problem

NOBODY = 65534


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("place", ["runs", "runs/a/b", ".", "new"])
def test_a_place_that_can_be_made_is_fine_and_nothing_is_left_there(place):
    assert folder_problem("--save", place) is None
    assert file_problem("--output", f"{place}/out.jsonl") is None
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize("place", ["~/runs", "~", "~nobody/x", "$HOME/runs", "${RUNS}/a"])
def test_what_a_shell_had_to_replace_is_not_taken_for_a_name(place):
    start = place.partition("/")[0]
    for problem in (folder_problem("--save", place), file_problem("--save", f"{place}/out")):
        assert f"--save {place}" in problem and f"begins with {start}, which no shell has replaced here" in problem
    Path(start).mkdir()
    assert folder_problem("--save", place) is None, "a folder of that name is there: it is the one that is meant"


def test_files_where_folders_must_be_and_the_other_way_are_named():
    Path("file").touch()
    Path("folder").mkdir()
    Path("gone").symlink_to("nowhere")
    os.mkfifo("pipe")
    for place in ("file", "file/in/it"):
        assert "is a file, and should be a folder; give another folder" in folder_problem("--save", place)
        assert "is a file, and should be a folder; give another file" in file_problem("--output", f"{place}/out")
    assert "is a link to nothing" in folder_problem("--save", "gone")
    for place in ("folder", "folder/", "new/"):
        assert "is a folder; give the name of a file in it" in file_problem("--output", place)
    assert "is a device or a pipe, which a file would replace" in file_problem("--output", "pipe")
    assert "is a device or a pipe" in file_problem("--output", "/dev/null")
    assert file_problem("--output", "file") is None, "it is written anew"


def test_names_that_no_file_can_have_are_told():
    assert "cannot be looked at (File name too long)" in folder_problem("--save", "a" * 300)
    assert "cannot be looked at (File name too long)" in file_problem("--output", "a" * 300)


def test_a_place_that_is_only_read_is_told():
    for problem in (folder_problem("--save", "/proc/new"), file_problem("--output", "/proc/new/out")):
        assert "/proc cannot be written to" in problem


def test_a_folder_without_the_right_to_write_is_told(tmp_path):
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as folder:  # Not below tmp_path, which nobody else may look into.
        locked = Path(folder) / "locked"
        locked.mkdir(mode=0o555)
        Path(folder).chmod(0o755)
        if user == 0:  # root may write anywhere
            os.seteuid(NOBODY)
        try:
            problem = folder_problem("--save", str(locked / "a"))
        finally:
            os.seteuid(user)
    assert "locked cannot be written to (Permission denied)" in problem
