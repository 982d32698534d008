"""Every bad input gives one message with culprit and cure, and leaves nothing that looks complete.

`BadInput` in case.py describes a case. Each cases_*.py is the table of one category. Almost all run in this process.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from fnmatch import fnmatch

import pytest

from bad_inputs import (
    cases_checkpoints,
    cases_configuration,
    cases_environment,
    cases_files,
    cases_held_out,
    cases_hf_folders,
    cases_judges,
    cases_places,
    cases_prepared,
    cases_records,
    cases_rollouts,
    cases_starts,
    cases_templates,
    cases_tokenizers,
)
from bad_inputs.assets import commands_that_are_right
from bad_inputs.case import BadInput
from bad_inputs.running import Outcome, run_apart, run_here, snapshot

TABLES: dict[str, list[BadInput]] = {
    "configuration": cases_configuration.CASES,
    "data file": cases_files.CASES,
    "record": cases_records.CASES,
    "prepared data": cases_prepared.CASES,
    "tokenizer": cases_tokenizers.CASES,
    "chat template": cases_templates.CASES,
    "checkpoint": cases_checkpoints.CASES,
    "start": cases_starts.CASES,
    "Hugging Face folder": cases_hf_folders.CASES,
    "rollouts": cases_rollouts.CASES,
    "environment": cases_environment.CASES,
    "judge": cases_judges.CASES,
    "held-out": cases_held_out.CASES,
    "place to write": cases_places.CASES,
}
"""Cases by category."""


def _parameters() -> Iterator:
    for category, cases in TABLES.items():
        for case in cases:
            yield pytest.param(case, id=f"{category}: {case.name}")


@pytest.mark.parametrize("case", _parameters())
def test_one_message_names_culprit_and_cure_and_nothing_is_left_that_looks_complete(case, site, monkeypatch, capfd):
    argv = [str(argument) for argument in case.argv(site)]
    before = snapshot(site.folder)
    outcome = _run(case, argv, monkeypatch, capfd)

    told = f"{' '.join(argv[:1])} ended with {outcome.status}\nstdout: {outcome.out[-1500:]}\nstderr: {outcome.err}"
    assert outcome.status == case.status, told
    assert "Traceback (most recent call last)" not in outcome.out + outcome.err, told
    said = outcome.out if case.on_stdout else outcome.message
    assert not outcome.strange_lines, told
    assert case.has_several_lines or case.on_stdout or said.count("\n") == 1, told
    assert re.search(case.culprit, said), f"no {case.culprit!r}\n{told}"
    assert re.search(case.cure, said), f"no {case.cure!r}\n{told}"
    after = snapshot(site.folder)
    changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    assert [name for name in changed if not any(fnmatch(name, pattern) for pattern in case.leaves)] == [], told


def _run(case: BadInput, argv: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> Outcome:
    if case.as_process:
        return run_apart(argv, case.environment)
    for name, value in case.environment.items():
        monkeypatch.setenv(name, value)
    capfd.readouterr()
    status = run_here(argv)
    return Outcome(status, *capfd.readouterr())


def test_the_commands_succeed_where_nothing_is_wrong_with_their_input(site):
    commands = commands_that_are_right(site.assets, site.folder)
    statuses = {name: run_here(argv) for name, argv in commands.items()}
    assert statuses == dict.fromkeys(commands, 0)
    left = set(os.listdir(site.folder))
    assert {"samples.jsonl", "report.json", "prepared.json", "made", "converted", "exported", "saved"} <= left


def test_every_category_has_several_cases_and_no_two_cases_are_the_same():
    names = [(category, case.name) for category, cases in TABLES.items() for case in cases]
    assert len(names) == len(set(names)) >= 100
    assert all(len(cases) >= 8 for cases in TABLES.values())
