"""The engine in the report of --dry-run: what servers are asked for, what they are given, and where it goes."""

import shutil

import pytest
from helpers.assets import size_flags
from helpers.reports import read_report

from megatron_brain.__main__ import main
from megatron_brain.dry_run import engine as engine_module
from megatron_brain.dry_run.engine import file_system

WRITTEN = 2 * 2**30
"""Bytes of a hand-over in these tests."""


@pytest.fixture
def dry_run(monkeypatch, capsys):
    """Dry run of a stage on 4 processes; gives the report as {section: {name: value}}."""
    monkeypatch.setenv("WORLD_SIZE", "4")

    def run(stage, *flags):
        argv = [stage, *size_flags(), "--seq-length", "128", "--tokenizer-model", "/no/tokenizer", "--load", "/no/p"]
        if stage == "brain":
            argv += ["--train-data", "/no/data.jsonl", "--finetune", "--reward-load", "/no/r"]
        assert main([*argv, *map(str, flags), "--dry-run"]) == 0
        return read_report(capsys.readouterr().out)

    return run


def servers(folder, urls="http://n1:8000,http://n2:8000"):
    return ["--engine", "vllm", "--engine-url", urls, "--engine-sync-dir", folder]


def test_servers_and_what_they_are_given_are_told(dry_run, monkeypatch):
    monkeypatch.setattr(engine_module, "sync_bytes", lambda model: WRITTEN)
    report = dry_run("brain", *servers("/no/sync"), "--engine-concurrency", 32)
    engine = report["Engine"]
    assert engine["engine"] == "2 vLLM servers, not asked here: http://n1:8000, http://n2:8000"
    assert engine["requests"] == "at most 32 at one time to a server"
    assert engine["hand-over of weights"] == "2.0 GiB in float32 to a new folder in /no/sync, 0.5 GiB by each process"
    assert engine["disk space"] == "6.0 GiB: the last two stay while one more is written"
    assert engine["shared folder"].startswith("not on this machine")
    assert engine["rounds ahead"].startswith("none") and "host memory for that" not in engine
    assert "at one time" not in report["Batch"]["sampled on a replica"]
    assert "kv cache" not in report["Memory per GPU, on the fullest (estimate)"]


def test_the_copy_of_rounds_ahead_takes_two_bytes_a_parameter_of_host_memory(dry_run):
    sizes = ["--hidden-size", 4096, "--ffn-hidden-size", 8192, "--num-layers", 8, "--num-attention-heads", 32]
    report = dry_run("brain", *sizes, *servers("/no/sync"), "--rounds-ahead", 1, "--bf16")
    parameters = int(report["Model"]["parameters per GPU"].split()[0].replace(",", ""))
    gib = 2 * parameters / 2**30
    assert report["Engine"]["host memory for that"].startswith(
        f"{gib:.1f} GiB for each process, {4 * gib:.1f} GiB on a"
    )


def test_a_shared_folder_is_tried_and_a_local_disk_or_too_little_space_is_a_warning(dry_run, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(engine_module, "sync_bytes", lambda model: WRITTEN)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=3 * WRITTEN))
    monkeypatch.setattr(engine_module, "file_system", lambda folder: "nfs4")
    shared = dry_run("brain", *servers(tmp_path))["Engine"]
    assert shared["shared folder"] == "can be written to here, 6.0 GiB free, on nfs4" and "warning" not in shared

    monkeypatch.setattr(engine_module, "file_system", lambda folder: "ext4")
    assert dry_run("brain", *servers(tmp_path))["Engine"]["warning"].endswith("does http://n1:8000 see it?")
    assert "warning" not in dry_run("brain", *servers(tmp_path, "http://localhost:8000"))["Engine"]

    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=3 * WRITTEN - 2**30))
    warning = dry_run("brain", *servers(tmp_path, "http://localhost:8000"))["Engine"]["warning"]
    assert warning == f"{tmp_path} has 5.0 GiB free, and hand-overs take 6.0 GiB"


def test_a_folder_that_cannot_be_written_to_is_a_warning(dry_run, tmp_path, monkeypatch):
    monkeypatch.setattr(engine_module, "folder_problem", lambda flag, place: f"{flag} {place}: read-only; give another")
    warning = dry_run("brain", *servers(tmp_path))["Engine"]["warning"]
    assert warning == f"--engine-sync-dir {tmp_path}: read-only; give another"


@pytest.mark.parametrize("stage", ["generate", "brain"])
def test_our_own_sampler_needs_no_servers(dry_run, stage):
    flags = [] if stage == "brain" else ["--prompts", "/no/prompts.jsonl", "--output", "/no/output.jsonl"]
    report = dry_run(stage, *flags)
    assert report["Engine"] == {"engine": "native: our sampler, on the GPUs of the run"}
    assert "at one time" in str(report["Batch"])


def test_the_file_system_is_that_of_the_nearest_mount(tmp_path, monkeypatch):
    known = "/proc/self/mounts"
    if not engine_module.Path(known).is_file():
        pytest.skip("only Linux lists its mounts")
    assert file_system(engine_module.Path("/proc")) == "proc"
    mounts = f"disk / ext4 rw 0 0\nserver:/x {tmp_path}/a\\040b nfs4 rw 0 0\n"
    monkeypatch.setattr(engine_module.Path, "read_text", lambda path: mounts)
    (tmp_path / "a b" / "c").mkdir(parents=True)
    assert file_system(tmp_path / "a b" / "c") == "nfs4" and file_system(tmp_path) == "ext4"
