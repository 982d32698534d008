"""The planner's estimate of memory against the measured peak of real training steps on the CPU, layout by layout.

    python tools/benchmark.py memory [--only 'NAME;NAME']

Each case is a run of a stage by its command, over as many processes as its layout takes (gloo), for two steps: in the
second step, optimizer state exists during forward and backward pass. It compares the most bytes of tensors that exist
on each rank, in all and by phase. benchmarks/allocations.py says why it does not compare resident memory, which the
report also has.
"""

import argparse
import dataclasses
import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks import allocations
from megatron_brain.config.loader import load_config
from megatron_brain.errors import ConfigError
from megatron_brain.models.architecture import resolve
from megatron_brain.planning.memory import Memory, pipeline_stage_memory
from megatron_brain.planning.workload import from_run_config

TOLERANCE = 0.1
"""Largest relative error of the total peak that is allowed."""

_VOCAB, _PROMPT, _RESPONSE = 8192, 384, 128
_STEPS = 2
_MIB = 2**20
_SIZES = {
    "num_layers": 8,
    "hidden_size": 512,
    "ffn_hidden_size": 1536,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "vocab_size": _VOCAB,
    "max_position_embeddings": 1024,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run: its stage, its processes, and its flags besides those of all cases."""

    name: str
    stage: str = "sft"
    processes: int = 1
    flags: str = ""


CASES = (
    Case(name="sft"),
    Case(name="sft, bf16", flags="--bf16"),
    Case(name="sft, bf16, chunked logits", flags="--bf16 --logprob-chunk-size 262144"),
    Case(name="sft, untied", flags="--untie-embeddings-and-output-weights"),
    Case(name="sft, full recompute", flags="--recompute-granularity full"),
    Case(name="sft, selective recompute", flags="--recompute-granularity selective"),
    Case(name="sft, TP2", processes=2, flags="--tensor-model-parallel-size 2"),
    Case(name="sft, TP2 SP", processes=2, flags="--tensor-model-parallel-size 2 --sequence-parallel"),
    Case(name="sft, PP2", processes=2, flags="--pipeline-model-parallel-size 2"),
    Case(
        name="sft, PP2 VPP4",
        processes=2,
        flags="--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
    ),
    # gloo copies the gradients that it reduces, and NCCL does not: the activations have to be larger than that copy.
    Case(
        name="sft, DP2, distributed optimizer, bf16",
        processes=2,
        flags="--use-distributed-optimizer --bf16 --micro-batch-size 2",
    ),
    Case(name="reward", stage="reward", flags="--micro-batch-size 2"),
    Case(name="brain", stage="brain"),
    Case(
        name="brain, TP2 SP, bf16",
        stage="brain",
        processes=2,
        flags="--tensor-model-parallel-size 2 --sequence-parallel --bf16",
    ),
)
"""The cases; --only chooses some of them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", help="names of cases with semicolons between them; default: all")


def run(args: argparse.Namespace) -> dict:
    """Measure the cases.

    Returns:
        cases: for each one its processes and flags, and in `ranks` what `compare` returns.
        failures: cases whose estimate has a larger error than `TOLERANCE`.
    """
    cases = _chosen(args.only)
    reports, failures = [], []
    with tempfile.TemporaryDirectory() as folder:
        write_assets(Path(folder))
        for case in cases:
            flags = case_flags(case, Path(folder))
            ranks = compare(case, flags, _measure(case, flags, Path(folder)))
            reports.append({**dataclasses.asdict(case), "ranks": ranks})
            said = [_line(case, rank) for rank in ranks]
            print(*said, sep="\n", file=sys.stderr, flush=True)
            failures += [line for line, rank in zip(said, ranks, strict=True) if abs(rank["error"]) > TOLERANCE]
    return {"cases": reports, "failures": failures}


def _line(case: Case, rank: dict) -> str:
    measured, estimated = rank["measured"], rank["estimated"]
    return (
        f"{case.name}, rank {rank['rank']}: measured {measured['peak'] / _MIB:.1f} MiB, estimated "
        f"{estimated['total'] / _MIB:.1f} MiB ({rank['error']:+.1%}) in {estimated['phase']}; resident "
        f"{measured['resident_peak'] / _MIB:.0f} MiB"
    )


def _chosen(only: str | None) -> list[Case]:
    if only is None:
        return list(CASES)
    names = [name.strip() for name in only.split(";")]
    known = {case.name: case for case in CASES}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(f"--only {only}: no case {unknown[0]!r}; there are: {'; '.join(known)}")
    return [known[name] for name in names]


def write_assets(folder: Path) -> None:
    """Write a tokenizer of single words, and records of exactly as many tokens as the cases say, EOS included."""
    words = {"<pad>": 0, "</s>": 1, **{f"w{number}": number for number in range(2, _VOCAB)}}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
    tokenizer.save_pretrained(folder / "tokenizer")
    generator = random.Random(0)

    def text(length: int) -> str:
        return " ".join(f"w{generator.randrange(2, _VOCAB)}" for _ in range(length))

    for stage, responses in (("sft", ["completion"]), ("reward", ["chosen", "rejected"]), ("brain", [])):
        records = [{"prompt": text(_PROMPT)} | {name: text(_RESPONSE - 1) for name in responses} for _ in range(8)]
        (folder / f"{stage}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def case_flags(case: Case, folder: Path) -> list[str]:
    """The command line of a case."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in _SIZES.items()]
    flags += ["--tokenizer-model", str(folder / "tokenizer"), "--train-data", str(folder / f"{case.stage}.jsonl")]
    flags += ["--seq-length", str(_PROMPT + _RESPONSE), "--max-prompt-length", str(_PROMPT)]
    flags += ["--train-iters", str(_STEPS), "--global-batch-size", "4", "--no-progress"]
    if case.stage == "brain":
        flags += ["--load", str(folder / "prior"), "--finetune", "--prior-load", str(folder / "prior")]
        flags += ["--reward-load", str(folder / "reward"), "--prompts-per-round", "4", "--samples-per-prompt", "4"]
        flags += ["--max-new-tokens", str(_RESPONSE), "--sampling-batch-size", "16"]
    return [*flags, *case.flags.split()]


def compare(case: Case, flags: list[str], measured: list[dict]) -> list[dict]:
    """For each rank the measured and estimated bytes, and the relative error of the estimate: for the peak, and by
    phase."""
    config = load_config(case.stage, flags)
    config = dataclasses.replace(config, model=resolve(config.model, None, "the benchmark"))
    workload, layout = from_run_config(config, case.processes)
    ranks = []
    for rank, found in enumerate(measured):
        # Tensor-parallel ranks are neighbours, then replicas, then pipeline stages.
        pipeline_stage = rank // (layout.tensor * layout.data)
        phases: dict[str, Memory] = {}
        for memory in pipeline_stage_memory(workload, layout, pipeline_stage, impl="local"):
            if memory.phase not in phases or memory.total > phases[memory.phase].total:
                phases[memory.phase] = memory
        peak = max(phases.values(), key=lambda memory: memory.total)
        ranks.append(
            {
                "rank": rank,
                "measured": found,
                "estimated": peak.as_dict(),
                "error": peak.total / found["peak"] - 1,
                "phases": {
                    name: {"measured": found["phases"][name], "estimated": memory.as_dict()}
                    for name, memory in phases.items()
                },
            }
        )
    return ranks


def _measure(case: Case, flags: list[str], folder: Path) -> list[dict]:
    """Run a case and return what each rank reports."""
    if case.stage == "brain":
        for stage, name in (("sft", "prior"), ("reward", "reward")):
            if not (folder / name).exists():
                start = case_flags(Case(name=name, stage=stage), folder)
                _start([*_PROGRAM, stage, *start, "--train-iters=1", "--no-save-optim", f"--save={folder / name}"])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case.processes}"]
    _start([*launcher, "-m", "benchmarks.memory", case.stage, str(folder / "peaks"), *flags])
    return [json.loads((folder / f"peaks_{rank}.json").read_text()) for rank in range(case.processes)]


_PROGRAM = [sys.executable, "-m", "megatron_brain"]


def _start(command: list[str]) -> None:
    # The processes of a case share the cores of one machine.
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=env, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr[-3000:]}")


def measure_steps(stage: str, flags: list[str], *, steps: int = _STEPS) -> dict:
    """Train for some steps, as the stage's command does.

    Returns:
        `peak`: the most bytes of tensors that existed; `phases`: the same by phase; `after_update`: bytes that exist
        between steps; `resident_peak`: peak of the resident memory of the whole process.
    """
    with allocations.recorded() as found:
        _train(stage, flags, steps)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "peak": found.peak,
        "phases": found.phase_peaks,
        "after_update": found.phase_ends["update"],
        "resident_peak": int(status["VmHWM"].split()[0]) * 1024,
    }


def _train(stage: str, flags: list[str], steps: int) -> None:
    from megatron_brain.generation.sampler import Sampler
    from megatron_brain.stages.brain import rounds
    from megatron_brain.stages.brain import stage as brain
    from megatron_brain.stages.reward import stage as reward
    from megatron_brain.stages.sft import stage as sft
    from megatron_brain.training import trainer
    from megatron_brain.training.start import open_run

    mark = allocations.mark
    trainer.forward_backward = mark("training", trainer.forward_backward)
    trainer.clip_and_step = mark("update", trainer.clip_and_step)
    Sampler.generate = mark("sampling", Sampler.generate)
    rounds.RoundMaker._score = mark("scoring", rounds.RoundMaker._score)
    run = open_run(load_config(stage, flags))
    made = {"sft": sft.SFTStage, "reward": reward.RewardStage, "brain": brain.BrainStage}[stage](run)
    training = trainer.Trainer(run, made)
    for _ in range(steps):
        made.after_step(training, training.step(made.micro_batches(training)))


def _report_peaks(stage: str, output: str, *flags: str) -> None:
    """The program of one process of a case."""
    allocations.settle_collectives()
    peaks = measure_steps(stage, list(flags))
    Path(f"{output}_{os.environ['RANK']}.json").write_text(json.dumps(peaks))


if __name__ == "__main__":
    _report_peaks(*sys.argv[1:])
