"""Compares a checkpoint with the Hugging Face directory that it was converted from or to, on random tokens.

Both models run with one module's weights in memory at a time. Both compute in float32, on weights that are rounded to
the same type. So right conversions differ only by the order of float32 sums, whatever type was written.

The order of sums matters too: on a pretrained model's logits, transformers' own attention implementations differ by
1e-4 to 2e-4. Policies are therefore compared on rows without padding, where transformers sums in our order. Reward
models are compared on padded rows, because with a wrong padding token transformers reads the reward at a wrong place.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_brain.checkpointing import CheckpointInfo
from megatron_brain.checkpointing.index import read_index
from megatron_brain.config.model import ModelConfig
from megatron_brain.conversion.errors import MismatchError
from megatron_brain.conversion.registry import HFModel
from megatron_brain.conversion.safetensors_files import SafetensorsReader
from megatron_brain.conversion.streamed_chunk import StreamedChunk
from megatron_brain.conversion.streamed_hf import streamed_hf_model
from megatron_brain.conversion.weights import check_tensors
from megatron_brain.data.groups import Group, PackedBatch, pack_groups
from megatron_brain.data.tokenizer import Tokenizer
from megatron_brain.models.attention import PackedLayout
from megatron_brain.models.gpt import RewardModel
from megatron_brain.runtime.parallel import Parallel

SEQUENCES = 6
LENGTH = 32
"""Tokens of a sequence. The sequences of a reward model get shorter one by one, down to about half of this."""

TOLERANCE = 1e-5
"""Largest difference allowed, relative to the largest logit or reward, or to 1 where that is smaller.

float32 sums in another order differ by about 1e-6 of a model's largest hidden state, and logits are sums over hidden
states. An absolute bound would refuse right conversions of models with large logits (GPT-2's are beyond 100), or accept
wrong conversions of models with small ones."""

HIDDEN_TOLERANCE = 1e-5
"""Hidden states that differ by at most this count as equal. It is relative to the largest hidden state of the layer."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The difference between two models.

    Attributes:
        what: `logits` or `rewards`.
        count: positions or sequences compared.
        largest: the largest absolute difference.
        scale: the largest absolute logit or reward of the Hugging Face model.
        hidden: the relative difference of the hidden states after each part of the model, in order.
    """

    what: str
    count: int
    largest: float
    scale: float
    hidden: dict[str, float]

    @property
    def first_difference(self) -> str:
        """A sentence that names the first part of the model after which hidden states differ."""
        for part, difference in self.hidden.items():
            if not difference <= HIDDEN_TOLERANCE:
                return f"{part} is the first after which hidden states differ (by {difference:.1e} of the largest)"
        return (
            f"hidden states agree everywhere (to {max(self.hidden.values()):.1e} of the largest): "
            "the head's weights differ, or the tolerance is below float32's rounding in this model"
        )

    def require(self, tolerance: float) -> None:
        """Raise MismatchError where the difference exceeds the tolerance, or is not a number.

        Args:
            tolerance: relative, like TOLERANCE.
        """
        if math.isnan(self.largest):
            raise MismatchError(
                f"the {self.what} are not finite: some weights are not, fetch them again; {self.first_difference}"
            )
        allowed = tolerance * max(1.0, self.scale)
        if not self.largest <= allowed:
            raise MismatchError(
                f"the {self.what} differ by up to {self.largest:.3e}, allowed are {allowed:.1e}; "
                f"{self.first_difference}"
            )

    def __str__(self) -> str:
        unit = "positions" if self.what == "logits" else "sequences"
        return (
            f"largest difference of the {self.what} at {self.count} random {unit}: {self.largest:.3e} "
            f"(largest value {self.scale:.3g})"
        )


def count_parts(model: ModelConfig) -> int:
    """How many parts the two models have together: the embedding, the layers and the final norm of each."""
    return 2 * (model.num_layers + 2)


@torch.no_grad()
def compare_with_hf(
    source: HFModel,
    info: CheckpointInfo,
    model: ModelConfig,
    tokenizer: Tokenizer,
    dtype: torch.dtype,
    parallel: Parallel,
    *,
    advance: Callable[[], None] = lambda: None,
) -> Comparison:
    """Run the model of a checkpoint, and transformers on a Hugging Face directory, on the same random tokens.

    Args:
        source: the directory.
        info: the checkpoint, with the same head.
        model: its sizes, resolved.
        dtype: both models' weights are rounded to it.
        parallel: both models run on the device of this process.
        advance: called after each of `count_parts(model)` parts of the two models.
    """
    pad_id = source.config.get("pad_token_id")
    pad_id = tokenizer.pad_id if pad_id is None else pad_id
    inputs = _Inputs(
        sequences=_random_sequences(model, tokenizer, pad_id, padded=info.head == "reward"),
        pad_id=pad_id,
        device=parallel.device,
    )
    expected, expected_hidden = _run_hf(source, model, inputs, dtype, advance)
    ours = StreamedChunk(model, parallel, info.head, read_index(info.path), dtype, inputs.ids)
    largest, hidden = _run_ours(ours, inputs, expected, expected_hidden, advance)
    return Comparison(
        what="logits" if info.head == "policy" else "rewards",
        count=expected.size(0),
        largest=largest,
        scale=expected.abs().max().item(),
        hidden=hidden,
    )


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """The tokens that both models are run on."""

    sequences: list[list[int]]
    pad_id: int
    device: torch.device

    @property
    def ids(self) -> list[int]:
        """All token ids that occur in the sequences."""
        return sorted({token for sequence in self.sequences for token in sequence})

    def padded(self) -> tuple[Tensor, Tensor]:
        """Tokens `[r, s]`, padded on the right, and a mask `[r, s]` of those that are not padding."""
        rows = [torch.tensor(sequence) for sequence in self.sequences]
        tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad_id)
        lengths = torch.tensor([len(sequence) for sequence in self.sequences])
        real = torch.arange(tokens.size(1)) < lengths[:, None]
        return tokens.to(self.device), real.to(self.device)

    def packed(self) -> PackedBatch:
        """The sequences, packed end to end. Each token is given as its position in `ids`."""
        place = {token: index for index, token in enumerate(self.ids)}
        rows = [[place[token] for token in sequence] for sequence in self.sequences]
        groups = [Group(prompt=(row[0],), responses=(tuple(row[1:]),)) for row in rows]
        return pack_groups(groups, shared_prefix=False).to(self.device)


def _random_sequences(model: ModelConfig, tokenizer: Tokenizer, pad_id: int, *, padded: bool) -> list[list[int]]:
    """Random sequences that contain no padding and end in EOS. Their lengths differ if they will be padded."""
    generator = torch.Generator().manual_seed(0)
    longest = min(LENGTH, model.longest_sequence[0])
    ordinary = torch.tensor([i for i in range(model.vocab_size) if i not in (pad_id, tokenizer.eos_id)])
    sequences = []
    for i in range(SEQUENCES):
        length = longest - i * longest // (2 * SEQUENCES) if padded else longest
        chosen = torch.randint(len(ordinary), (length - 1,), generator=generator)
        sequences.append([*ordinary[chosen].tolist(), tokenizer.eos_id])
    return sequences


def _run_hf(
    source: HFModel, model: ModelConfig, inputs: _Inputs, dtype: torch.dtype, advance: Callable[[], None]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run transformers. Returns logits `[T, V]` of all tokens or rewards `[R]`, and hidden states `[T, h]` by part."""
    tokens, real = inputs.padded()
    hidden: dict[str, Tensor] = {}

    def keep(part: str, value: Tensor) -> None:
        hidden[part] = value[real]
        advance()

    files = SafetensorsReader(source.directory)
    # What was written may be untied where the checkpoint is tied.
    untied = source.architecture["untie_embeddings_and_output_weights"]
    names = check_tensors(files, source, dataclasses.replace(model, untie_embeddings_and_output_weights=untied))
    hf = streamed_hf_model(source, files, names, dtype, inputs.device)
    if hf.config.pad_token_id is None:
        hf.config.pad_token_id = inputs.pad_id
    layers = list(hf.get_submodule(source.family.hf_layers))
    with _watched(layers, hf.get_submodule(source.family.hf_final_norm), keep):
        logits = hf(input_ids=tokens, attention_mask=real.long(), use_cache=False).logits
    return (logits[real] if source.head == "policy" else logits[:, 0]), hidden


def _run_ours(
    streamed: StreamedChunk,
    inputs: _Inputs,
    expected: Tensor,
    expected_hidden: dict[str, Tensor],
    advance: Callable[[], None],
) -> tuple[float, dict[str, float]]:
    """Run our model. Returns the largest absolute difference, and the relative difference of hidden states by part."""
    batch, chunk, hidden = inputs.packed(), streamed.chunk, {}

    def keep(part: str, value: Tensor) -> None:
        theirs = expected_hidden[part]
        hidden[part] = ((value[:, 0] - theirs).abs().max() / theirs.abs().max()).item()
        advance()

    with _watched(list(chunk.decoder.layers), chunk.decoder.final_layernorm, keep):
        if isinstance(chunk, RewardModel):
            return (chunk(batch) - expected).abs().max().item(), hidden
        out = chunk.trunk(batch.tokens, batch.position_ids, PackedLayout(segments=batch.segments))
    blocks = [
        (logits - expected[:, start : start + logits.size(1)]).abs().max()
        for start, logits in streamed.logits(out[:, 0])
    ]
    # torch's maximum keeps NaN, Python's does not.
    return torch.stack(blocks).max().item(), hidden


@contextmanager
def _watched(layers: list[nn.Module], norm: nn.Module, keep: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While the block runs, give `keep` the input of the first layer (the embedding, with positions), the output of
    every layer and the output of the final norm. All `layers` may be one module that is called once for each."""
    calls = iter(range(len(layers)))

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        keep("the embedding", args[0] if args else kwargs["hidden_states"])
        first.remove()

    def after(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        keep(f"layer {next(calls)}", output[0] if isinstance(output, tuple) else output)

    first = layers[0].register_forward_pre_hook(before, with_kwargs=True)
    handles = [module.register_forward_hook(after) for module in dict.fromkeys(layers)]
    handles.append(norm.register_forward_hook(lambda module, args, output: keep("the final norm", output)))
    try:
        yield
    finally:
        for handle in (first, *handles):
            handle.remove()
