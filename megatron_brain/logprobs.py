"""Log-probabilities of tokens over a vocabulary split across tensor-parallel ranks, without whole logits.

Logits exist for `chunk_size` positions at one time, in the forward pass and again in the backward pass, which
computes them anew. Inputs are never modified.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def vocab_parallel_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    group: dist.ProcessGroup,
    vocab_size: int,
    temperature: float = 1.0,
    chunk_size: int = 1024,
) -> Tensor:
    """log p(target) of `softmax(hidden @ weight.T / temperature)` at every position.

    The gradient of `hidden` is this rank's share: the caller sums it over `group`.

    Args:
        hidden: `[N, h]`, the same on all ranks of `group`.
        weight: `[V_local, h]`, this rank's rows of the output layer.
        targets: `[N]` int64 token ids, all below `vocab_size`.
        group: tensor-parallel group.
        vocab_size: ids at and beyond it are padding and have probability 0.
        temperature: divides the logits.
        chunk_size: positions per chunk.

    Returns:
        `[N]` float32.
    """
    return _VocabParallelLogprobs.apply(hidden, weight, targets, group, vocab_size, temperature, chunk_size)


def local_logits(hidden: Tensor, weight: Tensor, *, first_id: int, vocab_size: int, temperature: float = 1.0) -> Tensor:
    """This rank's logits `[N, V_local]` in float32, vocabulary padding at -inf. `first_id` is its first token id."""
    logits = (hidden @ weight.t()).float()
    if temperature != 1.0:
        logits /= temperature
    if first_id + weight.size(0) > vocab_size:
        logits[:, max(0, vocab_size - first_id) :] = -torch.inf
    return logits


class _VocabParallelLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, group, vocab_size, temperature, chunk_size):
        first_id = group.rank() * weight.size(0)
        logprobs, log_norms = [], []
        for rows in _chunks(hidden.size(0), chunk_size):
            logits = local_logits(
                hidden[rows], weight, first_id=first_id, vocab_size=vocab_size, temperature=temperature
            )
            log_norm = _log_sum_exp(logits, group)
            local_target, owned = _local_targets(targets[rows], first_id, weight.size(0))
            target_logit = logits.gather(1, local_target[:, None]).squeeze(1)
            target_logit = torch.where(owned, target_logit, 0.0)
            _all_reduce(target_logit, group, dist.ReduceOp.SUM)
            logprobs.append(target_logit - log_norm)
            log_norms.append(log_norm)
        empty = hidden.new_empty(0, dtype=torch.float32)
        ctx.save_for_backward(hidden, weight, targets, torch.cat(log_norms) if log_norms else empty)
        ctx.settings = (first_id, vocab_size, temperature, chunk_size)
        return torch.cat(logprobs) if logprobs else empty

    @staticmethod
    def backward(ctx, grad_logprobs):
        hidden, weight, targets, log_norms = ctx.saved_tensors
        first_id, vocab_size, temperature, chunk_size = ctx.settings
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for rows in _chunks(hidden.size(0), chunk_size):
            logits = local_logits(
                hidden[rows], weight, first_id=first_id, vocab_size=vocab_size, temperature=temperature
            )
            probs = logits.sub_(log_norms[rows, None]).exp_()
            local_target, owned = _local_targets(targets[rows], first_id, weight.size(0))
            probs.scatter_add_(1, local_target[:, None], -owned.float()[:, None])
            grad_logits = probs.mul_(-grad_logprobs[rows, None] / temperature).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad_logits @ weight
            if grad_weight is not None:
                grad_weight += grad_logits.t() @ hidden[rows]
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), *[None] * 5


def _chunks(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _local_targets(targets: Tensor, first_id: int, local_size: int) -> tuple[Tensor, Tensor]:
    local = targets - first_id
    owned = (local >= 0) & (local < local_size)
    return torch.where(owned, local, 0), owned


def _log_sum_exp(logits: Tensor, group: dist.ProcessGroup) -> Tensor:
    largest = logits.amax(dim=1)
    _all_reduce(largest, group, dist.ReduceOp.MAX)
    total = (logits - largest[:, None]).exp_().sum(dim=1)
    _all_reduce(total, group, dist.ReduceOp.SUM)
    return total.log_().add_(largest)


def _all_reduce(tensor: Tensor, group: dist.ProcessGroup, op: dist.ReduceOp) -> None:
    if group.size() > 1:
        dist.all_reduce(tensor, op=op, group=group)
