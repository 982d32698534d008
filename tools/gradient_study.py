"""Bias and variance of the gradient of BRAIn with each baseline, on fixed checkpoints and prompts.

    python tools/gradient_study.py --proposal SFT --policies SFT,RUN/iter_0000008,RUN/iter_0000032 \
        --reward-load REWARD --prompts FILE --output study.json [--csv study.csv] [--figure study.svg]

For each prompt a pool of responses is drawn from the proposal, at temperature 1, and scored. For each policy every
response's gradient is computed once; groups of n responses are then drawn from the pool many times over. The figures
are those of `tools/mechanism/summary.py`, relative to the gradient of KL(posterior || policy), with intervals over
prompts. docs/mechanism.md says what they mean. Policies that have trained for longer on samples of the proposal have
drifted further; name the proposal itself as the first policy to begin without drift.

Only gradients in the parameters of the last layers are computed (--layers).
"""

import argparse
import csv
import importlib.util
import io
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from mechanism.estimators import Pool, drift, measure
from mechanism.pools import (
    gram_matrix,
    last_parameters,
    log_probabilities,
    samples_of,
    score_rewards,
)
from mechanism.sketch import Sketch
from mechanism.summary import FIGURES, summarize
from torch import Tensor

from megatron_brain.commands.reporting import reports_mistakes
from megatron_brain.config.loader import config_from_dict
from megatron_brain.errors import ConfigError
from megatron_brain.files import write_whole
from megatron_brain.models.provider import Chunk
from megatron_brain.objectives.importance import effective_sample_size
from megatron_brain.stages.answers import read_prompts, sample_answers
from megatron_brain.stages.engine import open_engine
from megatron_brain.stages.rewards.rewards import Rewards
from megatron_brain.startup.disk import find_frozen
from megatron_brain.training.run import Run
from megatron_brain.training.start import open_run


@reports_mistakes
def main(argv: Sequence[str]) -> int:
    """Measure, and write what was asked for. Returns the exit status."""
    args = _arguments(argv)
    torch.set_num_threads(args.threads)
    run = _open(args)
    study = _Study(run, args)
    report = {
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        **study.describe(),
        "policies": [],
    }
    for place in args.policies:
        report["policies"].append(study.of_policy(place))
        # The report of the policies so far is kept if the study is stopped.
        write_whole(args.output, json.dumps(report, indent=1, allow_nan=False) + "\n")
    if args.csv:
        write_whole(args.csv, as_csv(report))
    if args.figure:
        from mechanism.figure import draw

        draw(report, args.figure)
    return 0


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    models = parser.add_argument_group("models")
    models.add_argument("--proposal", required=True, help="checkpoint that draws the responses")
    models.add_argument("--policies", required=True, help="checkpoints with commas between them, in order of drift")
    models.add_argument("--prior-load", help="checkpoint of the prior [--proposal]")
    models.add_argument("--reward-load", help="checkpoint of the reward model")
    models.add_argument("--reward-function", help="path/to/file.py:function, instead of a model or added to it")
    models.add_argument("--reward-temperature", type=float, default=0.2, help="tau [%(default)s]")
    models.add_argument("--layers", type=int, default=4, help="last layers with gradients [%(default)s]")
    models.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    data = parser.add_argument_group("data")
    data.add_argument("--prompts", type=Path, required=True, help="records with a prompt each")
    data.add_argument("--max-prompts", type=int, default=16, help="largest number of prompts [%(default)s]")
    data.add_argument("--max-prompt-length", type=int, default=104, help="longer prompts are left out [%(default)s]")
    data.add_argument("--max-new-tokens", type=int, default=24, help="longest response, in tokens [%(default)s]")
    data.add_argument("--samples", type=int, default=256, help="responses N in the pool of a prompt [%(default)s]")
    data.add_argument("--sizes", default="2,4,8,16,32", help="group sizes n, each at most N/4 [%(default)s]")
    data.add_argument("--splits", type=int, default=4, help="times a pool is split into halves [%(default)s]")
    data.add_argument("--permutations", type=int, default=8, help="times a half is cut into groups [%(default)s]")
    data.add_argument("--bootstrap-samples", type=int, default=2000, help="of the prompts [%(default)s]")
    data.add_argument("--seed", type=int, default=1234)
    output = parser.add_argument_group("output")
    output.add_argument("--output", type=Path, required=True, help="write the JSON here")
    output.add_argument("--csv", type=Path, help="write a row for each policy, baseline and n here")
    output.add_argument("--figure", type=Path, help="draw the figure here (.svg or .png)")
    parser.add_argument("--threads", type=int, default=2, help="[%(default)s]")
    args = parser.parse_args(argv)
    _check(args)
    return args


def _check(args: argparse.Namespace) -> None:
    """Replace the lists by their parts.

    Raises:
        ConfigError: a setting is impossible.
    """
    try:
        args.sizes = [int(part) for part in args.sizes.split(",")]
    except ValueError:
        raise ConfigError(f"--sizes {args.sizes}: expected numbers with commas between them") from None
    args.policies = args.policies.split(",")
    for flag in ("layers", "max_prompts", "splits", "permutations", "bootstrap_samples", "threads"):
        if getattr(args, flag) < 1:
            raise ConfigError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be at least 1")
    if min(args.sizes) < 2:
        raise ConfigError(f"--sizes {min(args.sizes)}: a group has at least two responses")
    if 4 * max(args.sizes) > args.samples:
        raise ConfigError(
            f"--samples {args.samples}: each half of a pool must hold two groups of {max(args.sizes)}; use at least "
            f"{4 * max(args.sizes)}, or smaller --sizes"
        )
    if args.reward_temperature <= 0:
        raise ConfigError(f"--reward-temperature {args.reward_temperature}: must be greater than 0")
    if args.figure and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--figure needs matplotlib, which is not installed: pip install matplotlib")


def _open(args: argparse.Namespace) -> Run:
    settings = {
        "load": args.proposal,
        "prior_load": args.prior_load or args.proposal,
        "reward_load": args.reward_load,
        "reward_function": args.reward_function,
        "prompts": str(args.prompts),
        "output": "not written",
        "max_prompts": args.max_prompts,
        "max_prompt_length": args.max_prompt_length,
        "overlong": "drop",
        "seq_length": args.max_prompt_length + args.max_new_tokens,
        "max_new_tokens": args.max_new_tokens,
        "samples_per_prompt": args.samples,
        "bf16": args.bf16,
        "seed": args.seed,
        "progress": False,
    }
    given = {name: value for name, value in settings.items() if value is not None}
    return open_run(config_from_dict("evaluate", given, "the study"))


class _Study:
    """The pools, and what each policy makes of them. Policies are in memory one after another."""

    def __init__(self, run: Run, args: argparse.Namespace) -> None:
        self._run, self._args, self._start = run, args, time.perf_counter()
        # Found at once, so that a missing checkpoint is reported before the work.
        self._found = {place: self._find("--policies", place) for place in args.policies}
        rewards = Rewards(run)
        prompts = read_prompts(run)
        proposal = self._load(self._find("--proposal", args.proposal))
        engine = open_engine(run, prompts)
        engine.take_weights([proposal], f"--proposal {args.proposal}")
        drawn = sample_answers(run, engine, prompts, range(len(prompts)), run.config.sampling)
        self._say("drawn", f"{args.samples} responses to each of {len(prompts)} prompts")
        self._samples = [
            samples_of(run, index, prompt, each)
            for index, (prompt, each) in enumerate(zip(prompts, drawn, strict=True))
        ]
        log_proposal = self._log_probabilities(proposal)
        log_prior = log_proposal
        if args.prior_load:
            log_prior = self._log_probabilities(self._load(self._find("--prior-load", args.prior_load)))
        numbers = zip(log_prior, score_rewards(rewards, self._samples), log_proposal, strict=True)
        self._pools = [Pool(log_prior=p, reward=reward, log_proposal=q) for p, reward, q in numbers]
        self._say("scored", "proposal, prior and rewards")

    def describe(self) -> dict:
        """What the pools are: prompts, distinct responses of a pool, and effective sample size of alpha as a share."""
        temperature = self._args.reward_temperature
        whole = torch.arange(self._args.samples)
        ess = [effective_sample_size(pool.log_alpha(whole, temperature)).item() for pool in self._pools]
        distinct = [len(samples.rollout.responses) for samples in self._samples]
        return {
            "prompts": len(self._pools),
            "distinct_responses": statistics.fmean(distinct),
            "ess_alpha": statistics.fmean(ess) / self._args.samples,
        }

    def of_policy(self, place: str) -> dict:
        """A policy's drift, its figures, and the moments of every prompt."""
        args = self._args
        chunk = self._load(self._found[place])
        log_policy = self._log_probabilities(chunk)
        parameters = last_parameters(chunk, args.layers)
        sketch = Sketch(parameters, seed=args.seed)
        moments = []
        for samples, pool, of_policy in zip(self._samples, self._pools, log_policy, strict=True):
            found = measure(
                pool,
                of_policy,
                gram_matrix(self._run, chunk, parameters, samples, sketch),
                sizes=args.sizes,
                reward_temperature=args.reward_temperature,
                splits=args.splits,
                permutations=args.permutations,
                seed=args.seed + samples.rollout.index,
            )
            moments.append(found)
            self._say(place, f"{len(moments)} of {len(self._samples)} prompts")
        figures = summarize(moments, bootstrap_samples=args.bootstrap_samples, seed=args.seed)
        if figures[0]["cosine"]["value"] is None:
            self._say(place, "the reference is lost in its noise: use more --samples or --max-prompts")
        drifts = [drift(q, pool.log_proposal) for q, pool in zip(log_policy, self._pools, strict=True)]
        return {
            "policy": place,
            "parameters": sum(parameter.numel() for parameter in parameters),
            "drift": {
                name: (max if name == "max_ratio" else statistics.fmean)([each[name] for each in drifts])
                for name in drifts[0]
            },
            "figures": figures,
            "moments": [
                {"prompt": samples.rollout.id, "baseline": baseline, "n": n, **values}
                for samples, found in zip(self._samples, moments, strict=True)
                for (baseline, n), values in found.items()
            ],
        }

    def _find(self, flag: str, place: str):
        return find_frozen(self._run.config, flag, place, "policy", self._run.parallel.world_size)

    def _load(self, found) -> Chunk:
        (chunk,) = self._run.load_frozen(found)
        return chunk

    def _log_probabilities(self, chunk: Chunk) -> list[Tensor]:
        return [log_probabilities(self._run, chunk, samples) for samples in self._samples]

    def _say(self, what: str, how_much: str) -> None:
        print(f"{time.perf_counter() - self._start:7.0f} s  {what}: {how_much}", file=sys.stderr, flush=True)


def as_csv(report: dict) -> str:
    """A line for every policy, baseline and n, with the policy's drift and each of FIGURES and its ends."""
    written = io.StringIO()
    drifts = list(report["policies"][0]["drift"])
    ends = [f"{name}{end}" for name in FIGURES for end in ("", "_low", "_high")]
    lines = csv.writer(written, lineterminator="\n")
    lines.writerow(["policy", *drifts, "baseline", "n", *ends])
    for policy in report["policies"]:
        for row in policy["figures"]:
            values = [row[name][end] for name in FIGURES for end in ("value", "low", "high")]
            lines.writerow([policy["policy"], *policy["drift"].values(), row["baseline"], row["n"], *values])
    return written.getvalue()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
