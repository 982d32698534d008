"""Choosing the next token from logits: greedy, or at random by temperature, top-k and top-p.

A token is drawn by a race: each competitor takes a time drawn from the exponential distribution whose rate is its mass,
and the first one wins, with a probability in proportion to its mass. This is the Gumbel-max trick (Maddison, Tarlow and
Minka 2014, arXiv 1411.0030) in other words. Blocks of the vocabulary race first, then the tokens of the block that won.
So a draw needs about `V / BLOCK + BLOCK` random numbers, not V.

Why not invert the cumulative distribution, with one random number? There a small change of one mass moves the borders
of all tokens behind it, and the layouts' rounding of logits changes masses a little. Here a draw changes with about the
probability by which the two distributions differ, which is the least of any method but for a factor of about 4: twice
for the race, twice for the two levels.
"""

import torch
from torch import Tensor

from megatron_brain.generation.noise import exponentials
from megatron_brain.generation.vocabulary import VocabularyGroup

BLOCK = 128
"""Ids of a block. The smallest multiple that vocabularies are padded to, so that a rank's part has whole blocks."""

_CANDIDATES = 1024


def choose_tokens(
    logits: Tensor,
    seeds: Tensor,
    step: int,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    group: torch.distributed.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Next token of every row, and the log of the probability that it was drawn with.

    All ranks of a tensor-parallel group call it together and get the same. Given the same logits, the split of the
    vocabulary changes nothing.

    Args:
        logits: `[B, V_local]` float32, this rank's part of the vocabulary, overwritten; -inf marks ids that do not
            exist.
        seeds: `[B]` int64, the seed of each row's sample.
        step: number of the token in its response, from 0. The draw depends on seed and step alone.
        temperature: divides the logits; 0 is greedy, where the likeliest token is certain (log-probability 0).
        top_k: keep the k likeliest tokens (and ties of the last); 0 keeps all.
        top_p: of those, keep the likeliest until they hold this share (and ties of the last); 1 keeps all.
        group: the ranks that share the vocabulary; None if this one holds all of it.

    Returns:
        tokens `[B]` int64, -1 for a row whose logits are not finite; log-probabilities `[B]` float64.
    """
    ranks = VocabularyGroup(group)
    if temperature == 0:
        return _likeliest(logits, ranks)
    if logits.size(1) % BLOCK:
        # Blocks of whole vocabularies do not end where this rank's part ends.
        logits, ranks = ranks.join(logits), VocabularyGroup(None)
        logits = torch.nn.functional.pad(logits, (0, -logits.size(1) % BLOCK), value=-torch.inf)
    largest = ranks.largest(logits.amax(dim=-1, keepdim=True))
    logits -= largest
    mass = (logits if temperature == 1 else logits.div_(temperature)).exp_()
    if 0 < top_k < mass.size(1) * ranks.size:
        _drop_below(mass, _most(mass, top_k, ranks)[:, -1])
    blocks = _block_masses(mass, ranks)
    if top_p < 1:
        _drop_below(mass, _nucleus_threshold(mass, top_p * blocks.sum(dim=-1), ranks))
        blocks = _block_masses(mass, ranks)
    return _race(mass, blocks, seeds, step, ranks)


def _likeliest(logits: Tensor, ranks: VocabularyGroup) -> tuple[Tensor, Tensor]:
    """Token of the largest logit, of several the first, and log-probability 0."""
    largest, tokens = logits.max(dim=-1)
    tokens += ranks.rank * logits.size(1)
    largest, winner = ranks.join(largest[:, None]).max(dim=-1)
    tokens = ranks.join(tokens[:, None]).gather(1, winner[:, None]).squeeze(1)
    return tokens.masked_fill(~largest.isfinite(), -1), torch.zeros_like(largest, dtype=torch.float64)


def _drop_below(mass: Tensor, threshold: Tensor) -> None:
    mass.masked_fill_(mass < threshold[:, None], 0.0)


def _most(mass: Tensor, count: int, ranks: VocabularyGroup) -> Tensor:
    """The largest masses `[B, count]` of all ranks, in descending order; fewer if there are no more."""
    most = mass.topk(min(count, mass.size(1))).values
    if ranks.size == 1:
        return most
    joined = ranks.join(most)
    return joined.topk(min(count, joined.size(1))).values


def _block_masses(mass: Tensor, ranks: VocabularyGroup) -> Tensor:
    """The masses `[B, V / BLOCK]` float64 of all blocks of the vocabulary, each summed in float32."""
    return ranks.join(mass.unflatten(1, (-1, BLOCK)).sum(dim=-1)).double()


def _nucleus_threshold(mass: Tensor, goal: Tensor, ranks: VocabularyGroup) -> Tensor:
    """Smallest mass `[B]` that belongs to the likeliest tokens that together hold the mass `goal` `[B]` float64."""
    # Sorting a whole vocabulary is slow, and the likeliest few tokens are nearly always enough.
    likeliest = _most(mass, _CANDIDATES, ranks)
    cumulative = likeliest.cumsum(dim=-1, dtype=torch.float64)
    if bool((cumulative[:, -1] < goal).any()):
        likeliest = ranks.join(mass).sort(descending=True).values
        cumulative = likeliest.cumsum(dim=-1, dtype=torch.float64)
    # The token that reaches the goal belongs to the nucleus.
    last = (cumulative < goal[:, None]).sum(dim=-1).clamp_(max=likeliest.size(1) - 1)
    return likeliest.gather(1, last[:, None]).squeeze(1)


def _race(mass: Tensor, blocks: Tensor, seeds: Tensor, step: int, ranks: VocabularyGroup) -> tuple[Tensor, Tensor]:
    """Winner `[B]` among the blocks and then among the block's tokens, and its log-probability; -1 where masses are
    not finite."""
    # Those of the tokens come first: the number of blocks, of which some are padding, depends on the layout.
    times = exponentials(seeds, step, BLOCK + blocks.size(1))
    block = _first(blocks, times[:, BLOCK:])
    parts = mass.unflatten(1, (-1, BLOCK))
    mine = block - ranks.rank * parts.size(1)
    is_mine = (mine >= 0) & (mine < parts.size(1))
    inside = parts[torch.arange(len(block), device=block.device), mine.clamp(0, parts.size(1) - 1)]
    place = _first(inside, times[:, :BLOCK])
    chosen = inside.gather(1, place[:, None]).squeeze(1).double()
    # Only the rank that holds the block has something to add. Ids are exact in float64.
    place, chosen = ranks.total(torch.stack([place, chosen]).masked_fill_(~is_mine, 0.0))
    total = blocks.sum(dim=-1)
    tokens = (block * BLOCK + place.long()).masked_fill_(~total.isfinite(), -1)
    return tokens, chosen.log() - total.log()


def _first(rates: Tensor, times: Tensor) -> Tensor:
    """The first `[B]` of competitors with these rates `[B, n]`, given the times float64 that they take at rate 1."""
    return (rates / times).argmax(dim=-1)
