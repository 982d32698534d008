"""Log-probabilities of tokens over a vocabulary split across tensor-parallel ranks, without whole logits.

Logits exist for one block of positions and token ids at a time, in one buffer of `chunk_size` entries. There are two
ways to the gradient:

- *recomputed*: the forward pass keeps each position's maximum and sum of exponentials, gathered over blocks of the
  vocabulary (Milakov and Gimelshein 2018, arXiv 1805.02867); the backward pass computes the blocks again. It takes four
  matrix products. Whole logits take three, and so does this where one block holds everything.
- *known gradient*: a caller who knows the direction of the gradient beforehand gets it multiplied out in the forward
  pass, while the logits are there. It takes three matrix products. The weight's gradient is summed over blocks of whole
  rows of logits, so it is read and written once per `chunk_size / V_local` positions: large blocks make this cheap.

Inputs are never modified. Sums are in float32, in float64 for float64 inputs; matrix products in the inputs' dtype.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_brain.models.logit_blocks import PRODUCT_SIZE, block_shape, positions_of_whole_rows, slices

DEFAULT_CHUNK_SIZE = 2**25

# The residual that an incoming gradient may have, relative to its norm: a hundred roundings of float32.
_PROMISE_TOLERANCE = 1e-5


class TokenScores(NamedTuple):
    """What one pass over the vocabulary finds out about the target tokens. Each field is `[N]`."""

    logprobs: Tensor
    """log p(target), float32 (float64 for float64 hidden states). Only this field has a gradient."""

    entropy: Tensor
    """Entropy, in nats, of the distribution at the target's position; the same dtype, detached."""

    is_top1: Tensor
    """Bool: whether no token is more likely than the target."""


def vocab_parallel_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    group: dist.ProcessGroup,
    vocab_size: int,
    temperature: float = 1.0,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    known_gradient: Tensor | None = None,
) -> Tensor:
    """log p(target) of `softmax(hidden @ weight.T / temperature)` at every position.

    The gradient of `hidden` is this rank's share: the caller sums it over `group`.

    Args:
        hidden: `[N, h]`, the same on all ranks of `group`.
        weight: `[V_local, h]`, this rank's rows of the output layer, in the dtype of `hidden`.
        targets: `[N]` int64 token ids. An id outside of `[0, vocab_size)` has log-probability -inf.
        group: tensor-parallel group.
        vocab_size: ids from this number on are padding and have probability 0.
        temperature: divides the logits.
        chunk_size: most logits that exist at one time on this rank (with `known_gradient`, at least one position's).
        known_gradient: `[N]` float32. The caller promises that the gradient of the result will be a multiple of it.
            Then this pass computes the gradients, and the backward pass, which may run only once, scales them. It is
            ignored if there are no gradients to compute.

    Returns:
        `[N]` float32 (float64 for float64 inputs).

    Raises:
        RuntimeError: in a backward pass whose gradient is not a multiple of `known_gradient`, or in a second one.
    """
    head = _Head.of(weight, group, vocab_size, temperature, chunk_size, with_entropy=False)
    return _token_scores(hidden, weight, targets, head, known_gradient).logprobs


def vocab_parallel_token_scores(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    group: dist.ProcessGroup,
    vocab_size: int,
    temperature: float = 1.0,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    known_gradient: Tensor | None = None,
) -> TokenScores:
    """The log-probabilities of `vocab_parallel_logprobs`, bit for bit, with entropy and top-1 agreement.

    All come from the same pass. The entropy needs a second buffer of `chunk_size` entries and a third all-reduce.
    """
    head = _Head.of(weight, group, vocab_size, temperature, chunk_size, with_entropy=True)
    return _token_scores(hidden, weight, targets, head, known_gradient)


def local_logits(hidden: Tensor, weight: Tensor, *, first_id: int, vocab_size: int, temperature: float = 1.0) -> Tensor:
    """This rank's logits `[N, V_local]` in float32, vocabulary padding at -inf. `first_id` is its first token id."""
    logits = (hidden @ weight.t()).float()
    if temperature != 1.0:
        logits /= temperature
    if first_id + weight.size(0) > vocab_size:
        logits[:, max(0, vocab_size - first_id) :] = -torch.inf
    return logits


@dataclass(frozen=True)
class _Head:
    """The settings of the passes over this rank's share of the vocabulary."""

    group: dist.ProcessGroup
    first_id: int
    size: int  # Number of this rank's ids that are not padding. The rows behind them are never read.
    vocab_size: int
    temperature: float
    chunk_size: int
    with_entropy: bool

    @classmethod
    def of(cls, weight, group, vocab_size, temperature, chunk_size, *, with_entropy) -> "_Head":
        assert temperature > 0, f"temperature={temperature}: it divides the logits and must be positive"
        assert chunk_size >= 1, f"chunk_size={chunk_size}: at least one logit must exist at a time"
        first_id = group.rank() * weight.size(0)
        size = min(max(vocab_size - first_id, 0), weight.size(0))
        return cls(group, first_id, size, vocab_size, temperature, chunk_size, with_entropy)


def _token_scores(
    hidden: Tensor, weight: Tensor, targets: Tensor, head: _Head, known_gradient: Tensor | None
) -> TokenScores:
    assert known_gradient is None or known_gradient.shape == targets.shape, (
        f"known_gradient has shape {list(known_gradient.shape)}, targets have {list(targets.shape)}"
    )
    differentiated = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    if known_gradient is None or not differentiated:
        return TokenScores(*_Recomputed.apply(hidden, weight, targets, head))
    return TokenScores(*_GradientKnown.apply(hidden, weight, targets, known_gradient.detach(), head))


class _Recomputed(torch.autograd.Function):
    """Computes every block of positions and vocabulary once forward and once backward, with two all-reduces in all."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, head):
        shape = block_shape(len(targets), head.size, head.chunk_size)
        logits = _LogitBlocks(hidden, weight, head, shape)
        softmax = _SoftmaxSums(targets, logits, head)
        block = None
        for positions in slices(len(targets), shape[0]):
            for ids in slices(head.size, shape[1]):
                block = logits.compute(positions, ids)
                block = softmax.add(block, positions, targets[positions] - head.first_id - ids.start)
        own_largest = softmax.largest.clone()
        softmax.reduce(slice(None))
        ctx.save_for_backward(hidden, weight, targets, softmax.largest, softmax.total)
        ctx.head, ctx.shape = head, shape
        # If there is only one block, keeping it for one backward pass costs no more memory.
        is_only = len(targets) <= shape[0] and head.size <= shape[1]
        ctx.kept = (block, own_largest) if is_only and block is not None else None
        return softmax.token_scores(ctx)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs, *_):
        hidden, weight, targets, largest, total = ctx.saved_tensors
        head, shape = ctx.head, ctx.shape
        logits = _LogitBlocks(hidden, weight, head, shape)
        (kept, kept_largest), ctx.kept = ctx.kept or (None, largest), None
        total = total * (largest - kept_largest).exp_()
        slopes = grad_logprobs / head.temperature
        grad_hidden = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_hidden = torch.zeros_like(hidden, dtype=logits.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = _empty_gradient(weight, head, len(targets))
        # The vocabulary is the outer loop, so that a block's rows of grad_weight are completed and written once.
        for ids in slices(head.size, shape[1]):
            rows = None if grad_weight is None else grad_weight[ids]
            if rows is not None and len(targets) > shape[0]:
                rows = rows.to(logits.dtype)  # The rows themselves, or a copy of higher precision to sum in.
            for positions in slices(len(targets), shape[0]):
                block = kept
                if block is None:
                    block = logits.compute(positions, ids).sub_(largest[positions, None]).exp_()
                local_targets = targets[positions] - head.first_id - ids.start
                _to_grad_logits(block, total[positions], slopes[positions], local_targets)
                block = logits.lowered(block)
                if grad_hidden is not None:
                    _add_product(grad_hidden[positions], block, weight[ids], first=False)
                if rows is not None:
                    _add_product(rows, block.t(), hidden[positions], first=positions.start == 0)
            if rows is not None and rows.dtype != weight.dtype:
                grad_weight[ids] = rows
        return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, None, None


class _GradientKnown(torch.autograd.Function):
    """Computes all of this rank's logits once, for some positions at a time, with two all-reduces each time."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, known, head):
        # The blocks count padding too, so that every rank takes the same number of steps.
        shape = positions_of_whole_rows(weight.size(0), head.chunk_size), weight.size(0)
        logits = _LogitBlocks(hidden, weight, head, shape)
        softmax = _SoftmaxSums(targets, logits, head)
        slopes = known.to(logits.dtype) / head.temperature
        grad_hidden = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_hidden = torch.empty_like(hidden)
        if ctx.needs_input_grad[1]:
            summed = len(targets) > shape[0]
            grad_weight = _empty_gradient(weight, head, len(targets), dtype=logits.dtype if summed else weight.dtype)
        ids, local_targets = slice(0, head.size), targets - head.first_id
        for positions in slices(len(targets), shape[0]):
            block = softmax.add(logits.compute(positions, ids), positions, local_targets[positions])
            own_largest = softmax.largest[positions].clone()
            softmax.reduce(positions)
            total = softmax.total[positions] * (softmax.largest[positions] - own_largest).exp_()
            _to_grad_logits(block, total, slopes[positions], local_targets[positions])
            block = logits.lowered(block)
            if grad_hidden is not None:
                _add_product(grad_hidden[positions], block, weight[ids], first=True)
            if grad_weight is not None:
                _add_product(grad_weight[ids], block.t(), hidden[positions], first=positions.start == 0)
        ctx.save_for_backward(known)
        ctx.gradients = grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype)
        return softmax.token_scores(ctx)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs, *_):
        (known,) = ctx.saved_tensors
        if ctx.gradients is None:
            raise RuntimeError("gradients computed with known_gradient were handed out by an earlier backward pass")
        scale = _multiple_of(grad_logprobs, known)
        gradients, ctx.gradients = ctx.gradients, None
        if scale != 1.0:
            gradients = [None if gradient is None else gradient.mul_(scale) for gradient in gradients]
        return *gradients, None, None, None


class _LogitBlocks:
    """Computes logits over this rank's real token ids into one buffer: a block lives until the next is computed."""

    def __init__(self, hidden: Tensor, weight: Tensor, head: _Head, shape: tuple[int, int]) -> None:
        self.dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        self.size = min(shape[0], hidden.size(0)) * min(shape[1], head.size)
        self._hidden, self._weight, self._temperature = hidden, weight, head.temperature

    @functools.cached_property
    def _buffer(self) -> Tensor:
        return self.new_buffer()

    @functools.cached_property
    def _product(self) -> Tensor:
        return self._buffer if self._hidden.dtype == self.dtype else self.new_buffer(self._hidden.dtype)

    def new_buffer(self, dtype: torch.dtype | None = None) -> Tensor:
        """A buffer for the largest block."""
        return self._hidden.new_empty(self.size, dtype=dtype or self.dtype)

    def compute(self, positions: slice, ids: slice) -> Tensor:
        """Logits `[n, v]` of these positions and local ids."""
        hidden, weight = self._hidden[positions], self._weight[ids]
        logits = _view(self._product, hidden.size(0), weight.size(0))
        torch.mm(hidden, weight.t(), out=logits)
        if logits.dtype != self.dtype:
            logits = _view(self._buffer, *logits.shape).copy_(logits)
        return logits if self._temperature == 1.0 else logits.div_(self._temperature)

    def lowered(self, block: Tensor) -> Tensor:
        """A block in the dtype of the matrix products."""
        return block if block.dtype == self._hidden.dtype else _view(self._product, *block.shape).copy_(block)


class _SoftmaxSums:
    """Keeps for each position, over the logits so far: the largest, the sum of `exp(logit - largest)`, the target's."""

    def __init__(self, targets: Tensor, logits: _LogitBlocks, head: _Head) -> None:
        self._head, self._targets = head, targets
        # It starts at the smallest finite number, not at -inf: differences to it are never NaN, their exponential is 0.
        self.largest = torch.full_like(targets, torch.finfo(logits.dtype).min, dtype=logits.dtype)
        self.total, self.target = torch.zeros_like(self.largest), torch.zeros_like(self.largest)
        # Sum of exp(logit - largest) * (logit - largest), for the entropy.
        self._moment = torch.zeros_like(self.largest) if head.with_entropy else None
        self._spare = logits.new_buffer() if head.with_entropy else None

    def add(self, logits: Tensor, positions: slice, targets: Tensor) -> Tensor:
        """Add one more block, which is overwritten. `targets` are counted from the block's first id.

        Returns:
            `exp(logit - largest)` of the block, with the largest logits of `positions` so far.
        """
        if not logits.numel():
            return logits
        index, owned = _owned(targets, logits.size(1))
        self.target[positions] += torch.where(owned, logits.gather(1, index[:, None])[:, 0], 0.0)
        self._raise_largest(positions, torch.maximum(self.largest[positions], logits.amax(dim=1)))
        logits.sub_(self.largest[positions, None])
        if self._moment is None:
            exponentials = logits.exp_()
        else:
            exponentials = torch.exp(logits, out=_view(self._spare, *logits.shape))
            self._moment[positions] += logits.mul_(exponentials).sum(dim=1)
        self.total[positions] += exponentials.sum(dim=1)
        return exponentials

    def reduce(self, positions: slice) -> None:
        """Extend the sums from this rank's ids to those of all ranks: two all-reduces, and a third for the entropy."""
        if self._head.group.size() == 1:
            return
        largest = self.largest[positions].clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self._head.group)
        self._raise_largest(positions, largest)
        sums = torch.stack((self.total[positions], self.target[positions]))
        dist.all_reduce(sums, group=self._head.group)
        self.total[positions], self.target[positions] = sums
        if self._moment is not None:
            # A longer message would sum ranks in another order, and so change last bits of the log-probabilities.
            moment = self._moment[positions].clone()
            dist.all_reduce(moment, group=self._head.group)
            self._moment[positions] = moment

    def _raise_largest(self, positions: slice, largest: Tensor) -> None:
        shift = self.largest[positions] - largest
        decay = shift.exp()
        if self._moment is not None:
            self._moment[positions] += self.total[positions] * shift
            self._moment[positions] *= decay
        self.total[positions] *= decay
        self.largest[positions] = largest

    def token_scores(self, ctx: object) -> tuple[Tensor, Tensor | None, Tensor]:
        """Log-probabilities, entropy (None if not asked for) and top-1 agreement. The last two have no gradient."""
        exists = (self._targets >= 0) & (self._targets < self._head.vocab_size)
        log_total = self.total.log()
        logprobs = torch.where(exists, self.target - self.largest - log_total, -torch.inf)
        is_top1 = exists & (self.target >= self.largest)
        if self._moment is None:
            ctx.mark_non_differentiable(is_top1)
            return logprobs, None, is_top1
        entropy = log_total - self._moment / self.total
        ctx.mark_non_differentiable(entropy, is_top1)
        return logprobs, entropy, is_top1


def _view(buffer: Tensor, rows: int, columns: int) -> Tensor:
    return buffer[: rows * columns].view(rows, columns)


def _owned(targets: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Indices of the targets in a block of `size` ids (0 for targets outside of it), and whether each is inside."""
    owned = (targets >= 0) & (targets < size)
    return torch.where(owned, targets, 0), owned


def _to_grad_logits(exponentials: Tensor, total: Tensor, slopes: Tensor, targets: Tensor) -> None:
    """Turn a block of exponentials `[n, v]` into `slope * (1[target] - exponential / total)`. The others are `[n]`."""
    if not exponentials.numel():
        return
    exponentials.mul_(-(slopes / total)[:, None])
    index, owned = _owned(targets, exponentials.size(1))
    exponentials.scatter_add_(1, index[:, None], torch.where(owned, slopes, 0.0)[:, None])


def _empty_gradient(weight: Tensor, head: _Head, positions: int, dtype: torch.dtype | None = None) -> Tensor:
    """A gradient for `weight`, zero at padding, whose other rows are to be written; all zero if `positions` is 0."""
    gradient = torch.empty_like(weight, dtype=dtype)
    gradient[head.size if positions else 0 :] = 0.0
    return gradient


def _add_product(total: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    """`total += left @ right`; if `first`, `total = left @ right`, so that it need not be filled with zeros."""
    if total.dtype == left.dtype:
        total.addmm_(left, right, beta=0.0 if first else 1.0)
        return
    for rows in slices(total.size(0), max(1, PRODUCT_SIZE // total.size(1))):
        if first:
            total[rows] = left[rows] @ right
        else:
            total[rows] += left[rows] @ right


def _multiple_of(gradient: Tensor, known: Tensor) -> float:
    """The scale of `gradient = scale * known`; NaN if either is not finite.

    It waits for the device once, because a broken promise must not reach the weights.
    """
    gradient, known = gradient.double(), known.double()
    square = known.square().sum()
    scale = torch.where(square > 0, (gradient * known).sum() / square, 1.0)
    norms = [scale, (gradient - scale * known).norm(), gradient.norm(), known.norm()]
    scale, residual, norm, known_norm = torch.stack(norms).tolist()
    # NaN passes this comparison: the trainer stops at gradients that are not finite and names the records.
    if residual > _PROMISE_TOLERANCE * norm:
        raise RuntimeError(
            f"the gradient of the log-probabilities is no multiple of known_gradient: norm {norm:.6g}, nearest "
            f"multiple {scale:.6g} of norm {known_norm:.6g}, residual {residual:.3g}, allowed "
            f"{_PROMISE_TOLERANCE * norm:.3g}"
        )
    return scale
