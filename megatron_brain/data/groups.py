"""Groups, the one shape of training data, and the packed sequence that a micro-batch of groups becomes.

A group is one prompt with its responses: one response (sft), a chosen and a rejected one (reward), or n samples
(brain). Groups are laid end to end in a single sequence of shape `[1, T]`; attention never crosses a group. With a
shared prefix the prompt stands there once and its responses follow it. Each response attends to the prompt and to
itself, and its positions continue the prompt's. Without a shared prefix, every response has its own copy of the prompt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_brain.errors import RecordError


@dataclass(frozen=True, kw_only=True)
class Group:
    """One prompt with its responses, tokenised.

    `responses` hold their EOS where the text was complete. `loss_masks` says per response token whether it counts
    (None: all do). `values` are numbers the loss needs: one per group ("margin") or one per response ("reward").
    `record_id` is the place of the record, for error messages.
    """

    prompt: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]
    loss_masks: tuple[tuple[bool, ...], ...] | None = None
    values: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    record_id: str = ""

    def __post_init__(self) -> None:
        if not self.prompt:
            raise RecordError(self.record_id, "empty prompt", "the prompt has no tokens")
        if not self.responses or not all(self.responses):
            raise RecordError(self.record_id, "empty response", "a group needs responses of at least one token each")

    def num_tokens(self, *, shared_prefix: bool) -> int:
        """Length of the group in a packed sequence."""
        prompts = 1 if shared_prefix else len(self.responses)
        return prompts * len(self.prompt) + sum(map(len, self.responses))


@dataclass(frozen=True)
class Segment:
    """A run of tokens that attend causally to themselves, and to the `prefix_length` tokens at `prefix_start`."""

    start: int
    length: int
    prefix_start: int = 0
    prefix_length: int = 0


@dataclass(frozen=True, kw_only=True)
class KnownLoss:
    """The loss of a micro-batch, known from an earlier pass: sums over `count` groups, and the largest values."""

    loss_sum: float
    count: int
    mean_sums: Mapping[str, float]
    maxima: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """Groups packed into one sequence: `T` tokens, `N` response tokens, `R` responses, `G` groups.

    tokens, position_ids: `[1, T]` int64. segments: cover all T tokens, padding included.
    predict_index `[N]`: place in the sequence whose hidden state predicts each response token; targets `[N]`: that
    token; loss_mask `[N]`: whether it counts; response_index `[N]`: the response it belongs to.
    last_index `[R]`: place of each response's last token.
    temperature: divides the logits before log-probabilities are taken. known_gradient `[N]` float32: the derivative of
    the loss in each log-probability, up to one factor, where it is known beforehand, else None. known_loss: the loss,
    where it is known beforehand too.
    token_scores: whether a policy's head also gives the entropy and the top-1 agreement at each response token.
    """

    tokens: Tensor
    position_ids: Tensor
    segments: tuple[Segment, ...]
    predict_index: Tensor
    targets: Tensor
    loss_mask: Tensor
    response_index: Tensor
    last_index: Tensor
    groups: tuple[Group, ...]
    temperature: float = 1.0
    known_gradient: Tensor | None = None
    known_loss: KnownLoss | None = None
    token_scores: bool = False

    @property
    def num_responses(self) -> int:
        return self.last_index.numel()

    def to(self, device: torch.device) -> "PackedBatch":
        """The same batch with its tensors on `device`."""
        moved: dict[str, Any] = {
            k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in vars(self).items()
        }
        return PackedBatch(**moved)

    def values(self, name: str) -> Tensor:
        """The values of one name of all groups, end to end: `[G]` or `[R]` float32 on the batch's device."""
        values = [value for group in self.groups for value in group.values[name]]
        return torch.tensor(values, dtype=torch.float32, device=self.tokens.device)

    def sum_per_response(self, values: Tensor) -> Tensor:
        """Sum values `[N]` of counted response tokens to `[R]` float32."""
        masked = torch.where(self.loss_mask, values.float(), 0.0)
        return torch.zeros(self.num_responses, device=values.device).index_add(0, self.response_index, masked)

    def split_per_response(self, values: Tensor) -> tuple[Tensor, ...]:
        """Values `[N]` of counted response tokens for each of the `R` responses: `[tokens of the response]`."""
        counts = torch.bincount(self.response_index[self.loss_mask], minlength=self.num_responses)
        return torch.split(values[self.loss_mask], counts.tolist())


def packed_length(groups: Sequence[Group], *, shared_prefix: bool, multiple_of: int = 1) -> int:
    """Length of the packed sequence of `groups` in tokens, rounded up to a multiple of `multiple_of`."""
    total = sum(group.num_tokens(shared_prefix=shared_prefix) for group in groups)
    return -(-total // multiple_of) * multiple_of


def pack_groups(groups: Sequence[Group], *, shared_prefix: bool, length: int | None = None) -> PackedBatch:
    """Lay groups end to end in one sequence, padded at its end to `length` tokens, which they must fit into."""
    builder = _Builder()
    for group in groups:
        builder.add_group(group, shared_prefix=shared_prefix and len(group.responses) > 1)
    total = len(builder.tokens)
    length = total if length is None else length
    assert total <= length, f"groups of {total} tokens do not fit into a sequence of {length}"
    if total < length:
        builder.add_padding(length - total)
    return builder.build(tuple(groups))


class _Builder:
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.segments: list[Segment] = []
        self.predict_index: list[int] = []
        self.targets: list[int] = []
        self.loss_mask: list[bool] = []
        self.response_index: list[int] = []
        self.last_index: list[int] = []

    def add_segment(self, tokens: Sequence[int], *, first_position: int, prefix: Segment | None = None) -> Segment:
        segment = Segment(
            start=len(self.tokens),
            length=len(tokens),
            prefix_start=prefix.start if prefix else 0,
            prefix_length=prefix.length if prefix else 0,
        )
        self.tokens += tokens
        self.positions += range(first_position, first_position + len(tokens))
        self.segments.append(segment)
        return segment

    def add_padding(self, length: int) -> None:
        whole = [segment for segment in self.segments if not segment.prefix_length]
        if not whole:
            # All positions are 0: the padding may be longer than any sequence that the model has positions for.
            self.segments.append(Segment(start=0, length=length))
            self.tokens, self.positions = [0] * length, [0] * length
            return
        # Padding repeats the start of a sequence of this batch, so it has the same activations. It can therefore never
        # raise the largest magnitude of the activations, by which FP8 scales them.
        longest = max(whole, key=lambda segment: segment.length)
        start = self.tokens[longest.start : longest.start + longest.length]
        for place in range(0, length, len(start)):
            self.add_segment(start[: length - place], first_position=0)

    def add_group(self, group: Group, *, shared_prefix: bool) -> None:
        prompt = self.add_segment(group.prompt, first_position=0) if shared_prefix else None
        for i, response in enumerate(group.responses):
            if prompt is not None:
                start = self.add_segment(response, first_position=prompt.length, prefix=prompt).start
                before = prompt.start + prompt.length - 1
            else:
                start = self.add_segment((*group.prompt, *response), first_position=0).start + len(group.prompt)
                before = start - 1
            self.predict_index += [before, *range(start, start + len(response) - 1)]
            self.targets += response
            self.loss_mask += group.loss_masks[i] if group.loss_masks else [True] * len(response)
            self.response_index += [len(self.last_index)] * len(response)
            self.last_index.append(start + len(response) - 1)

    def build(self, groups: tuple[Group, ...]) -> PackedBatch:
        def ints(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64)

        return PackedBatch(
            tokens=ints(self.tokens)[None],
            position_ids=ints(self.positions)[None],
            segments=tuple(self.segments),
            predict_index=ints(self.predict_index),
            targets=ints(self.targets),
            loss_mask=torch.tensor(self.loss_mask, dtype=torch.bool),
            response_index=ints(self.response_index),
            last_index=ints(self.last_index),
            groups=groups,
        )
