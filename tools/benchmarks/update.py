"""A BRAIn update and scoring, against the same loss on transformers' model with padded rows.

Parts: `update` times whole updates (pack, forward, backward, clip, AdamW) and compares loss and gradient; `scoring`
times rewards and prior of the same group; `line` times our update for growing n. The other side of an update is a plain
call of transformers' model, which makes logits at every position. In `update_response_logits` that model makes them
only where the loss needs them (`logits_to_keep`), as ours does.
"""

import argparse
import dataclasses
import functools
import gc
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cost_line import cost_line, plot, require_matplotlib
from benchmarks.models import (
    HFPolicy,
    HFReward,
    OurPolicy,
    OurScorer,
    PaddedBatch,
    Shape,
    add_model_arguments,
    pad_rollout,
    random_rollout,
    set_numbers,
    write_hf_model,
)
from benchmarks.timing import compare, in_turns
from megatron_brain.errors import ConfigError
from megatron_brain.stages.brain.rollouts import Rollout

PARTS = ("update", "scoring", "line")

LARGE = Shape(prompt_length=512, samples=32, response_length=48)
"""The second group of the default set."""

REQUIRED = {(384, 16, 48): 5.5, (512, 32, 48): 7.5}
"""Least ratio of the times of an update that is required, by prompt length, samples and response length."""

REQUIRED_OF_SCORING = {(384, 16, 48): 5.0}

GRADIENT_LIMIT = 1e-4
"""Relative difference of gradients that is allowed in float32."""

LOSS_LIMIT = 1e-4
"""Difference of losses that is allowed in float32, in nats. A random response has a log-probability of hundreds of
nats, and even a small loss inherits their rounding."""

SCORE_LIMIT = 1e-5
"""Difference of scores that is allowed in float32, relative to the largest score."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the subject."""
    parser.add_argument("--only", default=",".join(PARTS), help="parts to measure, with commas [%(default)s]")
    group = parser.add_argument_group("group")
    group.add_argument("--prompt-length", type=int, help="tokens of the prompt [384]")
    group.add_argument("--samples", type=int, help="responses n [16]")
    group.add_argument("--response-length", type=int, help="tokens of a response, EOS included [48]")
    group.add_argument("--response-spread", type=int, default=0, help="responses are so many tokens longer or shorter")
    group.add_argument(
        "--no-large", action="store_true", help=f"leave out the update on {LARGE}; so does any size of a group"
    )
    group.add_argument("--line-samples", default="2,4,8,16,32,64", help="n of the cost line, two or more [%(default)s]")
    timing = parser.add_argument_group("timing")
    timing.add_argument("--pairs", type=int, default=5, help="timed calls of each side [%(default)s]")
    timing.add_argument("--threads", type=int, default=2, help="threads of both sides [%(default)s]")
    timing.add_argument("--plot", type=Path, help="picture of the cost line to write")
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> dict:
    """Measure. `failures` in the result names what the two sides did not compute alike."""
    parts = _parts(args)
    shapes = _shapes(args)
    torch.set_num_threads(args.threads)
    ns = _counts(args.line_samples)
    failures: list[str] = []
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        policy, reward = Path(folder) / "policy", Path(folder) / "reward"
        positions = max(s.prompt_length + s.response_length + s.response_spread for s in (*shapes, LARGE))
        parameters = write_hf_model(policy, args, head="policy", positions=positions)
        report: dict = {"parameters": parameters}
        if "update" in parts:
            report["update"] = [
                _update(policy, shape, args, failures, with_passes=shape is shapes[0]) for shape in shapes
            ]
        if "scoring" in parts:
            write_hf_model(reward, args, head="reward", positions=positions)
            report["scoring"] = _scoring(policy, reward, shapes[0], args, failures)
        if "line" in parts:
            report["line"] = _line(policy, shapes[0], ns, args)
    return report | {"failures": failures}


def _parts(args: argparse.Namespace) -> list[str]:
    parts = args.only.split(",")
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise ConfigError(f"--only {args.only}: no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    if args.plot:
        if "line" not in parts:
            raise ConfigError("--plot draws the cost line: add line to --only")
        require_matplotlib()
    return parts


def _counts(text: str) -> list[int]:
    counts = [int(part) for part in text.split(",") if part.isdigit()]
    if len(set(counts)) < 2 or len(counts) < text.count(",") + 1 or min(counts) < 2:
        raise ConfigError(f"--line-samples {text}: a line needs two different numbers of samples, each 2 or more")
    return counts


def _shapes(args: argparse.Namespace) -> list[Shape]:
    """The group that the flags describe; without flags, the two groups whose ratios are required."""
    sizes = {"prompt_length": 384, "samples": 16, "response_length": 48}
    asked = {name: getattr(args, name) for name in sizes if getattr(args, name) is not None}
    shape = Shape(**sizes | asked, response_spread=args.response_spread)
    return [shape] if args.no_large or asked else [shape, LARGE]


class _Sides:
    """Both ways on one group and the same weights; `rollout` has its numbers from transformers."""

    def __init__(self, directory: Path, shape: Shape, args: argparse.Namespace) -> None:
        gc.collect()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.hf = HFPolicy(directory, dtype=getattr(torch, args.dtype), device=device)
        self.rollout = _rollout(shape, args)
        self.padded = pad_rollout(self.rollout, device)
        with torch.no_grad():
            self.logprobs = self.hf.logprobs(self.padded)
        set_numbers(self.rollout, self.logprobs, seed=args.seed)
        self.ours = OurPolicy(directory, self.rollout, args)


def _rollout(shape: Shape, args: argparse.Namespace) -> Rollout:
    return random_rollout(shape, vocab_size=args.vocab_size, seed=args.seed)


def _update(directory: Path, shape: Shape, args: argparse.Namespace, failures: list[str], *, with_passes: bool) -> dict:
    """Times of an update on one group, with both sides compared before and after. `with_passes` also times forward and
    backward pass alone."""
    sides = _Sides(directory, shape, args)
    exact = args.dtype == "float32"
    ours, hf, padded = sides.ours, sides.hf, sides.padded
    losses = {"ours": ours.forward_backward(), "baseline": hf.forward_backward(padded)}
    report = {
        **_sizes(shape, padded, ours.packed_tokens),
        "loss": losses,
        "gradient": gradient_difference(ours.gradients(), hf.gradients()),
    }
    print(f"{shape}: loss {losses}, gradient {report['gradient']}", file=sys.stderr, flush=True)
    if exact:
        failures += check_update(report, f"update {shape}")
    for name, hf.all_logits in (("update", True), ("update_response_logits", False)):
        report[name] = compare(ours.update, lambda: hf.update(padded), pairs=args.pairs, label=f"{name} {shape}")
    hf.all_logits = True
    report |= _required(REQUIRED, shape, report["update"])
    report["loss_after"] = {"ours": ours.forward_backward(), "baseline": hf.forward_backward(padded)}
    if exact and not _differ_little(**report["loss_after"]):
        failures.append(f"update {shape}: after the same updates the losses are {report['loss_after']}")
    if with_passes:
        report["forward_backward"] = compare(
            ours.forward_backward,
            lambda: hf.forward_backward(padded),
            pairs=args.pairs,
            label=f"forward-backward {shape}",
        )
    return report


def _sizes(shape: Shape, padded: PaddedBatch, packed_tokens: int) -> dict:
    return {
        "prompt_length": shape.prompt_length,
        "samples": shape.samples,
        "response_length": shape.response_length,
        "response_spread": shape.response_spread,
        "tokens_packed": packed_tokens,
        "tokens_padded": padded.tokens.numel(),
        "token_saving": padded.tokens.numel() / packed_tokens,
    }


def _required(table: dict[tuple[int, int, int], float], shape: Shape, timed: dict) -> dict:
    """The ratio that is required for this shape, if there is one."""
    least = table.get((shape.prompt_length, shape.samples, shape.response_length))
    return {} if least is None else {"required_ratio": least, "reached": timed["wall"]["ratio"] >= least}


def gradient_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict:
    """Relative L2 differences of our gradients from those of transformers: of all together, and of the worst tensor."""
    assert ours.keys() == theirs.keys(), f"gradients of different tensors: {sorted(ours.keys() ^ theirs.keys())}"
    squares = {
        name: ((ours[name].double() - right.double()).square().sum().item(), right.double().square().sum().item())
        for name, right in theirs.items()
    }
    smallest = torch.finfo(torch.float32).tiny
    by_tensor = {name: (error / max(norm, smallest)) ** 0.5 for name, (error, norm) in squares.items()}
    # NaN counts as the worst.
    worst = max(by_tensor, key=lambda name: float("inf") if by_tensor[name] != by_tensor[name] else by_tensor[name])
    errors, norms = zip(*squares.values(), strict=True)
    return {
        "relative_error": (sum(errors) / max(sum(norms), smallest)) ** 0.5,
        "worst_tensor": worst,
        "worst_relative_error": by_tensor[worst],
        "norm": sum(norms) ** 0.5,
        "tensors": len(by_tensor),
    }


def check_update(report: dict, label: str) -> list[str]:
    """The figures of a float32 report that show that the two sides do not compute the same, in words."""
    wrong = []
    if not _differ_little(**report["loss"]):
        wrong.append(f"{label}: the losses are {report['loss']}")
    gradient = report["gradient"]
    if not gradient["relative_error"] <= GRADIENT_LIMIT:
        wrong.append(
            f"{label}: the gradient differs by {gradient['relative_error']:.1e} of its norm, allowed are "
            f"{GRADIENT_LIMIT:.0e}; most in {gradient['worst_tensor']} ({gradient['worst_relative_error']:.1e})"
        )
    return wrong


def _differ_little(ours: float, baseline: float) -> bool:
    return abs(ours - baseline) <= LOSS_LIMIT


def _scoring(policy: Path, reward: Path, shape: Shape, args: argparse.Namespace, failures: list[str]) -> dict:
    """Times of reward and prior of one group, forward only."""
    sides = _Sides(policy, shape, args)
    run, padded, micro_batches = sides.ours.run, sides.padded, sides.ours.micro_batches
    hf_reward = HFReward(reward, dtype=getattr(torch, args.dtype), device=padded.tokens.device)
    our_prior, our_reward = OurScorer(run, policy, head="policy"), OurScorer(run, reward, head="reward")

    def ours() -> tuple[Tensor, Tensor]:
        return our_reward.score(micro_batches), our_prior.score(micro_batches)

    @torch.no_grad()
    def baseline() -> tuple[Tensor, Tensor]:
        return hf_reward.rewards(padded), sides.hf.logprobs(padded)

    sides.hf.model.eval()
    errors = {
        name: ((mine.cpu() - theirs.cpu()).abs().max() / theirs.abs().max().cpu()).item()
        for name, mine, theirs in zip(("reward", "prior"), ours(), baseline(), strict=True)
    }
    for name, error in errors.items():
        if args.dtype == "float32" and not error <= SCORE_LIMIT:
            failures.append(f"scoring {shape}: {name} differs by {error:.1e} of the largest, allowed {SCORE_LIMIT:.0e}")
    timed = compare(ours, baseline, pairs=args.pairs, label=f"scoring {shape}")
    sizes = _sizes(shape, padded, sides.ours.packed_tokens)
    return {**sizes, "relative_error": errors, "scoring": timed, **_required(REQUIRED_OF_SCORING, shape, timed)}


def _line(policy: Path, base: Shape, ns: list[int], args: argparse.Namespace) -> dict:
    """Times of our update for each n, by the clock and by processor time."""
    ours = _Sides(policy, base, args).ours
    stages, tokens = {}, []
    for n in ns:
        rollout = _rollout(dataclasses.replace(base, samples=n), args)
        set_numbers(rollout, torch.zeros(n), seed=args.seed)
        stages[n] = ours.stage_on(rollout)
        tokens.append(rollout.group().num_tokens(shared_prefix=stages[n].shared_prefix))
    steps = {f"n={n}": functools.partial(ours.update, stage) for n, stage in stages.items()}
    taken = in_turns(steps, rounds=args.pairs, label="line")
    report = {"prompt_length": base.prompt_length, "response_length": base.response_length, "rounds": args.pairs}
    for kind in ("wall", "cpu"):
        seconds = [statistics.median(getattr(times, kind) for times in each) for each in taken.values()]
        report[kind] = cost_line(ns, tokens, seconds)
    if args.plot:
        plot(report["wall"], args.plot, title=f"BRAIn update, prompt {base.prompt_length}, {args.threads} threads")
    return report
