"""A failure of our own code keeps its traceback and exits with 1. Only a UserError is a mistake of the user."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator

import pytest

from bad_inputs.assets import commands_that_are_right
from bad_inputs.case import Site
from bad_inputs.running import ROOT, run_here
from megatron_brain.config.stage_spec import stages

PLANTED = [
    # (layer, command of `commands_that_are_right`, the function that fails)
    ("config", "sft", "megatron_brain.config.loader.convert"),
    ("runtime", "sft", "megatron_brain.runtime.parallel.start"),
    ("data", "sft", "megatron_brain.data.records.fit_group"),
    ("data", "reward", "megatron_brain.data.drafts.conversations.is_messages"),
    ("data, prepared", "preprocess_data", "megatron_brain.data.prepared.preparation.count_duplicates"),
    ("data, checked", "check_data", "megatron_brain.data.records.draft_demonstration"),
    ("tokenizer", "sft", "megatron_brain.data.tokenizer.huggingface.settle_bos"),
    ("tokenizer, its file", "sft from nothing", "megatron_brain.data.tokenizer.own_file._read_own"),
    ("chat template", "sft on chats", "megatron_brain.data.tokenizer.chat_template.ChatRenderer.template_for"),
    ("models", "sft", "megatron_brain.models.gpt.PackedLayout"),
    ("checkpointing, save", "sft", "megatron_brain.checkpointing.storage.write_file"),
    ("checkpointing, load", "sft resumed", "megatron_brain.checkpointing.storage.fill"),
    ("checkpointing, index", "inspect_checkpoint", "megatron_brain.checkpointing.index.tiles"),
    ("conversion", "sft from Hugging Face", "megatron_brain.conversion.config_json._read_rope"),
    ("conversion, in", "convert_hf_to_megatron", "megatron_brain.conversion.registry._family_of"),
    ("conversion, out", "convert_megatron_to_hf", "megatron_brain.conversion.to_hf.check_fits"),
    ("generation", "generate", "megatron_brain.generation.sampler.choose_tokens"),
    ("objectives", "brain", "megatron_brain.objectives.brain.check_group"),
    ("planning", "plan", "megatron_brain.planning.search._plan"),
    ("training", "reward", "megatron_brain.training.schedule._run"),
    ("stages", "sft", "megatron_brain.stages.dataset_stage.replica_share"),
    ("stages, rollouts", "brain on rollouts", "megatron_brain.stages.brain.rollouts.rollout_from_dict"),
    ("stages, evaluate", "evaluate", "megatron_brain.stages.intervals.Estimate"),
    ("dry run", "sft, dry run", "megatron_brain.dry_run.report.render"),
    ("command", "check_data", "megatron_brain.commands.check_data.check"),
    ("command", "preprocess_data", "megatron_brain.commands.preprocess_data.prepare"),
    ("command", "train_tokenizer", "megatron_brain.data.tokenizer.training.parse_record"),
    ("command", "inspect_checkpoint", "megatron_brain.checkpointing.inspection.find_damaged_boxes"),
    ("command", "plan", "megatron_brain.commands.plan._question"),
    ("command", "compare_runs", "megatron_brain.commands.compare_runs.table"),
    ("command", "convert_hf_to_megatron", "megatron_brain.conversion.command._require_place"),
]


def _argv(command: str, site: Site) -> list[str]:
    commands = commands_that_are_right(site.assets, site.folder)
    commands["sft, dry run"] = [*commands["sft"], "--dry-run"]
    commands["compare_runs"] = ["compare_runs", f"one={site.assets.policy / 'metrics.jsonl'}", "--metrics", "loss"]
    return commands[command]


def planted(*arguments, **named):
    """Fails as our own code does if two lists have different lengths by mistake."""
    list(zip([1], [], strict=True))


def _parameters() -> Iterator:
    for layer, command, place in PLANTED:
        yield pytest.param(command, place, id=f"{layer}: {command}")


@pytest.mark.parametrize(("command", "place"), _parameters())
def test_a_failure_in_any_layer_keeps_its_traceback_and_exits_with_1(command, place, site, monkeypatch, capfd):
    argv = _argv(command, site)
    monkeypatch.setattr(place, planted)
    capfd.readouterr()
    try:
        status = run_here(argv)
    except Exception:  # The interpreter does this for a process.
        traceback.print_exc()
        status = 1
    said = capfd.readouterr().err
    assert status == 1, said
    assert "Traceback (most recent call last)" in said and ", in planted\n" in said, said
    assert "ValueError: zip() argument 2 is shorter than argument 1" in said, said
    # The processes of a conversion tell each other of a failure and stop together.
    assert command.startswith("convert_") or "\nerror: " not in f"\n{said}", said


@pytest.mark.parametrize(
    ("command", "place"),
    [("sft", "megatron_brain.data.records.fit_group"), ("check_data", "megatron_brain.data.records.fit_group")],
)
def test_so_it_does_in_a_process_of_its_own(command, place, site):
    name, *flags = _argv(command, site)
    as_module = "megatron_brain" if name in stages() else f"megatron_brain.commands.{name}"
    module, _, function = place.rpartition(".")
    code = (
        f"import {module}, runpy, sys\n"
        "def planted(*arguments, **named): list(zip([1], [], strict=True))\n"
        f"{module}.{function} = planted\n"
        f"runpy.run_module({as_module!r}, run_name='__main__', alter_sys=True)\n"
    )
    arguments = [name, *flags] if name in stages() else flags
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=site.folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.endswith("ValueError: zip() argument 2 is shorter than argument 1\n")
    assert "in planted\n" in done.stderr and "\nerror: " not in f"\n{done.stderr}"


def test_so_does_a_benchmark(monkeypatch):
    monkeypatch.setattr("benchmarks.update._parts", planted)
    with pytest.raises(ValueError, match=r"zip\(\) argument 2 is shorter"):
        importlib.import_module("benchmark").main(["update"])
