"""A whole round of BRAIn with one update, against a step of TRL's GRPOTrainer with its own generate.

    python tools/benchmark.py round --hf-model DIR --train-data FILE

Both sides draw --samples responses to each of the same --prompts prompts at temperature 1, score them with the same
reward model (the trunk of --hf-model and a random head) and with the frozen model that training began from (the prior;
TRL's reference model, as beta is not 0), and take one optimizer step on all of them. The losses are those of two
methods, so they are not compared; the lengths of responses, and our rewards and log-probabilities, are checked against
transformers. TRL's weights are float32 and compute under autocast, or with --peer-weights bfloat16 all bfloat16.
"""

import argparse
import statistics
from pathlib import Path

import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import GRPOConfig, GRPOTrainer

from benchmarks.real_work import Work, add_work_arguments, opened_work
from benchmarks.trainers import (
    OurTrainer,
    PeerTrainer,
    add_peer_arguments,
    open_stage_run,
    peer_dtype,
    peer_settings,
    required,
)
from megatron_brain.config.data import TokenizerConfig
from megatron_brain.conversion.to_checkpoint import ToCheckpoint
from megatron_brain.conversion.workers import Workers
from megatron_brain.stages.brain.stage import BrainStage

REQUIRED = 5.0
"""Least ratio of the times that is required, of the default sizes and a model of 135M parameters."""

_LR = 1e-6
"""Learning rate of both sides. It is so small that both policies go on drawing responses as long as the model's."""

_WARM_UP = 2
"""Untimed rounds. Our prior is loaded in the second one: in the first it is the policy."""

_LENGTH_LIMIT = 0.15
"""Largest difference of the mean length of responses, of their length, that chance explains."""

_SCORE_LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Largest differences from transformers that rounding explains: of rewards, as a share of the largest one, and of
log-probabilities, in nats per token in the mean."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the subject."""
    parser.add_argument("--prompts", type=int, default=8, help="groups of a round [%(default)s]")
    parser.add_argument("--samples", type=int, default=8, help="responses n of a group [%(default)s]")
    parser.add_argument("--max-new-tokens", type=int, default=24, help="longest response [%(default)s]")
    add_peer_arguments(parser, micro_batch=4, of="groups", peer_micro_batch=16, of_peer="responses")
    add_work_arguments(parser, pairs=3)


def run(args: argparse.Namespace) -> dict:
    """Measure. `failures` in the result names what the two sides did not do alike."""
    failures: list[str] = []
    with opened_work(args) as work:
        reward = work.reward_model()
        ours = _open_ours(work, reward, args)
        tokens: list[int] = []

        def our_round() -> None:
            ours.step()
            tokens.append(sum(len(response["tokens"]) for response in _responses(ours.records())))

        peer = PeerTrainer(_open_peer(work, reward, args))
        timed = peer.compare(our_round, pairs=args.pairs, warm_up=_WARM_UP, label="round")
        per_round = args.prompts * args.samples
        drawn = {
            "ours": statistics.mean(tokens),
            "baseline": statistics.mean(log["completions/mean_length"] for log in peer.logs) * per_round,
        }
        report = {
            "peer": f"TRL {trl.__version__}",
            "tokens": drawn,
            "difference": _differences(work, reward, ours.records()),
            "gradient_norm": {"ours": ours.metrics["grad_norm"], "baseline": peer.logs[-1]["grad_norm"]},
        }
        failures += check_round(report, work)
    return report | {"round": timed, **required(REQUIRED, timed["wall"]["ratio"]), "failures": failures}


def _open_ours(work: Work, reward: Path, args: argparse.Namespace) -> OurTrainer:
    """Our trainer on rounds of the first prompts, each with one step."""
    for source in (work.model, reward):
        tokenizer = TokenizerConfig(tokenizer_model=str(source))
        folder = work.folder / f"{source.name}-checkpoint"
        folder.mkdir()
        conversion = ToCheckpoint(source, bf16=work.dtype == torch.bfloat16, tokenizer=tokenizer)
        conversion.write(folder, Workers(), lambda size: None)
    prompts = [{"prompt": record.prompt} for record in work.first(args.prompts)]
    settings = {
        "load": str(work.folder / f"{work.model.name}-checkpoint"),
        "finetune": True,
        "reward_load": str(work.folder / f"{reward.name}-checkpoint"),
        "train_data": work.write("prompts.jsonl", prompts),
        "seq_length": args.max_prompt_length + args.max_new_tokens,
        "max_new_tokens": args.max_new_tokens,
        "samples_per_prompt": args.samples,
        "sampling_batch_size": args.prompts * args.samples,
        "prompts_per_round": args.prompts,
        "global_batch_size": args.prompts,
        "micro_batch_size": args.micro_batch_size,
        "lr": _LR,
    }
    return OurTrainer(open_stage_run(work, "brain", **settings), BrainStage)


def _open_peer(work: Work, reward: Path, args: argparse.Namespace) -> GRPOTrainer:
    """TRL's trainer on the same prompts; an optimizer step takes all responses to them."""
    config = GRPOConfig(
        **peer_settings(work, args, batch=args.prompts * args.samples, lr=_LR),
        num_generations=args.samples,
        max_completion_length=args.max_new_tokens,
        temperature=1.0,
        beta=0.05,
        model_init_kwargs={"dtype": peer_dtype(args)},
    )
    return GRPOTrainer(
        model=str(work.model),
        args=config,
        reward_funcs=AutoModelForSequenceClassification.from_pretrained(reward, dtype=work.dtype).eval(),
        train_dataset=Dataset.from_list([{"prompt": record.prompt} for record in work.first(args.prompts)]),
        processing_class=work.tokenizer,
    )


def _responses(records: list[dict]) -> list[dict]:
    return [response for record in records for response in record["responses"]]


@torch.no_grad()
def _differences(work: Work, reward: Path, records: list[dict]) -> dict:
    """How our numbers of a round differ from those of transformers, as `_SCORE_LIMITS` describes; and the number of
    prompts whose token ids are others than those that TRL gets."""
    prior = AutoModelForCausalLM.from_pretrained(work.model, dtype=work.dtype).eval()
    scorer = AutoModelForSequenceClassification.from_pretrained(reward, dtype=work.dtype).eval()
    theirs: dict[str, list[float]] = {"reward": [], "log_prior": []}
    for record in records:
        for response in record["responses"]:
            tokens = torch.tensor([[*record["prompt_tokens"], *response["tokens"]]])
            theirs["reward"].append(scorer(tokens).logits.item())
            logits = prior(tokens).logits[0, :-1].float()
            by_token = logits.log_softmax(-1).gather(-1, tokens[0, 1:, None])
            theirs["log_prior"].append(by_token[len(record["prompt_tokens"]) - 1 :].sum().item())
    responses = _responses(records)
    off = {
        name: [abs(response[name] - value) for response, value in zip(responses, values, strict=True)]
        for name, values in theirs.items()
    }
    other_ids = [
        record for record in records if list(record["prompt_tokens"]) != work.tokenizer(record["prompt"])["input_ids"]
    ]
    return {
        "reward": max(off["reward"]) / max(map(abs, theirs["reward"])),
        "log_prior": sum(off["log_prior"]) / sum(len(response["tokens"]) for response in responses),
        "prompts": len(other_ids),
    }


def check_round(report: dict, work: Work) -> list[str]:
    """What shows that the two sides did not do the same work, in words."""
    wrong, limit = [], _SCORE_LIMITS[work.dtype]
    lengths = report["tokens"]
    if not abs(lengths["ours"] - lengths["baseline"]) <= _LENGTH_LIMIT * lengths["baseline"]:
        wrong.append(f"a round drew {lengths['ours']:.0f} tokens on our side, {lengths['baseline']:.0f} on TRL's")
    for name in ("reward", "log_prior"):
        if not report["difference"][name] <= limit:
            wrong.append(f"{name} is {report['difference'][name]:.3g} off that of transformers, allowed are {limit:g}")
    if report["difference"]["prompts"]:
        wrong.append(f"{report['difference']['prompts']} prompts have other token ids on TRL's side")
    for side, norm in report["gradient_norm"].items():
        if not norm > 0:
            wrong.append(f"the gradient of {side} is {norm}: there was nothing to learn")
    return wrong
