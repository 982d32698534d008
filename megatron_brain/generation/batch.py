"""The samples of one batch, and which of them are still drawn."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_brain.generation.cache import KeyValueCache

_COMPACT_AT = 0.75


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One response.

    tokens: they include EOS where the model gave it. token_logprobs: for each token the log of the probability that it
    was drawn with, in nats, after temperature, top-k and top-p (so 0 when greedy). finished: whether it ends in EOS.
    """

    tokens: tuple[int, ...]
    token_logprobs: tuple[float, ...]
    finished: bool

    @property
    def logprob(self) -> float:
        """Sum over the tokens, in nats."""
        return math.fsum(self.token_logprobs)


class Batch:
    """P prompts with n samples each: at first all of them, later those that are worth keeping in the forward pass.

    Attributes:
        ids: `[P, n]`, number of the sample that each row draws, counted over the whole batch, prompt-major.
        live: `[P, n]` bool, whether the row's sample goes on; the tokens of other rows are ignored.
        live_counts: number of live samples of each prompt.
        logprobs: `[samples, max_new_tokens]` float64 of the tokens drawn so far, on the last pipeline stage.
    """

    def __init__(self, prompts: int, samples: int, max_new_tokens: int, device: torch.device) -> None:
        self.ids = torch.arange(prompts * samples, device=device).view(prompts, samples)
        self.live = torch.ones_like(self.ids, dtype=torch.bool)
        self.live_counts = [samples] * prompts
        self.logprobs = torch.zeros(prompts * samples, max_new_tokens, dtype=torch.float64, device=device)
        # No token id is negative: a -1 is a token that was not drawn.
        self._tokens = torch.full((prompts * samples, max_new_tokens), -1, device=device)

    def record(self, step: int, tokens: Tensor, logprobs: Tensor, eos_id: int) -> None:
        """Add the token `[P * n]` that every row drew at this step, and its log-probability.

        Raises:
            FloatingPointError: a sample's logits were not finite; raised on all ranks that have the same tokens.
        """
        tokens, logprobs = tokens.view_as(self.ids), logprobs.view_as(self.ids)
        ids = self.ids[self.live]
        self._tokens[ids, step] = tokens[self.live]
        self.logprobs[ids, step] = logprobs[self.live]
        lost = (self.live & (tokens < 0)).any()
        self.live &= tokens != eos_id
        *self.live_counts, is_lost = torch.cat([self.live.sum(dim=1), lost[None]]).tolist()
        if is_lost:
            raise FloatingPointError(
                f"the logits of token {step + 1} of a response are not finite: the model's weights are not, or its "
                "activations overflow; load an earlier checkpoint (tools/inspect_checkpoint.py --finite looks at one)"
            )

    def compact(self, tokens: Tensor, cache: KeyValueCache) -> Tensor:
        """Drop finished samples from the batch and the cache, if this saves enough rows to pay for the copy.

        Every prompt that is left keeps as many rows as the prompt with the most live samples needs.

        Returns:
            The tokens `[P * n]` of the rows that are left.
        """
        most = max(self.live_counts)
        left = [prompt for prompt, count in enumerate(self.live_counts) if count]
        if len(left) * most > _COMPACT_AT * self.live.numel():
            return tokens
        prompts = torch.tensor(left, device=tokens.device)
        live_first = torch.sort(~self.live[prompts], dim=1, stable=True).indices
        samples = live_first[:, :most]
        cache.keep(prompts, samples)
        rows = (prompts[:, None], samples)
        tokens = tokens.view_as(self.ids)[rows].flatten()
        self.ids, self.live = self.ids[rows], self.live[rows]
        self.live_counts = [self.live_counts[prompt] for prompt in left]
        return tokens

    def samples(self, eos_id: int) -> list[Completion]:
        """All samples in the order of their numbers."""
        found = []
        for row, logprobs in zip(self._tokens.tolist(), self.logprobs.tolist(), strict=True):
            tokens = tuple(token for token in row if token >= 0)
            drawn_with = tuple(logprobs[: len(tokens)])
            found.append(Completion(tokens=tokens, token_logprobs=drawn_with, finished=tokens[-1] == eos_id))
        return found
