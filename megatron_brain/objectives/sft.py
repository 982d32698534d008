"""Supervised fine-tuning."""

from torch import Tensor


def negative_log_likelihood(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Sum of the negative log-likelihoods, in nats, of the tokens that count.

    Args:
        logprobs: `[N]` log-probabilities of the target tokens.
        mask: `[N]` bool, True where the token counts.
    """
    return -logprobs.where(mask, 0.0).sum()
