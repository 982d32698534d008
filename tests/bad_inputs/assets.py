"""The files from which bad inputs are made: a tokenizer, a tiny Hugging Face model, records, and checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from helpers.hf_models import write_hf_model
from helpers.tiny_tokenizers import CHATML, write_hf_tokenizer

SEQ_LENGTH = 64
_SIZES = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32}
_LENGTH = ["--seq-length", str(SEQ_LENGTH), "--no-progress"]
_BATCH = ["--global-batch-size", "2", "--lr", "1e-3"]


@dataclass(frozen=True)
class Assets:
    """Good folders and files, made once. A case that damages one copies it first."""

    root: Path

    @property
    def tokenizer(self) -> Path:
        """Folder of a tokenizer with a chat template."""
        return self.root / "tokenizer"

    @property
    def hf(self) -> Path:
        """Folder of a Hugging Face model with its tokenizer."""
        return self.root / "hf"

    @property
    def base(self) -> Path:
        """Converted checkpoint of `hf`, without an optimizer."""
        return self.root / "base"

    @property
    def policy(self) -> Path:
        """Checkpoints of iterations 1 and 2 of an SFT run."""
        return self.root / "policy"

    @property
    def reward(self) -> Path:
        """Checkpoint of a reward model."""
        return self.root / "reward"

    @property
    def brain(self) -> Path:
        """Checkpoint of a brain run, in the middle of a round."""
        return self.root / "brain"

    @property
    def rollouts(self) -> Path:
        """Rollout file of a round of two groups."""
        return self.root / "rollouts" / "round_0000.jsonl"

    def records(self, kind: str) -> Path:
        """File of records. The kind is sft, pairs, prompts or chats."""
        return self.root / f"{kind}.jsonl"

    def sft(self, *flags: str) -> list[str]:
        """Command that trains two steps and saves nothing."""
        return ["sft", *_LENGTH, *_BATCH, "--train-iters", "2", *flags]

    def sft_on(self, data: str, *flags: str) -> list[str]:
        """Command that trains on records of a file, from the converted checkpoint."""
        start = ["--load", str(self.base), "--finetune", "--save", "saved"]
        return self.sft("--train-data", data, *start, *flags)

    def reward_on(self, data: str, *flags: str) -> list[str]:
        """Command that trains a reward model on pairs of a file."""
        start = ["--load", str(self.base), "--finetune", "--save", "saved"]
        return ["reward", *_LENGTH, *_BATCH, "--train-data", data, "--train-iters", "1", *start, *flags]

    def brain_from(self, *flags: str) -> list[str]:
        """Command of the brain stage without its data."""
        start = ["--load", str(self.policy), "--finetune", "--reward-load", str(self.reward), "--save", "saved"]
        rounds = ["--max-new-tokens", "4", "--samples-per-prompt", "2", "--prompts-per-round", "4"]
        return ["brain", *_LENGTH, *_BATCH, *start, *rounds, "--train-iters", "2", *flags]

    def brain_on(self, data: str, *flags: str) -> list[str]:
        """Command of the brain stage on prompts of a file."""
        return self.brain_from("--train-data", data, *flags)

    def brain_again(self, checkpoint: str, *flags: str) -> list[str]:
        """Command that resumes a brain run in the middle of its round."""
        argv = self.brain_on(str(self.records("prompts")), "--load", checkpoint, "--prior-load", str(self.policy))
        return [argument for argument in argv if argument != "--finetune"] + list(flags)

    def sft_from_sizes(self, tokenizer: str, *flags: str, vocab_size: int = 330) -> list[str]:
        """Command that trains a random model with a tokenizer."""
        sizes = ["--num-layers", "2", "--hidden-size", "16", "--ffn-hidden-size", "32", "--num-attention-heads", "4"]
        sizes += ["--vocab-size", str(vocab_size), "--tokenizer-model", tokenizer]
        return self.sft("--train-data", str(self.records("sft")), "--save", "saved", *sizes, *flags)

    def generate_from(self, checkpoint: Path | str, *flags: str) -> list[str]:
        """Command that samples from a checkpoint."""
        output = ["--prompts", str(self.records("prompts")), "--output", "samples.jsonl"]
        sampling = ["--max-new-tokens", "4", "--samples-per-prompt", "1"]
        return ["generate", "--seq-length", str(SEQ_LENGTH), "--load", str(checkpoint), *output, *sampling, *flags]

    def evaluate(self, *flags: str) -> list[str]:
        """Command that compares the policy with the converted checkpoint."""
        models = ["--load", str(self.policy), "--prior-load", str(self.base)]
        output = ["--prompts", str(self.records("sft")), "--output", "report.json", "--max-new-tokens", "4"]
        return ["evaluate", "--seq-length", str(SEQ_LENGTH), *models, *output, "--bootstrap-samples", "10", *flags]

    def check(self, data: str, *flags: str, stage: str = "sft") -> list[str]:
        """Command that checks records."""
        return ["check_data", "--input", data, *self._reading(stage), *flags]

    def preprocess(self, data: str, *flags: str, stage: str = "sft") -> list[str]:
        """Command that prepares records."""
        return ["preprocess_data", "--input", data, "--output", "prepared", *self._reading(stage), *flags]

    def train_tokenizer(self, data: str, *flags: str) -> list[str]:
        """Command that trains a tokenizer on records or plain text."""
        return ["train_tokenizer", "--input", data, "--vocab-size", "380", "--save", "made", *flags]

    def export(self, checkpoint: Path | str, *flags: str) -> list[str]:
        """Command that exports a checkpoint to a Hugging Face folder."""
        return ["convert_megatron_to_hf", "--load", str(checkpoint), "--save", "exported", *flags]

    def plan(self, *flags: str) -> list[str]:
        """Command that lists layouts."""
        lengths = ["--prompt-length", "100", "--response-length", "50"]
        return ["plan", "--model", "llama3-8b", "--gpus", "8", "--stage", "sft", *lengths, *flags]

    def _reading(self, stage: str) -> list[str]:
        place = ["--hf-model", str(self.hf), "--seq-length", str(SEQ_LENGTH), "--workers", "1"]
        return ["--stage", stage, *place, *(["--max-new-tokens", "4"] if stage == "brain" else [])]


def write_assets(root: Path, run: Callable[[list[str]], None]) -> Assets:
    """Make all files.

    Args:
        run: function that runs a command and fails if its exit status is not 0.
    """
    assets = Assets(root)
    write_hf_tokenizer(assets.tokenizer, chat_template=CHATML, eos_token="<|im_end|>", pad_token="<pad>")
    ids = {"eos_token_id": 4, "pad_token_id": 5}
    write_hf_model(assets.hf, "llama", tie_word_embeddings=True, std=0.05, **_SIZES, **ids)
    write_hf_tokenizer(assets.hf, chat_template=CHATML, eos_token="<|im_end|>", pad_token="<pad>")
    _write_records(assets)
    run(["convert_hf_to_megatron", "--hf-model", str(assets.hf), "--save", str(assets.base)])
    saving = ["--save-interval", "1", "--train-iters", "2"]
    data = str(assets.records("sft"))
    run(assets.sft_on(data, "--save", str(assets.policy), *saving))
    run(assets.reward_on(str(assets.records("pairs")), "--save", str(assets.reward)))
    prompts = str(assets.records("prompts"))
    run(
        assets.brain_on(prompts, "--save", str(assets.brain), "--train-iters", "1", "--rollout-dir", f"{root}/rollouts")
    )
    return assets


def _write_records(assets: Assets) -> None:
    texts = [(f"package {number}: a small tool\nTL;DR:", f" tool number {number}") for number in range(8)]
    _write(assets.records("sft"), [{"prompt": prompt, "completion": answer} for prompt, answer in texts])
    _write(assets.records("prompts"), [{"prompt": prompt} for prompt, _ in texts])
    _write(assets.records("pairs"), [{"prompt": p, "chosen": a, "rejected": " a game"} for p, a in texts])
    _write(assets.records("chats"), [{"messages": chat(("user", p), ("assistant", a))} for p, a in texts])


def chat(*turns: tuple[str, str]) -> list[dict]:
    """Messages of (role, content)."""
    return [{"role": role, "content": content} for role, content in turns]


def _write(path: Path, records: Sequence[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def commands_that_are_right(assets: Assets, folder: Path) -> dict[str, list[str]]:
    """The commands to which the tables give bad inputs, here with good inputs."""
    sft, pairs, prompts = (str(assets.records(kind)) for kind in ("sft", "pairs", "prompts"))
    (folder / "judge.py").write_text("def score(prompts, responses, references):\n    return [1] * len(responses)\n")
    return {
        "sft": assets.sft_on(sft),
        "sft on chats": assets.sft_on(str(assets.records("chats")), "--multi-turn-loss"),
        "sft from Hugging Face": assets.sft("--train-data", sft, "--hf-model", str(assets.hf)),
        "sft from nothing": assets.sft_from_sizes(str(assets.tokenizer)),
        "sft resumed": assets.sft("--train-data", sft, "--load", str(assets.policy), "--train-iters", "3"),
        "reward": assets.reward_on(pairs),
        "brain": assets.brain_on(prompts),
        "brain on rollouts": assets.brain_from("--rollout-data", str(assets.rollouts)),
        "brain with held-out prompts": assets.brain_on(
            prompts,
            "--valid-data",
            sft,
            "--judge",
            "judge.py:score",
            "--keep-best",
            "win_rate_judge",
            "--stop-at-kl",
            "99",
        ),
        "brain resumed": assets.brain_again(str(assets.brain)),
        "generate": assets.generate_from(assets.policy),
        "evaluate": assets.evaluate("--judge", "judge.py:score", "--reward-load", str(assets.reward)),
        "check_data": assets.check(sft),
        "preprocess_data": assets.preprocess(sft),
        "train_tokenizer": assets.train_tokenizer(sft),
        "convert_hf_to_megatron": ["convert_hf_to_megatron", "--hf-model", str(assets.hf), "--save", "converted"],
        "convert_megatron_to_hf": assets.export(assets.policy),
        "inspect_checkpoint": ["inspect_checkpoint", str(assets.policy)],
        "plan": assets.plan(),
    }
