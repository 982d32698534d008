"""Compares a model with the Hugging Face directory it was converted from or to, on random tokens.

Both compute in float32 on weights rounded to one type, so that what is left is the order of float32 sums, and a
difference in the conversion stands out whatever type was written. That rest is not nothing: on a pretrained model's
logits transformers' own attention implementations differ by 1e-4 to 2e-4. So policies are compared on rows without
padding, where transformers sums in our order; reward models on padded rows, which are what may be read wrongly.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from megatron_brain.config.model import ModelConfig
from megatron_brain.data.groups import Group, PackedBatch, pack_groups
from megatron_brain.data.tokenizer import Tokenizer
from megatron_brain.logprobs import local_logits
from megatron_brain.models.attention import PackedLayout
from megatron_brain.models.provider import Chunk, Head

SEQUENCES = 6
LENGTH = 32
"""Of a reward model's sequences the first has so many tokens and the others fewer, down to about half."""

HIDDEN_TOLERANCE = 1e-5
"""Relative to the largest hidden state of the layer. float32 sums in another order differ by about 1e-6."""


class MismatchError(Exception):
    """The two models do not compute the same."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What two models differ by.

    Attributes:
        what: `logits` or `rewards`.
        count: positions or sequences compared.
        largest: the largest absolute difference.
        hidden: relative difference of the hidden states after each part of the model, in order.
    """

    what: str
    count: int
    largest: float
    hidden: dict[str, float]

    @property
    def first_difference(self) -> str:
        """The first part of the model after which hidden states differ."""
        for part, difference in self.hidden.items():
            if not difference <= HIDDEN_TOLERANCE:
                return f"{part} is the first after which hidden states differ (by {difference:.1e} of the largest)"
        return (
            f"hidden states agree everywhere (to {max(self.hidden.values()):.1e} of the largest): "
            "the head's weights differ, or the tolerance is below float32's rounding in this model"
        )

    def require(self, tolerance: float) -> None:
        """Raise MismatchError where the difference exceeds the tolerance, or is not a number."""
        if not self.largest <= tolerance:
            raise MismatchError(
                f"the {self.what} differ by up to {self.largest:.3e}, allowed are {tolerance:.0e}; "
                f"{self.first_difference}"
            )

    def __str__(self) -> str:
        unit = "positions" if self.what == "logits" else "sequences"
        return f"largest difference of the {self.what} at {self.count} random {unit}: {self.largest:.3e}"


@torch.no_grad()
def compare_with_hf(
    directory: str | Path, chunk: Chunk, model: ModelConfig, head: Head, tokenizer: Tokenizer, dtype: torch.dtype
) -> Comparison:
    """Run a chunk that holds the whole model, and transformers on the directory, on the same random tokens.

    Both models' weights are rounded to `dtype` and computed with in float32; `chunk` stays so.

    Returns:
        The largest difference of the logits of all token ids, or of the rewards.
    """
    hf = _load_hf(directory, head, tokenizer)
    device = next(chunk.parameters()).device
    for module in (hf.to(device), chunk):
        module.eval()
        for parameter in module.parameters():
            parameter.data = parameter.data.to(dtype).float()
    sequences = _random_sequences(model, tokenizer, hf.config.pad_token_id, padded=head == "reward")
    ours, our_hidden = _run_ours(chunk, sequences, head, device)
    theirs, their_hidden = _run_hf(hf, sequences, head, hf.config.pad_token_id, device)
    return Comparison(
        what="logits" if head == "policy" else "rewards",
        count=ours.size(0),
        largest=(ours - theirs).abs().max().item(),
        hidden={part: _relative(our_hidden[part], their_hidden[part]) for part in our_hidden},
    )


def _load_hf(directory: str | Path, head: Head, tokenizer: Tokenizer) -> nn.Module:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    auto = AutoModelForCausalLM if head == "policy" else AutoModelForSequenceClassification
    hf = auto.from_pretrained(directory, trust_remote_code=False, use_safetensors=True)
    if hf.config.pad_token_id is None:
        hf.config.pad_token_id = tokenizer.pad_id
    return hf


def _random_sequences(model: ModelConfig, tokenizer: Tokenizer, pad_id: int, *, padded: bool) -> list[list[int]]:
    """Sequences of any tokens but padding, ending in EOS; of different lengths if they are to be padded."""
    generator = torch.Generator().manual_seed(0)
    longest = min(LENGTH, model.max_position_embeddings)
    ordinary = torch.tensor([i for i in range(model.vocab_size) if i not in (pad_id, tokenizer.eos_id)])
    sequences = []
    for i in range(SEQUENCES):
        length = longest - i * longest // (2 * SEQUENCES) if padded else longest
        chosen = torch.randint(len(ordinary), (length - 1,), generator=generator)
        sequences.append([*ordinary[chosen].tolist(), tokenizer.eos_id])
    return sequences


def _run_ours(
    chunk: Chunk, sequences: list[list[int]], head: Head, device: torch.device
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits `[T, V]` of all tokens or rewards `[R]`, and hidden states `[T, h]` by part."""
    groups = [Group(prompt=(ids[0],), responses=(tuple(ids[1:]),)) for ids in sequences]
    batch = pack_groups(groups, shared_prefix=False).to(device)
    parts = _named_parts(chunk.embedding, chunk.decoder.layers, chunk.decoder.final_layernorm)
    with _captured(parts) as hidden:
        out = _logits(chunk, batch) if head == "policy" else chunk(batch)
    return out, {part: value[:, 0] for part, value in hidden.items()}


def _logits(chunk: Chunk, batch: PackedBatch) -> Tensor:
    hidden = chunk.trunk(batch.tokens, batch.position_ids, PackedLayout(segments=batch.segments))
    vocab = chunk.true_vocab_size
    return local_logits(hidden[:, 0], chunk.output_weight, first_id=0, vocab_size=vocab)[:, :vocab]


def _run_hf(
    hf: nn.Module, sequences: list[list[int]], head: Head, pad_id: int, device: torch.device
) -> tuple[Tensor, dict[str, Tensor]]:
    """The same of transformers, on a right-padded batch."""
    rows = [torch.tensor(ids) for ids in sequences]
    tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id).to(device)
    lengths = torch.tensor([len(ids) for ids in sequences], device=device)
    real = torch.arange(tokens.size(1), device=device) < lengths[:, None]
    parts = _named_parts(hf.model.embed_tokens, hf.model.layers, hf.model.norm)
    with _captured(parts) as hidden:
        logits = hf(input_ids=tokens, attention_mask=real.long(), use_cache=False).logits
    out = logits[real] if head == "policy" else logits[:, 0]
    return out.float(), {part: value[real] for part, value in hidden.items()}


def _named_parts(embedding: nn.Module, layers: nn.ModuleList, norm: nn.Module) -> dict[str, nn.Module]:
    return {
        "the embedding": embedding,
        **{f"layer {i}": layer for i, layer in enumerate(layers)},
        "the final norm": norm,
    }


@contextmanager
def _captured(parts: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Outputs of modules by name, filled while the block runs."""
    outputs: dict[str, Tensor] = {}

    def keep(part: str):
        def hook(module: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
            outputs[part] = (output[0] if isinstance(output, tuple) else output).float()

        return hook

    handles = [module.register_forward_hook(keep(part)) for part, module in parts.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
