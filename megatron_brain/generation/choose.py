"""Choosing the next token from logits: greedy, or by temperature, top-k and top-p."""

import math

import torch
from torch import Tensor

_BLOCK = 256
_CANDIDATES = 1024


def choose_tokens(
    logits: Tensor, uniforms: Tensor, *, temperature: float, top_k: int, top_p: float
) -> tuple[Tensor, Tensor]:
    """Next token of every row, and the log of the probability that it was drawn with.

    Args:
        logits: `[B, V]` float32, overwritten; -inf marks ids that do not exist.
        uniforms: `[B]` float64 in [0, 1): the draw, as a place in the cumulative distribution in vocabulary order.
        temperature: divides the logits; 0 is greedy, where the likeliest token is certain (log-probability 0).
        top_k: keep the k likeliest tokens (and ties of the last); 0 keeps all.
        top_p: of those, keep the likeliest until they hold this share (and ties of the last); 1 keeps all.

    Returns:
        tokens `[B]` int64, -1 for a row whose logits are not finite; log-probabilities `[B]` float64.
    """
    if temperature == 0:
        largest, tokens = logits.max(dim=-1)
        return tokens.masked_fill(~largest.isfinite(), -1), torch.zeros_like(largest, dtype=torch.float64)
    largest = logits.amax(dim=-1, keepdim=True)
    logits -= largest
    mass = logits.div_(temperature).exp_()
    if 0 < top_k < mass.size(1):
        _drop_below(mass, mass.topk(top_k).values[:, -1])
    if top_p < 1:
        _drop_below(mass, _nucleus_threshold(mass, top_p))
    tokens, total = _invert_cumulative(mass, uniforms)
    chosen = mass.gather(1, tokens[:, None]).squeeze(1)
    tokens = tokens.masked_fill(~largest.squeeze(1).isfinite(), -1)
    return tokens, chosen.double().log() - total.log()


def _drop_below(mass: Tensor, threshold: Tensor) -> None:
    mass.masked_fill_(mass < threshold[:, None], 0.0)


def _nucleus_threshold(mass: Tensor, top_p: float) -> Tensor:
    """Smallest mass `[B]` that belongs to the nucleus of each row of `[B, V]`."""
    goal = top_p * mass.sum(dim=-1, dtype=torch.float64)
    # Sorting a whole vocabulary is slow, and the likeliest few tokens are nearly always enough.
    likeliest = mass.topk(min(_CANDIDATES, mass.size(1))).values
    cumulative = likeliest.cumsum(dim=-1, dtype=torch.float64)
    if bool((cumulative[:, -1] < goal).any()):
        likeliest = mass.sort(descending=True).values
        cumulative = likeliest.cumsum(dim=-1, dtype=torch.float64)
    # The token that reaches the goal belongs to the nucleus.
    last = (cumulative < goal[:, None]).sum(dim=-1).clamp_(max=likeliest.size(1) - 1)
    return likeliest.gather(1, last[:, None]).squeeze(1)


def _invert_cumulative(mass: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Token `[B]` at the share `uniforms` of each row's cumulative mass, and the row's total `[B]` float64.

    It looks for the block of the vocabulary first, then inside of the block. One cumulative sum over the vocabulary
    would lose the tail in float32, and in float64 would cost more than the rest of the choice.
    """
    blocks = mass.unflatten(1, (-1, math.gcd(_BLOCK, mass.size(1))))
    up_to_block = blocks.sum(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    total = up_to_block[:, -1]
    target = uniforms * total
    block = _first_above(up_to_block, target)
    before = torch.where(block > 0, up_to_block.gather(1, (block - 1).clamp(min=0)[:, None]).squeeze(1), 0.0)
    inside = blocks[torch.arange(len(block), device=block.device), block].cumsum(dim=-1, dtype=torch.float64)
    return block * blocks.size(-1) + _first_above(inside, target - before), total


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """First index `[B]` whose cumulative mass exceeds the target. Rounding may have put the target past the end: then
    it is the last index that adds mass. Where the masses are not finite, it is any index."""
    below_end = cumulative[:, -1] * (1 - torch.finfo(torch.float64).eps)
    first = torch.searchsorted(cumulative, torch.minimum(target, below_end)[:, None], right=True).squeeze(1)
    return first.clamp_(max=cumulative.size(1) - 1)
