"""Which layouts of a model on a cluster fit, how long a step takes, and why others do not.

    python tools/plan.py --model llama3-70b --gpus 64 --gpu h100 --stage brain --samples-per-prompt 16 \\
        --prompt-length 512 --response-length 128

Prints the layouts, fastest first, with memory and step time by part, and the flags of the fastest. docs/planner.md says
how the estimates are made and what they leave out. Exit status 2: a mistake of the user, 1: no layout fits.
"""

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megatron_brain import files
from megatron_brain.commands.reporting import reports_mistakes
from megatron_brain.config.model import ModelConfig, ResolvedModel
from megatron_brain.errors import ConfigError
from megatron_brain.flag_types import finite, positive, whole
from megatron_brain.models.architecture import resolve
from megatron_brain.planning.machine import GIB, MACHINES, Machine
from megatron_brain.planning.presets import PRESETS, preset
from megatron_brain.planning.question import Question, training_stages
from megatron_brain.planning.report import as_json, engine_table, flags, memory_table, rejection_table, time_table
from megatron_brain.planning.search import Plan, Rejection, search

_NARROWEST = 145  # columns that the tables need; with fewer they only wrap


@reports_mistakes
def main(argv: Sequence[str]) -> int:
    """Returns the exit status."""
    args = _parse(argv)
    question = _question(args)
    _require_place(args.json)  # before the search, which takes a while
    plans, rejections = search(question)
    if args.json is not None:
        report = as_json(question, args.model, plans, rejections, reward_model=args.reward_model)
        text = json.dumps(report, indent=2)
        if args.json == "-":
            print(text)
        else:
            files.write_whole(Path(args.json), text + "\n")
    if args.print_flags and plans:
        print(shlex.join(flags(plans[0].settings)))
    elif args.json != "-":
        _show(question, args, plans, rejections)
    if not plans:
        print("error: no layout fits", file=sys.stderr)
    return 0 if plans else 1


def _require_place(place: str | None) -> None:
    """Raise ConfigError where the JSON report cannot be written."""
    if place in (None, "-"):
        return
    if (problem := files.file_problem("--json", place)) is not None:
        raise ConfigError(problem)
    if not Path(place).absolute().parent.is_dir():
        raise ConfigError(f"--json {place}: its folder is not there; make it, or give another file")


def _show(question: Question, args: argparse.Namespace, plans: Sequence[Plan], rejections: Sequence[Rejection]) -> None:
    console = Console()
    if console.width < _NARROWEST:
        console = Console(width=_NARROWEST)
    console.print(
        f"{args.model}, {question.stage} on {question.gpus} {question.machine.name.upper()}: {len(plans)} layouts fit, "
        f"{len(rejections)} do not"
    )
    if plans:
        top = plans[: args.top]
        console.print(time_table(top))
        console.print(memory_table(top, question))
        if question.engine_gpus is not None:
            console.print(engine_table(top))
    if rejections:
        console.print(rejection_table(rejections))
    if plans:
        console.print("Flags of the fastest:")
        print(shlex.join(flags(plans[0].settings)))


def _question(args: argparse.Namespace) -> Question:
    return Question(
        stage=args.stage,
        model=_model(args.model),
        machine=_machine(args),
        gpus=args.gpus,
        prompt_length=args.prompt_length,
        response_length=args.response_length,
        samples_per_prompt=args.samples_per_prompt,
        seq_length=args.seq_length,
        global_batch_size=args.global_batch_size,
        prompts_per_round=args.prompts_per_round,
        refresh_interval=args.refresh_interval,
        sampling_batch_size=args.sampling_batch_size,
        precision=args.precision,
        recompute=args.recompute,
        shared_prefix=args.shared_prefix,
        distributed_optimizer=args.distributed_optimizer,
        offload_prior=args.offload_prior,
        offload_reward=args.offload_reward,
        two_pass=args.two_pass,
        reward_model=None if args.reward_model is None else _model(args.reward_model),
        reserved_bytes=int(args.reserved_memory * GIB),
        engine_gpus=args.engine_gpus,
        engine_tensor_parallel=args.engine_tensor_parallel,
        rounds_ahead=args.rounds_ahead,
    )


def _machine(args: argparse.Namespace) -> Machine:
    machine = dataclasses.replace(MACHINES[args.gpu], gpus_per_node=args.gpus_per_node)
    if args.storage_bandwidth is None:
        return machine
    return dataclasses.replace(machine, storage_bandwidth=args.storage_bandwidth * 1e9)


def _gpus_or_auto(text: str) -> int | str:
    return text if text == "auto" else positive(text)


def _rate(text: str) -> float:
    """A number above 0."""
    value = finite(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _model(name: str) -> ResolvedModel:
    """The architecture of a preset, or of the model in a Hugging Face directory."""
    if not Path(name).is_dir():
        return preset(name)
    # This imports torch, which presets do not need.
    from megatron_brain.conversion import read_hf_architecture

    return resolve(ModelConfig(), read_hf_architecture(name), name)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Layouts of a model on a cluster that fit, fastest first, and why others do not.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    switch = argparse.BooleanOptionalAction
    group = parser.add_argument_group("model and machine")
    group.add_argument("--model", required=True, help=f"Hugging Face directory, or one of {', '.join(PRESETS)}")
    group.add_argument("--gpus", type=positive, required=True, help="GPUs that train")
    group.add_argument("--gpu", choices=tuple(MACHINES), default="h100", help="kind of GPU")
    group.add_argument("--gpus-per-node", type=positive, default=8, help="GPUs that NVLink connects")
    group.add_argument("--reserved-memory", type=finite, default=6.0, help="GiB of a GPU that estimates leave alone")
    group = parser.add_argument_group("what is computed")
    group.add_argument("--stage", choices=training_stages(), required=True, help="stage of the run")
    group.add_argument("--prompt-length", type=whole, required=True, help="tokens of a prompt")
    group.add_argument("--response-length", type=positive, required=True, help="tokens of a response")
    group.add_argument("--seq-length", type=positive, help="sft: length of packed sequences; unset: of a record")
    group.add_argument("--global-batch-size", type=positive, default=128, help="sequences, pairs or groups of a step")
    group.add_argument("--precision", choices=("fp8", "bf16", "fp32"), default="bf16", help="precision of the layers")
    group.add_argument("--recompute", choices=("auto", "none", "selective", "full"), default="auto", help="auto: least")
    group.add_argument("--shared-prefix", action=switch, default=True, help="compute a prompt once for its responses")
    group.add_argument("--distributed-optimizer", action=switch, default=True, help="split optimizer state")
    group = parser.add_argument_group("brain")
    group.add_argument("--samples-per-prompt", type=positive, default=8, help="responses of a group")
    group.add_argument("--prompts-per-round", type=positive, help="prompts of a round; unset: those of one step")
    group.add_argument("--refresh-interval", type=positive, help="steps of a round; unset: one pass over it")
    group.add_argument("--sampling-batch-size", type=positive, help="responses at one time; unset: all that fit")
    group.add_argument("--two-pass", action=switch, default=False, help="compute beta in a separate forward pass")
    group.add_argument("--reward-model", help="as --model; unset: the policy's sizes")
    group.add_argument("--offload-prior", action=switch, default=False, help="keep the prior in host memory")
    group.add_argument("--offload-reward", action=switch, default=False, help="keep the reward model in host memory")
    group = parser.add_argument_group("vLLM servers (brain)")
    group.add_argument("--engine-gpus", type=_gpus_or_auto, help="more GPUs, of servers that draw; auto: enough")
    group.add_argument("--engine-tensor-parallel", type=positive, help="GPUs of one server; unset: the best")
    group.add_argument("--rounds-ahead", type=int, choices=(0, 1), default=0, help="1: draw while the policy trains")
    group.add_argument("--storage-bandwidth", type=_rate, help="GB/s of a node to shared storage; unset: 5")
    group = parser.add_argument_group("output")
    group.add_argument("--top", type=positive, default=10, help="layouts that the tables show")
    group.add_argument("--json", metavar="FILE", help="write all layouts and rejections; - is standard output alone")
    group.add_argument("--print-flags", action="store_true", help="print the flags of the fastest layout and no tables")
    args = parser.parse_args(argv)
    if args.json == "-" and args.print_flags:
        parser.error("--json - and --print-flags both ask for standard output alone: give --json a file")
    return args


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
