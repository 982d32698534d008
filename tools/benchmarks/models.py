"""A BRAIn update of one random Llama in two ways: with transformers on padded rows, and with this package.

Both start from the same Hugging Face directory, which this package reads through its conversion. Both sides use the
package's loss (`objectives.brain`); they share nothing before it.
"""

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from megatron_brain.config.loader import config_from_dict
from megatron_brain.config.stage_spec import Head
from megatron_brain.conversion.registry import family_for_export
from megatron_brain.conversion.weights import hf_tensors
from megatron_brain.data.groups import Group
from megatron_brain.errors import ConfigError
from megatron_brain.models.provider import Chunk
from megatron_brain.objectives.brain import brain_loss, posterior_log_weights
from megatron_brain.stages.brain.rollouts import Response, Rollout, write_rollouts
from megatron_brain.stages.brain.stage import BrainStage
from megatron_brain.startup.disk import Start
from megatron_brain.training.run import Run
from megatron_brain.training.schedule import forward_backward, pack_micro_batches
from megatron_brain.training.start import open_run
from megatron_brain.training.trainer import Trainer
from megatron_brain.training.validation import score_groups

PAD, EOS = 0, 1
"""Token ids that random texts never have."""

_ADAMW = {"lr": 1e-6, "weight_decay": 0.0, "eps": 1e-8, "betas": (0.9, 0.95)}
_CLIP = 1.0
_STEPS = 1_000_000
"""More steps than are ever taken, so that there is one round and one learning rate."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a group in tokens: one prompt and its responses, at most `response_spread` longer or shorter."""

    prompt_length: int
    samples: int
    response_length: int
    response_spread: int = 0

    def __str__(self) -> str:
        spread = f"±{self.response_spread}" if self.response_spread else ""
        return f"{self.prompt_length} + {self.samples} x {self.response_length}{spread}"


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add flags for the sizes of the model. The defaults make 33.0M parameters."""
    group = parser.add_argument_group("model")
    group.add_argument("--layers", type=int, default=8)
    group.add_argument("--hidden-size", type=int, default=512)
    group.add_argument("--ffn-hidden-size", type=int, default=1664)
    group.add_argument("--heads", type=int, default=8)
    group.add_argument("--key-value-heads", type=int, default=8)
    group.add_argument("--vocab-size", type=int, default=8192)
    group.add_argument("--untied", action="store_true", help="give the output layer its own weights")
    group.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    group.add_argument("--seed", type=int, default=1234)


def write_hf_model(directory: Path, args: argparse.Namespace, *, head: Head, positions: int) -> int:
    """Write a random model with a two-word tokenizer. The weights are so large that attention is far from uniform.

    Returns:
        The number of its parameters.
    """
    torch.manual_seed(args.seed + (head == "reward"))
    config = LlamaConfig(
        num_hidden_layers=args.layers,
        hidden_size=args.hidden_size,
        intermediate_size=args.ffn_hidden_size,
        num_attention_heads=args.heads,
        num_key_value_heads=args.key_value_heads,
        vocab_size=args.vocab_size,
        max_position_embeddings=positions,
        initializer_range=args.hidden_size**-0.5,
        tie_word_embeddings=not args.untied,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
        num_labels=1,
    )
    model = LlamaForCausalLM(config) if head == "policy" else LlamaForSequenceClassification(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(directory)
    write_tokenizer(directory)
    return sum(parameter.numel() for parameter in model.parameters())


def write_tokenizer(directory: Path) -> None:
    """Write a tokenizer of PAD, EOS and one word: without any word its vocabulary would be taken for lost."""
    words = tokenizers.models.WordLevel({"<pad>": PAD, "</s>": EOS, "word": EOS + 1}, unk_token="<pad>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), pad_token="<pad>", eos_token="</s>"
    )
    tokenizer.save_pretrained(directory)


def random_rollout(shape: Shape, *, vocab_size: int, seed: int) -> Rollout:
    """A group of random tokens without log-probabilities and rewards.

    Lengths alternate between the shortest and the longest and lie evenly between them, so that their mean is
    `response_length` and one is the longest.
    """
    generator = torch.Generator().manual_seed(seed)

    def text(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(EOS + 1, vocab_size, (length,), generator=generator).tolist())

    offsets = torch.linspace(-shape.response_spread, shape.response_spread, shape.samples).round().int().tolist()
    lengths = [shape.response_length + offset for offset in offsets]
    if min(lengths) < 1 or shape.samples < 2 or shape.prompt_length < 1:
        raise ConfigError(f"{shape}: a group needs a prompt, two samples or more, and a token in each")
    return Rollout(
        id=str(shape),
        index=0,
        prompt_tokens=text(shape.prompt_length),
        responses=[Response(tokens=(*text(length - 1), EOS)) for length in lengths],
    )


def set_numbers(rollout: Rollout, logprobs: Tensor, *, seed: int) -> None:
    """Fill in rewards, and proposal and prior near the policy's `logprobs` `[n]`, such that alpha and beta vary."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(3, len(rollout.responses), generator=generator)
    rows = zip(rollout.responses, logprobs.tolist(), *noise.tolist(), strict=True)
    for response, logprob, proposal, prior, reward in rows:
        response.log_proposal = min(logprob + 0.3 * proposal, 0.0)
        response.log_prior = min(logprob + 0.3 * prior, 0.0)
        response.reward = reward


@dataclass(frozen=True, kw_only=True)
class PaddedBatch:
    """A group as rows `[n, prompt + longest response]` padded on the right; `mask` is 1 at tokens.

    targets, counts: `[n, longest response]`, the response tokens, and whether a position has one.
    """

    tokens: Tensor
    mask: Tensor
    targets: Tensor
    counts: Tensor
    rollout: Rollout

    def values(self, name: str) -> Tensor:
        return torch.tensor(self.rollout.values(name), device=self.tokens.device)


def pad_rollout(rollout: Rollout, device: torch.device) -> PaddedBatch:
    """The group as padded rows: every response follows its own copy of the prompt."""
    rows = [torch.tensor((*rollout.prompt_tokens, *response.tokens)) for response in rollout.responses]
    tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD).to(device)
    mask = (tokens != PAD).long()
    prompt = len(rollout.prompt_tokens)
    return PaddedBatch(
        tokens=tokens, mask=mask, targets=tokens[:, prompt:], counts=mask[:, prompt:].bool(), rollout=rollout
    )


class HFPolicy:
    """transformers' model and torch's AdamW, with the usual update.

    With `all_logits` it makes logits at every position, else only where a response token is predicted. In bfloat16 its
    AdamW works on bfloat16 weights, which is less work than ours, which keeps float32 weights.
    """

    def __init__(self, directory: Path, *, dtype: torch.dtype, device: torch.device, all_logits: bool = True) -> None:
        self.model = LlamaForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="sdpa").to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True, **_ADAMW)
        self.all_logits = all_logits

    def logprobs(self, batch: PaddedBatch) -> Tensor:
        """Sequence log-probabilities `[n]` float32 of the responses."""
        length = batch.targets.size(1)
        keep = 0 if self.all_logits else length + 1
        out = self.model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False, logits_to_keep=keep)
        logits = out.logits[:, -length - 1 : -1].float()
        by_token = logits.log_softmax(-1).gather(-1, batch.targets[..., None]).squeeze(-1)
        return torch.where(batch.counts, by_token, 0.0).sum(1)

    def forward_backward(self, batch: PaddedBatch) -> float:
        """Leave the gradient of the loss in `.grad` and return the loss."""
        self.model.train()
        self.optimizer.zero_grad()
        log_proposal = batch.values("log_proposal")
        log_alpha = posterior_log_weights(
            batch.values("log_prior"), batch.values("reward"), log_proposal, reward_temperature=1.0
        )
        loss = brain_loss(self.logprobs(batch), log_proposal, log_alpha)
        loss.backward()
        return loss.item()

    def update(self, batch: PaddedBatch) -> float:
        """Take one optimizer step and return the loss before it."""
        loss = self.forward_backward(batch)
        nn.utils.clip_grad_norm_(self.model.parameters(), _CLIP)
        self.optimizer.step()
        return loss

    def gradients(self) -> dict[str, Tensor]:
        return {name: parameter.grad for name, parameter in self.model.named_parameters()}


class HFReward:
    """transformers' reward model."""

    def __init__(self, directory: Path, *, dtype: torch.dtype, device: torch.device) -> None:
        load = LlamaForSequenceClassification.from_pretrained
        self.model = load(directory, dtype=dtype, attn_implementation="sdpa").to(device).eval()

    @torch.no_grad()
    def rewards(self, batch: PaddedBatch) -> Tensor:
        """Rewards `[n]` float32."""
        out = self.model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False)
        return out.logits.squeeze(1).float()


def open_brain_run(directory: Path, rollouts: Path, args: argparse.Namespace, *, seq_length: int) -> Run:
    """A brain run on a Hugging Face directory and a file of rollouts; it saves nothing."""
    settings = {
        "hf_model": str(directory),
        "bf16": args.dtype == "bfloat16",
        "rollout_data": str(rollouts),
        "seq_length": seq_length,
        "global_batch_size": 1,
        "train_iters": _STEPS,
        "refresh_interval": _STEPS,
        "lr": _ADAMW["lr"],
        "lr_decay_style": "constant",
        "weight_decay": _ADAMW["weight_decay"],
        "adam_eps": _ADAMW["eps"],
        "adam_beta1": _ADAMW["betas"][0],
        "adam_beta2": _ADAMW["betas"][1],
        "clip_grad": _CLIP,
        "seed": args.seed,
        "progress": False,
    }
    return open_run(config_from_dict("brain", settings, "the benchmark"))


class OurPolicy:
    """The package's trainer on its brain stage, which reads its one group from a file."""

    def __init__(self, directory: Path, rollout: Rollout, args: argparse.Namespace) -> None:
        self._directory = directory
        longest = len(rollout.prompt_tokens) + max(len(response.tokens) for response in rollout.responses)
        self.run = open_brain_run(directory, self._write(rollout), args, seq_length=longest)
        self.trainer = Trainer(self.run, BrainStage(self.run))

    def _write(self, rollout: Rollout) -> Path:
        file = self._directory / f"rollouts-{len(rollout.responses)}.jsonl"
        write_rollouts(file, [rollout])
        return file

    def stage_on(self, rollout: Rollout) -> BrainStage:
        """A stage on another group, no longer than the first."""
        brain = dataclasses.replace(self.run.config.brain, rollout_data=str(self._write(rollout)))
        return BrainStage(dataclasses.replace(self.run, config=dataclasses.replace(self.run.config, brain=brain)))

    @property
    def micro_batches(self) -> list[list[Group]]:
        return self.trainer.stage.micro_batches(self.trainer)

    @property
    def packed_tokens(self) -> int:
        (groups,) = self.micro_batches
        return sum(group.num_tokens(shared_prefix=self.trainer.stage.shared_prefix) for group in groups)

    def update(self, stage: BrainStage | None = None) -> float:
        """Take a training step and return the loss before it. A given stage replaces the trainer's, with its group."""
        if stage is not None:
            self.trainer.stage = stage
        return self.trainer.step(self.micro_batches)["loss"]

    def forward_backward(self) -> float:
        """Take a training step up to the gradients and return the loss."""
        trainer, stage = self.trainer, self.trainer.stage
        batches = pack_micro_batches(self.micro_batches, trainer.parallel, shared_prefix=stage.shared_prefix)
        batches = stage.prepare(trainer, batches)
        for chunk in trainer.wrapped:
            chunk.train()
            chunk.zero_grad_buffer()
        (report,) = forward_backward(trainer.wrapped, batches, stage.loss, trainer.parallel)
        return report.loss_sum.item() / report.count

    def gradients(self) -> dict[str, Tensor]:
        """The gradients that `forward_backward` left, with the names and shapes of transformers."""
        (chunk,) = self.trainer.gathered_chunks()
        with _gradients_as_weights(chunk):
            model = self.run.config.model
            tensors = hf_tensors(chunk, model, "policy", family_for_export(model))
            return {name: tensor.clone() for name, tensor in tensors}


@contextmanager
def _gradients_as_weights(chunk: Chunk) -> Iterator[None]:
    """Lets the code that exports weights export gradients, which are fused in the same way."""
    weights = {parameter: parameter.data for parameter in chunk.parameters()}
    try:
        for parameter in weights:
            parameter.data = parameter.main_grad
        yield
    finally:
        for parameter, data in weights.items():
            parameter.data = data


class OurScorer:
    """A frozen model that scores groups as a round does."""

    def __init__(self, run: Run, directory: Path, *, head: Head) -> None:
        resolved = dataclasses.replace(run.resolved, start=Start(hf_model=str(directory)))
        self.run = dataclasses.replace(run, resolved=resolved)
        self.head = head
        self.chunks = self.run.build_model(head)
        for chunk in self.chunks:
            chunk.eval().requires_grad_(False)

    def score(self, micro_batches: Sequence[Sequence[Group]]) -> Tensor:
        """Sequence log-probabilities or rewards of all responses in one float32 tensor."""
        shared_prefix = self.run.config.training.shared_prefix
        scored = score_groups(
            self.chunks, micro_batches, self.run.parallel, head=self.head, shared_prefix=shared_prefix
        )
        return torch.cat([values for groups in scored for values in groups])
