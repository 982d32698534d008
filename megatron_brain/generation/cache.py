"""Key/value cache of sampled responses, and the two attention layouts that fill and read it.

A batch is `P` prompts with `n` samples each, `P * n` rows in prompt-major order. The cache holds a prompt's keys and
values once, whatever n is; every sample adds its own. Queries and keys are rotated by position before they come here,
so the cache holds rotated keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_brain.models.attention import PackedLayout


@dataclass
class _Layer:
    """Keys and values of the prompts, `[P, key_value_heads, longest prompt, dim]`, zero after a prompt's end, and of
    the samples, `[P, key_value_heads, n, capacity, dim]`, valid up to the cache's length."""

    prompt_key: Tensor
    prompt_value: Tensor
    own_key: Tensor
    own_value: Tensor


class KeyValueCache:
    """Keys and values of every layer that this process holds, by global layer number.

    Args:
        prompt_lengths: number of tokens of each of the P prompts.
        samples: n, samples per prompt.
        capacity: number of tokens that a sample can add.
        device: device of the cache. A layer is allocated when its prompts are stored.
    """

    def __init__(self, prompt_lengths: Sequence[int], *, samples: int, capacity: int, device: torch.device) -> None:
        self.samples = samples
        self.capacity = capacity
        self.length = 0
        self.layers: dict[int, _Layer] = {}
        self.prompt_lengths = torch.tensor(prompt_lengths, device=device)
        prompt = torch.arange(len(prompt_lengths), device=device)
        self._packed_prompt = prompt.repeat_interleave(self.prompt_lengths)
        self._packed_place = torch.cat([torch.arange(n, device=device) for n in prompt_lengths])
        self.prompt_bias = self._bias()

    @property
    def prompts(self) -> int:
        """P, the number of prompts in the cache."""
        return self.prompt_lengths.numel()

    def next_positions(self) -> Tensor:
        """Position `[P * n]` of the token that each row adds next."""
        return (self.prompt_lengths + self.length).repeat_interleave(self.samples)

    def store_prompts(self, layer_number: int, key: Tensor, value: Tensor) -> None:
        """Allocate a layer and keep the packed prompts' key and value `[T, key_value_heads, dim]`. Padding that follows
        the prompts is left out."""
        heads, dim = key.shape[1:]
        # `DecodeLayout` takes products and softmax in float32, as the fused attention that scores a response does.
        # On a CPU bfloat16 products of these sizes are no faster, so the cache stores float32 there.
        dtype = torch.float32 if key.device.type == "cpu" else key.dtype
        longest = int(self.prompt_lengths.max())

        def by_prompt(packed: Tensor) -> Tensor:
            padded = packed.new_zeros(self.prompts, heads, longest, dim, dtype=dtype)
            tokens = packed[: self._packed_prompt.numel()].to(dtype)
            padded.transpose(1, 2)[self._packed_prompt, self._packed_place] = tokens
            return padded

        own = [key.new_empty(self.prompts, heads, self.samples, self.capacity, dim, dtype=dtype) for _ in range(2)]
        self.layers[layer_number] = _Layer(by_prompt(key), by_prompt(value), *own)

    def append(self, layer_number: int, key: Tensor, value: Tensor) -> _Layer:
        """Write the rows' new key and value `[P * n, key_value_heads, dim]` after the `length` stored tokens."""
        layer = self.layers[layer_number]
        shape = (self.prompts, self.samples, *key.shape[1:])
        layer.own_key[:, :, :, self.length] = key.view(shape).transpose(1, 2)
        layer.own_value[:, :, :, self.length] = value.view(shape).transpose(1, 2)
        return layer

    def advance(self) -> None:
        """Count the token that every layer has appended."""
        self.length += 1

    def keep(self, prompts: Tensor, samples: Tensor) -> None:
        """Drop all but some samples.

        Args:
            prompts: `[P']` indices of the prompts to keep.
            samples: `[P', n']` indices of the samples to keep of each of these prompts.
        """
        self.prompt_lengths = self.prompt_lengths[prompts]
        self.samples = samples.size(1)
        longest = int(self.prompt_lengths.max())
        self.prompt_bias = self._bias()

        def own(tensor: Tensor) -> Tensor:
            _, heads, _, capacity, dim = tensor.shape
            kept = tensor.new_empty(len(prompts), heads, self.samples, capacity, dim)
            used = tensor[:, :, :, : self.length].transpose(1, 2)
            kept[:, :, :, : self.length] = used[prompts[:, None], samples].transpose(1, 2)
            return kept

        for layer in self.layers.values():
            layer.prompt_key = layer.prompt_key[prompts, :, :longest]
            layer.prompt_value = layer.prompt_value[prompts, :, :longest]
            layer.own_key = own(layer.own_key)
            layer.own_value = own(layer.own_value)

    def _bias(self) -> Tensor | None:
        """`[P, 1, longest]` float32, -inf where a prompt has no token; None if all prompts are equally long."""
        longest = self.prompt_lengths.max()
        if bool((self.prompt_lengths == longest).all()):
            return None
        place = torch.arange(int(longest), device=self.prompt_lengths.device)
        absent = place >= self.prompt_lengths[:, None]
        return torch.zeros_like(absent, dtype=torch.float32).masked_fill_(absent, -torch.inf)[:, None]


@dataclass
class PrefillLayout(PackedLayout):
    """Packed prompts that attend as in training. Their keys and values are kept in the cache.

    `segments` are the prompts, then at most one segment of padding.
    """

    cache: KeyValueCache = field(kw_only=True)

    def attend(self, layer_number: int, query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
        """Do what `PackedLayout.attend` does, and store key and value."""
        self.cache.store_prompts(layer_number, key, value)
        return super().attend(layer_number, query, key, value, **options)


@dataclass
class DecodeLayout(PackedSeqParams):
    """One new token of every row, which attends to the row's prompt and to the tokens sampled so far.

    Rows beyond the cache's `P * n` are padding: their output is zero and they are not stored.
    """

    cache: KeyValueCache = field(kw_only=True)

    def attend(
        self, layer_number: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float, dropout_p: float = 0.0
    ) -> Tensor:
        """Append key and value, then attend. The n rows of a prompt read the prompt's keys and values once.

        Args:
            layer_number: global number of the layer, from 1.
            query: `[T, heads, dim]`, `T >= P * n`. key, value: `[T, key_value_heads, dim]`.
            scale: multiplies the scores. dropout_p: unused, because sampling is never a training pass.

        Returns:
            `[T, heads, dim]` in query's dtype.
        """
        cache = self.cache
        rows = cache.prompts * cache.samples
        layer = cache.append(layer_number, key[:rows], value[:rows])
        total, heads, dim = query.shape
        grouped = (cache.prompts, cache.samples, key.size(1), heads // key.size(1), dim)
        # The order [P, key_value_heads, n, heads per key, dim] makes a prompt's rows, and a row's heads, neighbours.
        queries = query[:rows].view(grouped).permute(0, 2, 1, 3, 4).contiguous().float() * scale
        out = _attend_in_two_parts(queries, layer, cache.length + 1, cache.prompt_bias)
        out = out.view(queries.shape).permute(0, 2, 1, 3, 4).reshape(rows, heads, dim).to(query.dtype)
        return out if rows == total else F.pad(out, (0, 0, 0, 0, 0, total - rows))


def _attend_in_two_parts(queries: Tensor, layer: _Layer, length: int, prompt_bias: Tensor | None) -> Tensor:
    """Attention of scaled float32 queries `[P, k, n, g, dim]` to prompt and own tokens under one softmax.

    Returns:
        `[P * k, n * g, dim]`, in the order of the queries.
    """
    prompts, key_heads, samples, per_key, dim = queries.shape
    prompt_batch, own_batch = prompts * key_heads, prompts * key_heads * samples
    prompt_key, prompt_value = (t.flatten(0, 1).float() for t in (layer.prompt_key, layer.prompt_value))
    own_key, own_value = (t.view(own_batch, -1, dim)[:, :length].float() for t in (layer.own_key, layer.own_value))
    longest = prompt_key.size(1)

    to_prompt = torch.bmm(queries.view(prompt_batch, -1, dim), prompt_key.transpose(1, 2))
    if prompt_bias is not None:
        to_prompt.view(prompts, -1, longest).add_(prompt_bias)
    to_own = torch.bmm(queries.view(own_batch, per_key, dim), own_key.transpose(1, 2))
    scores = torch.cat([to_prompt, to_own.view(prompt_batch, -1, length)], dim=-1)

    weights = scores.softmax(dim=-1)
    out = torch.bmm(weights[:, :, :longest], prompt_value)
    own_weights = weights.view(own_batch, per_key, -1)[:, :, longest:]
    out.view(own_batch, per_key, dim).baddbmm_(own_weights, own_value)
    return out
