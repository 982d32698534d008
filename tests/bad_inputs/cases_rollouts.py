"""Rollout files of another format, with bad numbers, or for another model or batch."""

from __future__ import annotations

import json
from collections.abc import Callable

from bad_inputs.case import BadInput, Maker


def _groups(change: Callable[[list[dict]], object], *flags: str) -> Maker:
    """Changes a round of four groups and trains on it."""

    def make(site):
        groups = [json.loads(line) for line in site.assets.rollouts.read_text().splitlines()]
        change(groups)
        return site.assets.brain_from("--rollout-data", site.write_records("r.jsonl", *groups), *flags)

    return make


def _group(**changes: object) -> Maker:
    return _groups(lambda groups: groups[1].update(changes))


def _response(**changes: object) -> Maker:
    return _groups(lambda groups: groups[1]["responses"][0].update(changes))


def _content(content: str) -> Maker:
    return lambda site: site.assets.brain_from("--rollout-data", site.write("r.jsonl", content))


def _bad_second_file(site):
    site.write("r0.jsonl", site.assets.rollouts.read_text())
    site.write("r1.jsonl", "{oops\n")
    return site.assets.brain_from("--rollout-data", "r*.jsonl")


def _other_sizes(site):
    lines = site.assets.rollouts.read_text().splitlines(keepends=True)
    site.write("r0.jsonl", "".join(lines))
    site.write("r1.jsonl", "".join(lines[:2]))
    return site.assets.brain_from("--rollout-data", "r*.jsonl")


def _unscored(site):
    groups = [json.loads(line) for line in site.assets.rollouts.read_text().splitlines()]
    for group in groups:
        for response in group["responses"]:
            response["reward"] = None
    argv = site.assets.brain_from("--rollout-data", site.write_records("r.jsonl", *groups))
    place = argv.index("--reward-load")
    return argv[:place] + argv[place + 2 :]


_PLACE = r"r.jsonl:2: "
_FORMAT = r"docs/stages.md shows the format"
_FINITE = r"must be a finite number"

CASES = [
    BadInput(
        "no file",
        lambda site: site.assets.brain_from("--rollout-data", "no*.jsonl"),
        r"rollout_data=no\*.jsonl matches no file under /",
        r"give one that is there",
    ),
    BadInput(
        "prompts",
        lambda site: site.assets.brain_from("--rollout-data", str(site.assets.records("prompts"))),
        r"prompts.jsonl:1: not a rollout record, a rollout must have 'id', this one has prompt",
        _FORMAT,
    ),
    BadInput("an empty file", _content(""), r"r.jsonl: the file is empty", r"write records into it"),
    BadInput("a line that is no JSON", _content("{oops\n"), r"r.jsonl:1: not valid JSON", r"one object a line"),
    BadInput("a second file that is no JSON", _bad_second_file, r"r1.jsonl:1: not valid JSON", r"one object a line"),
    BadInput(
        "a second file of fewer groups", _other_sizes, r"r1.jsonl holds 2 groups and r0.jsonl 4", r"of as many groups"
    ),
    BadInput("no tokens of a prompt", _group(prompt_tokens=None), _PLACE + "not a rollout .*'prompt_tokens'", _FORMAT),
    BadInput("an unknown field", _group(score=1), _PLACE + "not a rollout .*no field 'score'", _FORMAT),
    BadInput("a place in words", _group(index="first"), _PLACE + ".*'index' must be of type int, not 'first'", _FORMAT),
    BadInput("one response", _groups(lambda g: g[1]["responses"].pop()), _PLACE + r"1 response\(s\)", r"at least 2"),
    BadInput(
        "responses that are texts", _group(responses=["a", "b"]), _PLACE + ".*a response must be an object", _FORMAT
    ),
    BadInput("no ids", _response(tokens=[]), _PLACE + r".*not \[\]", r"a list of at least one id"),
    BadInput("ids that are no integers", _response(tokens=[1.5]), _PLACE + r".*not \[1.5\]", r"a list of at least one"),
    BadInput("ids that are true", _response(tokens=[True]), _PLACE + r".*not \[True\]", r"a list of at least one id"),
    BadInput(
        "no log-probability",
        _response(log_proposal=None, sampler_logprob=None),
        _PLACE + "a response has neither",
        r"give the",
    ),
    BadInput("a log-probability above 0", _response(log_proposal=3.0), _PLACE + "log_proposal is 3.0", r"at most 0"),
    BadInput("a log-probability of nothing", _response(log_prior=float("-inf")), _PLACE + "log_prior is -inf", _FINITE),
    BadInput("a reward that is no number", _response(reward=float("nan")), _PLACE + "reward is nan", _FINITE),
    BadInput("a reward without end", _response(reward=10**400), _PLACE + "reward is 10000", _FINITE),
    BadInput("a reward in words", _response(reward="0.5"), _PLACE + "reward is '0.5'", _FINITE),
    BadInput("finished in words", _response(finished="yes"), _PLACE + ".*'finished' must be of type bool", _FORMAT),
    BadInput(
        "an id outside the vocabulary",
        _response(tokens=[330]),
        r"r.jsonl, .*: token id 330 is outside 0..329",
        r"of this model",
    ),
    BadInput(
        "an id below 0", _group(prompt_tokens=[-1]), r"r.jsonl, .*: token id -1 is outside 0..329", r"of this model"
    ),
    BadInput(
        "a response too long", _response(tokens=[7] * 100), r"r.jsonl, .* 119 tokens, --seq-length is 64", r"raise it"
    ),
    BadInput(
        "half a batch", _groups(lambda groups: groups.pop()), r"r.jsonl holds 3 groups", r"--global-batch-size that"
    ),
    BadInput(
        "no rewards and no model of them", _unscored, r"r.jsonl, \S+: a response has no reward", r"give --reward-load"
    ),
    BadInput(
        "rollouts and prompts",
        lambda site: site.assets.brain_on(str(site.assets.records("prompts")), "--rollout-data", "r.jsonl"),
        r"train_data and rollout_data are both set",
        r"give one",
    ),
]
