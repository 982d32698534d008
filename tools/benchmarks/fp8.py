"""What FP8 does to log-probabilities, importance weights and the gradient of BRAIn, against float32.

    python tools/benchmark.py fp8 --prior-load SFT --load POLICY --prompts FILE [--reward-load REWARD]

This is the middle of a run: `p` is the prior, `q'` the proposal (--load), and the policy has moved on from it by the
share --moved of the way from prior to proposal. All weights are rounded to bfloat16, so that precisions differ only in
computation. The proposal draws responses of the greatest length in bf16, on past their end, and shorter ones are their
beginnings. All precisions score the same groups, FP8 in emulation (docs/fp8_numerics.md). Errors are differences from
float32, in nats of whole sequences:

- logprob_mean, logprob_std: error of log q'. group_std: less the group's mean, which cancels in alpha and beta.
- For log q - log q', at each distance moved: ratio_std, the error less the group's mean; true_ratio_std, the standard
  deviation of the ratio itself; max_ratio; ess_beta; and beta_tv, half the sum of |beta - beta of float32|.
- mixed: log q' of the precision - log q' of bf16, as of a policy in FP8 with a proposal in bf16. The truth is 0.
- alpha_tv, ess_alpha, and reward_std, the error of rewards.
- gradient, at the last distance moved: cosine with float32's and ratio of the norms, with weights alpha - beta of the
  precision itself (`whole`), or of float32 (`backward`: the error that the backward pass adds).
"""

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.precisions import PRECISIONS, SCORED, Model, beginnings, draw
from megatron_brain.config.loader import config_from_dict
from megatron_brain.data.groups import Group
from megatron_brain.errors import ConfigError
from megatron_brain.objectives.brain import brain_loss_gradient, posterior_log_weights
from megatron_brain.objectives.importance import effective_sample_size, policy_log_weights
from megatron_brain.stages.answers import read_prompts
from megatron_brain.training.run import Run
from megatron_brain.training.start import open_run

Scores = dict[str, dict[str, Tensor]]
"""Scores `[groups, n]` by precision, and then by model (prior, proposal, reward, or a distance moved)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the subject."""
    models = parser.add_argument_group("models")
    models.add_argument("--load", type=Path, required=True, help="checkpoint of the proposal")
    models.add_argument("--prior-load", type=Path, required=True, help="checkpoint of the prior")
    models.add_argument("--reward-load", type=Path, help="checkpoint of the reward model [every reward is 0]")
    models.add_argument("--reward-temperature", type=float, default=0.2, help="tau [%(default)s]")
    models.add_argument("--moved", default="0.01,0.25", help="shares of the way from prior to proposal [%(default)s]")
    data = parser.add_argument_group("data")
    data.add_argument("--prompts", type=Path, required=True, help="records with a prompt each")
    data.add_argument("--max-prompt-length", type=int, default=104, help="longer prompts are left out [%(default)s]")
    data.add_argument("--lengths", default="16,32,64,128,256,512", help="tokens of a response [%(default)s]")
    data.add_argument("--samples", type=int, default=8, help="responses n of a prompt [%(default)s]")
    data.add_argument("--groups", type=int, default=8, help="largest number of prompts [%(default)s]")
    data.add_argument("--tokens", type=int, default=8192, help="most response tokens at a length [%(default)s]")
    data.add_argument("--gradient-lengths", help="lengths with gradients [16, 64 and 256, if they are lengths]")
    data.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--threads", type=int, default=2, help="[%(default)s]")


def run(args: argparse.Namespace) -> dict:
    """Measure.

    Returns:
        lengths: for each length the figures of the module's docstring, by precision; growth: exponents of length.
    """
    torch.set_num_threads(args.threads)
    lengths, moved = _numbers(args.lengths, int, "--lengths"), _numbers(args.moved, float, "--moved")
    with_gradient = _gradient_lengths(args.gradient_lengths, lengths)
    _check(args)
    opened = _open(args, max(lengths))
    prompts = [prompt.tokens for prompt in read_prompts(opened)]
    study = _Study(opened, args, moved)
    groups = study.draw(prompts)
    report: dict = {"groups": len(groups), "samples": args.samples, "lengths": {}}
    for length in lengths:
        used = beginnings(groups, length)[: max(1, args.tokens // (args.samples * length))]
        scores = study.scores(used)
        measured = {"groups": len(used), **compare(scores, moved, args.reward_temperature)}
        if length in with_gradient:
            measured["gradient"] = study.gradients(used, scores)
        report["lengths"][length] = measured
        print(_line(length, measured), file=sys.stderr, flush=True)
    report["growth"] = growth(report["lengths"])
    print(table(report), file=sys.stderr)
    return report


def _numbers(text: str, kind: type, flag: str) -> list:
    try:
        values = [kind(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{flag} {text}: expected numbers with commas between them") from None
    if min(values) < 0 or (kind is int and min(values) < 1):
        raise ConfigError(f"{flag} {text}: {min(values)} is too small")
    return values


def _gradient_lengths(text: str | None, lengths: Sequence[int]) -> list[int]:
    if text is None:
        return [length for length in (16, 64, 256) if length in lengths]
    asked = _numbers(text, int, "--gradient-lengths")
    for length in asked:
        if length not in lengths:
            raise ConfigError(f"--gradient-lengths {text}: {length} is not in --lengths {','.join(map(str, lengths))}")
    return asked


def _check(args: argparse.Namespace) -> None:
    for flag, value, least in (
        ("--samples", args.samples, 2),
        ("--groups", args.groups, 1),
        ("--tokens", args.tokens, 1),
        ("--threads", args.threads, 1),
    ):
        if value < least:
            raise ConfigError(f"{flag} {value}: must be at least {least}")
    if args.reward_temperature <= 0:
        raise ConfigError(f"--reward-temperature {args.reward_temperature}: must be greater than 0")


def _open(args: argparse.Namespace, longest: int) -> Run:
    settings = {
        "load": str(args.load),
        "prompts": str(args.prompts),
        "output": "not written",
        "max_prompts": args.groups,
        "max_prompt_length": args.max_prompt_length,
        "overlong": "drop",
        "seq_length": args.max_prompt_length + longest,
        "max_new_tokens": longest,
        "samples_per_prompt": args.samples,
        "sampling_batch_size": args.samples * args.groups,
        "recompute_granularity": "full",
        "transformer_impl": "local",
        "seed": args.seed,
        "progress": False,
    }
    return open_run(config_from_dict("generate", settings, "the benchmark"))


class _Study:
    """The models in every precision; all of them stay in memory."""

    def __init__(self, run: Run, args: argparse.Namespace, moved: Sequence[float]) -> None:
        self._run, self._args = run, args
        self._policies = {name: Model(run, name, "policy", args.load, "policy") for name in PRECISIONS}
        prior = Model(run, "bf16", "prior", args.prior_load, "policy").weights()
        proposal = self._policies["bf16"].weights()
        self._weights = {"prior": prior, "proposal": proposal}
        for distance in moved:
            self._weights[_moved(distance)] = [
                (there.float() + distance * (there.float() - origin.float())).bfloat16()
                for origin, there in zip(prior, proposal, strict=True)
            ]
        self._at = _moved(moved[-1])
        self._rewards = {}
        if args.reward_load:
            self._rewards = {name: Model(run, name, "reward", args.reward_load, "reward") for name in SCORED}

    def draw(self, prompts: Sequence[tuple[int, ...]]) -> list[Group]:
        return draw(self._run, self._policies["bf16"].chunk, prompts)

    def scores(self, groups: Sequence[Group]) -> Scores:
        return {name: self._scores_in(name, groups) for name in SCORED}

    def _scores_in(self, precision: str, groups: Sequence[Group]) -> dict[str, Tensor]:
        model, found = self._policies[precision], {}
        for what, weights in self._weights.items():
            model.take(weights)
            found[what] = model.scores(groups)
        reward = self._rewards.get(precision)
        found["reward"] = reward.scores(groups) if reward else torch.zeros_like(found["prior"])
        return found

    def gradients(self, groups: Sequence[Group], scores: Scores) -> dict[str, dict]:
        """Cosines and ratios of norms, by precision."""
        slopes = {name: self._slopes(each) for name, each in scores.items()}
        exact = self._gradient("fp32", groups, slopes["fp32"])
        report = {}
        for name in PRECISIONS:
            if name == "fp32":
                continue
            own = slopes[name.replace("e4m3", "hybrid")]
            report[name] = {
                kind: _compared(self._gradient(name, groups, each), exact)
                for kind, each in (("whole", own), ("backward", slopes["fp32"]))
            }
            print(f"gradient in {name}: {report[name]}", file=sys.stderr, flush=True)
        return report

    def _gradient(self, precision: str, groups: Sequence[Group], slopes: Tensor) -> list[Tensor]:
        model = self._policies[precision]
        model.take(self._weights[self._at])
        return model.gradient(groups, slopes)

    def _slopes(self, scores: dict[str, Tensor]) -> Tensor:
        """d loss / d log q `[groups, n]`."""
        log_alpha = _log_alpha(scores, self._args.reward_temperature)
        rows = zip(scores[self._at], scores["proposal"], log_alpha, strict=True)
        return torch.stack([brain_loss_gradient(*row) for row in rows])


def _moved(distance: float) -> str:
    return f"moved {distance:g}"


def _compared(gradient: Sequence[Tensor], exact: Sequence[Tensor]) -> dict[str, float]:
    products = [
        sum((left.double() * right.double()).sum().item() for left, right in zip(one, other, strict=True))
        for one, other in ((gradient, exact), (gradient, gradient), (exact, exact))
    ]
    cross, own, square = products
    return {"cosine": cross / math.sqrt(own * square), "norm_ratio": math.sqrt(own / square)}


def _log_alpha(scores: dict[str, Tensor], temperature: float) -> Tensor:
    rows = zip(scores["prior"], scores["reward"], scores["proposal"], strict=True)
    return torch.stack([posterior_log_weights(*row, reward_temperature=temperature) for row in rows])


def compare(scores: Scores, moved: Sequence[float], temperature: float) -> dict:
    """The figures of the module's docstring except gradients, by precision; for float32 those that are no errors."""
    exact = scores["fp32"]
    exact_alpha = _log_alpha(exact, temperature)
    report = {}
    for name, own in scores.items():
        error, log_alpha = own["proposal"] - exact["proposal"], _log_alpha(own, temperature)
        mixed = own["proposal"] - scores["bf16"]["proposal"]
        report[name] = {
            "logprob_mean": error.mean().item(),
            "logprob_std": error.std().item(),
            "group_std": _std_in_groups(error),
            "mixed": {"ratio_std": _std_in_groups(mixed), **_weights(mixed, torch.zeros_like(mixed))},
            "reward_std": (own["reward"] - exact["reward"]).std().item(),
            "alpha_tv": _total_variation(log_alpha, exact_alpha),
            "ess_alpha": _mean_ess(log_alpha),
        }
        for distance in map(_moved, moved):
            ratio, truth = own[distance] - own["proposal"], exact[distance] - exact["proposal"]
            report[name][distance] = {
                "ratio_std": _std_in_groups(ratio - truth),
                "true_ratio_std": _std_in_groups(truth),
                **_weights(ratio, truth),
            }
    return report


def _weights(log_ratio: Tensor, truth: Tensor) -> dict[str, float]:
    """Figures of beta from log-ratios `[groups, n]`."""
    log_beta, exact = (torch.stack([policy_log_weights(row, row * 0) for row in each]) for each in (log_ratio, truth))
    return {
        "beta_tv": _total_variation(log_beta, exact),
        "ess_beta": _mean_ess(log_beta),
        "max_ratio": log_ratio.max().exp().item(),
    }


def _std_in_groups(values: Tensor) -> float:
    """Standard deviation of values `[groups, n]`, each less its group's mean."""
    return values.var(dim=1).mean().sqrt().item()


def _total_variation(log_weights: Tensor, exact: Tensor) -> float:
    return (log_weights.exp() - exact.exp()).abs().sum(1).mean().item() / 2


def _mean_ess(log_weights: Tensor) -> float:
    return statistics.mean(effective_sample_size(row).item() for row in log_weights)


def growth(lengths: dict[int, dict]) -> dict[str, dict[str, float]]:
    """Exponents k of `error ~ length^k` by least squares in logarithms: 0.5 if errors are independent, 1 if equal."""
    if len(lengths) < 2:
        return {}
    logs = [math.log(length) for length in lengths]
    return {
        name: {
            key: statistics.linear_regression(logs, [math.log(each[name][key]) for each in lengths.values()]).slope
            for key in ("logprob_std", "group_std")
        }
        for name in SCORED
        if name != "fp32" and all(each[name]["group_std"] > 0 for each in lengths.values())
    }


def _line(length: int, measured: dict) -> str:
    stds = ", ".join(f"{name} {measured[name]['logprob_std']:.3g}" for name in SCORED if name != "fp32")
    return f"length {length}, {measured['groups']} groups: error of log-probabilities {stds}"


def table(report: dict) -> str:
    """The report in Markdown."""
    distances = [key for key in next(iter(report["lengths"].values()))["fp32"] if key.startswith("moved")]
    heads = ["log q'", "in group", "mixed", "alpha tv", "ESS alpha"]
    heads += [f"{what} {distance}" for distance in distances for what in ("ratio", "beta tv", "ESS beta")]
    lines = ["| length | precision | " + " | ".join(heads) + " |", "|" + "---|" * (len(heads) + 2)]
    for length, measured in report["lengths"].items():
        for name in SCORED:
            own = measured[name]
            cells = [own["logprob_std"], own["group_std"], own["mixed"]["ratio_std"], own["alpha_tv"], own["ess_alpha"]]
            cells += [own[each][key] for each in distances for key in ("ratio_std", "beta_tv", "ess_beta")]
            lines.append(f"| {length} | {name} | " + " | ".join(f"{cell:.3g}" for cell in cells) + " |")
    lines += [
        "",
        "| length | gradient in | cosine | norm | cosine, backward alone | norm |",
        "|---|---|---|---|---|---|",
    ]
    for length, measured in report["lengths"].items():
        for name, each in measured.get("gradient", {}).items():
            cells = [each[kind][key] for kind in ("whole", "backward") for key in ("cosine", "norm_ratio")]
            lines.append(f"| {length} | {name} | " + " | ".join(f"{cell:.4f}" for cell in cells) + " |")
    return "\n".join(lines)
