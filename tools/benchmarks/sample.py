"""Tokens a second of sampling, against transformers' generate and vLLM.

    python tools/benchmark.py sample --hf-model DIR --train-data FILE [--vllm-python PYTHON]

All sides get the same token ids of prompts and draw from the whole distribution at --temperature. transformers draws
all responses in one batch that is padded on the left. vLLM runs offline in a process of its own that lives as long as
the benchmark, with its prefix cache emptied before every call; --vllm-python is the Python of its environment. Without
the flag it is left out. Tokens are counted up to each response's EOS.
"""

import argparse
import contextlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.real_work import Work, add_work_arguments, opened_work
from benchmarks.samplers import HFSampler, OurSampler, Prompts, Responses, Sampler, VllmSampler
from benchmarks.timing import in_turns
from benchmarks.trainers import required
from megatron_brain.errors import ConfigError

REQUIRED = {"transformers": 4.0, "vllm": 1.4}
"""Least ratio of the speeds that is required, with a model of 135M parameters on CPUs."""

_GREEDY_LIMITS = {torch.float32: 0.9, torch.bfloat16: 0.5}
"""Least share of the prompts with the greedy answer of transformers. Rounding decides between tokens that are about
equally likely."""

_ERRORS = 4.0
"""Standard errors by which means may differ by chance."""

_ROUNDING = 0.03
"""Share by which means may differ beyond chance, because the sides round differently."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the subject."""
    parser.add_argument("--prompts", type=int, default=16, help="number of prompts [%(default)s]")
    parser.add_argument("--shapes", default="8x16,16x48", help="samples x most tokens of a response [%(default)s]")
    parser.add_argument("--temperature", type=float, default=0.7, help="[%(default)s]")
    parser.add_argument(
        "--sampling-batch-size", type=int, default=256, help="responses at one time, ours [%(default)s]"
    )
    parser.add_argument("--vllm-python", type=Path, help="Python of an environment with vLLM")
    add_work_arguments(parser, pairs=5)


def run(args: argparse.Namespace) -> dict:
    """Measure. `failures` in the result names the sides that did not draw from the same distribution."""
    shapes = _shapes(args.shapes)
    if args.temperature <= 0:
        raise ConfigError(f"--temperature {args.temperature}: must be positive")
    if args.vllm_python and not args.vllm_python.exists():
        raise ConfigError(f"--vllm-python {args.vllm_python}: no such file")
    failures: list[str] = []
    with opened_work(args) as work, contextlib.ExitStack() as stack:
        longest = args.max_prompt_length + max(new for _, new in shapes)
        texts = [record.prompt for record in work.first(args.prompts)]
        ours = OurSampler(
            work,
            texts,
            longest=longest,
            max_new_tokens=max(new for _, new in shapes),
            at_once=args.sampling_batch_size,
        )
        hf = HFSampler(work, eos_id=ours.eos_id)
        sides: dict[str, Sampler] = {"ours": ours, "transformers": hf}
        report: dict = {"prompts": args.prompts, "prompt_tokens": sum(map(len, ours.prompts))}
        if args.vllm_python:
            vllm = stack.enter_context(VllmSampler(work, args.vllm_python, longest=longest, threads=args.threads))
            sides["vllm"] = vllm
            report["engine"] = vllm.engine
        report["greedy"] = _greedy(sides, ours.prompts, shapes[0][1], work, failures)
        report["shapes"] = [_shape(sides, hf, ours.prompts, shape, args, failures) for shape in shapes]
    return report | {"failures": failures}


def _shapes(text: str) -> list[tuple[int, int]]:
    parts = [part.split("x") for part in text.split(",")]
    if not all(len(part) == 2 and all(number.isdigit() and int(number) > 0 for number in part) for part in parts):
        raise ConfigError(f"--shapes {text}: expected samples x tokens with commas between them, such as 8x16,16x48")
    return [(int(samples), int(tokens)) for samples, tokens in parts]


def _greedy(sides: Mapping[str, Sampler], prompts: Prompts, new: int, work: Work, failures: list[str]) -> dict:
    """Share of the prompts with the greedy answer of transformers, by side."""
    answers = {
        name: side.sample(prompts, samples=1, max_new_tokens=new, temperature=0.0) for name, side in sides.items()
    }
    shares = {}
    for name in sides.keys() - {"transformers"}:
        equal = [mine == theirs for mine, theirs in zip(answers[name], answers["transformers"], strict=True)]
        shares[name] = sum(equal) / len(equal)
        if shares[name] < _GREEDY_LIMITS[work.dtype]:
            failures.append(f"only {sum(equal)} of {len(equal)} greedy answers of {name} are those of transformers")
    return shares


def _shape(
    sides: Mapping[str, Sampler],
    hf: HFSampler,
    prompts: Prompts,
    shape: tuple[int, int],
    args: argparse.Namespace,
    failures: list[str],
) -> dict:
    """Speeds at one number of samples and tokens, in turns."""
    samples, new = shape
    label = f"sample {samples} x {new}"
    drawn: dict[str, list[Responses]] = {name: [] for name in sides}

    def call(name: str) -> Callable[[], None]:
        def draw() -> None:
            drawn[name].append(
                sides[name].sample(prompts, samples=samples, max_new_tokens=new, temperature=args.temperature)
            )

        return draw

    taken = in_turns({name: call(name) for name in sides}, rounds=args.pairs, label=label)
    tokens = {name: [sum(map(_tokens, call)) for call in calls] for name, calls in drawn.items()}
    # The first call of each side was to warm up.
    speeds = {
        name: [count / times.wall for count, times in zip(tokens[name][1:], taken[name], strict=True)] for name in sides
    }
    report = {
        "samples": samples,
        "max_new_tokens": new,
        "tokens": {name: statistics.mean(counts) for name, counts in tokens.items()},
        "length": {name: _mean_of_ones([len(row) for row in _rows(calls)]) for name, calls in drawn.items()},
        "surprise": {name: _surprise(hf, prompts, calls[0], args.temperature) for name, calls in drawn.items()},
        "tokens_per_second": {name: statistics.median(each) for name, each in speeds.items()},
    }
    failures += check_draws(report, label)
    for name in sides.keys() - {"ours"}:
        ratios = [mine / theirs for mine, theirs in zip(speeds["ours"], speeds[name], strict=True)]
        ratio = statistics.median(ratios)
        report[f"against_{name}"] = {
            "ratio": ratio,
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
            **required(REQUIRED[name], ratio),
        }
    return report


def _tokens(responses: list[list[int]]) -> int:
    return sum(map(len, responses))


def _rows(calls: Sequence[Responses]) -> list[list[int]]:
    """The responses of all calls to all prompts."""
    return [response for call in calls for of_prompt in call for response in of_prompt]


def _surprise(hf: HFSampler, prompts: Prompts, responses: Responses, temperature: float) -> dict[str, float]:
    """-log p of a token in the mean, by transformers: it tells temperatures apart."""
    return mean_of(hf.surprises(prompts, responses, temperature), [len(row) for row in _rows([responses])])


def _mean_of_ones(values: Sequence[float]) -> dict[str, float]:
    return mean_of(values, [1] * len(values))


def mean_of(sums: Sequence[float], counts: Sequence[int]) -> dict[str, float]:
    """The mean over all that is counted, and its standard error; a sum and its count are one draw."""
    mean = sum(sums) / sum(counts)
    squares = sum((total - mean * count) ** 2 for total, count in zip(sums, counts, strict=True))
    return {"mean": mean, "error": squares**0.5 / sum(counts)}


def check_draws(report: dict, label: str) -> list[str]:
    """What shows that a side does not draw from the distribution that transformers draws from, in words."""
    wrong = []
    for figure in ("length", "surprise"):
        theirs = report[figure]["transformers"]
        for name in report[figure].keys() - {"transformers"}:
            mine = report[figure][name]
            chance = (mine["error"] ** 2 + theirs["error"] ** 2) ** 0.5
            if not abs(mine["mean"] - theirs["mean"]) <= _ERRORS * chance + _ROUNDING * theirs["mean"]:
                wrong.append(
                    f"{label}: the mean {figure} is {mine['mean']:.3f} ± {mine['error']:.3f} for {name}, "
                    f"{theirs['mean']:.3f} ± {theirs['error']:.3f} for transformers"
                )
    return wrong
