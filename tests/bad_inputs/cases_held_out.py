"""Held-out prompts and what looks at them: judges, the best checkpoint, the limit of the divergence."""

from __future__ import annotations

from bad_inputs.case import UNFINISHED_RUN, BadInput, Maker, Site


def _sft(*flags: str) -> Maker:
    return lambda site: site.assets.sft_on(str(site.assets.records("sft")), *flags)


def _brain(*flags: str, records: str | None = "sft") -> Maker:
    """Brain on prompts, with held-out prompts where there are records for them."""

    def make(site):
        held_out = [] if records is None else ["--valid-data", str(site.assets.records(records))]
        return site.assets.brain_on(str(site.assets.records("prompts")), *held_out, *flags)

    return make


def _judged(body: str, *, records: str = "sft") -> Maker:
    def make(site):
        site.write("judge.py", f"def score(x, y, references):\n    {body}\n")
        return _brain("--judge", "judge.py:score", records=records)(site)

    return make


def _long_prompt(site):
    name = site.write_records("held_out.jsonl", {"prompt": "a tool"}, {"prompt": "a small tool " * 40})
    return _brain("--valid-data", name)(site)


def _rollouts_alone(site):
    argv = site.assets.brain_from("--rollout-data", str(site.assets.rollouts))
    argv += ["--valid-data", str(site.assets.records("sft"))]
    return [argument for argument in argv if argument != "--finetune"]


def _evaluate(*flags: str) -> Maker:
    return lambda site: site.assets.evaluate("--reward-load", str(site.assets.reward), *flags)


def _foreign_samples(site):
    site.write("prior.jsonl", "{}\n")
    return _evaluate("--posterior-samples", "8", "--posterior-data", "prior.jsonl")(site)


def _in_the_way(site: Site):
    site.write("saved/best/somebodys.txt", "mine")
    return _sft("--valid-data", str(site.assets.records("sft")), "--keep-best", "loss")(site)


CASES = [
    # Prompts and judges.
    BadInput(
        "a held-out prompt that is too long", _long_prompt, r"held_out.jsonl:2.*prompt of \d+ tokens", r"--overlong"
    ),
    BadInput(
        "no completions for the judge",
        _judged("return [1] * len(y)", records="prompts"),
        r"judge=judge.py:score: it compares with references, and \S+prompts.jsonl:1 has none",
        r"give the record a completion, or leave --judge out",
    ),
    BadInput(
        "a judge that fails while the policy trains",
        _judged("return [1 / (' 3:' not in prompt) for prompt in x]"),
        r"judge=judge.py:score raised ZeroDivisionError on the record \S+sft.jsonl:4",
        r'judge.py", line 2, in score(.|\n)*division by zero',
        has_several_lines=True,
        leaves=UNFINISHED_RUN,
    ),
    BadInput("a judge of nothing", _brain("--judge", "j.py:score", records=None), r"judge=j.py:score", r"--valid-data"),
    BadInput("a limit of nothing", _brain("--stop-at-kl", "5", records=None), r"stop_at_kl=5.0", r"needs --valid-data"),
    BadInput("a limit below 0", _brain("--stop-at-kl", "-1"), r"stop_at_kl=-1.0", r"must be positive"),
    BadInput("no prior to compare with", _rollouts_alone, r"prior_load is not set", r"--prior-load, or --finetune"),
    BadInput(
        "answers longer than a sequence",
        _brain("--max-new-tokens", "64"),
        r"max_new_tokens=64 leaves no room",
        r"seq_length=64",
    ),
    # The distance to the posterior.
    BadInput(
        "a distance on no prompts",
        _brain("--posterior-samples", "8", records=None),
        r"posterior_samples=8",
        r"needs --valid-data",
    ),
    BadInput(
        "one sample of the prior", _evaluate("--posterior-samples", "1"), r"posterior_samples=1", r"use 2 or more"
    ),
    BadInput(
        "a distance without a reward",
        lambda site: site.assets.evaluate("--judge", "j.py:f", "--posterior-samples", "8"),
        r"no reward: the evaluate stage needs",
        r"--reward-load, --reward-function or --reward-url$",
    ),
    BadInput(
        "a file of no samples",
        _evaluate("--posterior-data", "prior.jsonl"),
        r"posterior_data=prior.jsonl is read with --posterior-samples alone",
        r"give that, or leave it out",
    ),
    BadInput(
        "a file of samples with another ending",
        _evaluate("--posterior-samples", "8", "--posterior-data", "prior.json"),
        r"posterior_data=prior.json",
        r"ends in .jsonl",
    ),
    BadInput(
        "a temperature that nothing reads",
        _evaluate("--reward-temperature", "2"),
        r"reward_temperature=2.0 is read with --posterior-samples alone",
        r"leave it out",
    ),
    BadInput(
        "samples that somebody else has written",
        _foreign_samples,
        r"posterior_data=prior.jsonl: prior.jsonl.json does not say what it was made with",
        r"give the name of a new file",
    ),
    # The best checkpoint.
    BadInput(
        "an unknown metric",
        _brain("--keep-best", "validation/win_rate"),
        r"keep_best='validation/win_rate': .*no metric 'win_rate'",
        r"only kl_to_prior \(lowest\), .*win_rate_reward \(highest\).*did you mean 'win_rate_reward'",
    ),
    BadInput(
        "a metric that the judge would give",
        _brain("--keep-best", "win_rate_judge"),
        r"no metric 'win_rate_judge'",
        r"only kl_to_prior",
    ),
    BadInput(
        "a metric of which no value is the best",
        _brain("--keep-best", "response_length"),
        r"no metric 'response_length' of which the highest or the lowest value is the best",
        r"only kl_to_prior",
    ),
    BadInput("the best of no validation", _sft("--keep-best", "loss"), r"keep_best=loss", r"needs --valid-data"),
    BadInput(
        "the best of what is not saved",
        lambda site: site.assets.sft(
            *("--train-data", str(site.assets.records("sft")), "--hf-model", str(site.assets.hf)),
            *("--valid-data", str(site.assets.records("sft")), "--keep-best", "loss"),
        ),
        r"keep_best=loss",
        r"needs --save",
    ),
    BadInput(
        "a folder in the way of the link",
        _in_the_way,
        r"saved/best is no link",
        r"rename it, or give another --save",
        leaves=("saved*",),
    ),
]
