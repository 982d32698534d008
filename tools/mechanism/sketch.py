"""Random sketches of gradients of many parameters: short vectors with, nearly, the same inner products.

Every entry of a gradient gets a random sign and is added to one of k sums: a count sketch (Charikar et al. 2002) with
places instead of a hash. The inner product of two sketches has that of the gradients as its expected value. The squared
length of any weighted sum of gradients has a standard error of about `sqrt(2 / k)` of it, as in the lemma of Johnson
and Lindenstrauss, if no few entries dominate.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

DIMENSIONS = 32_749
"""k: 0.8% error of a square, and 128 KiB a sample, so that a pool of hundreds fits into memory. It is prime, so that
the entries of one column of a weight are added to different sums. A few columns may hold much of a gradient.
"""


class Sketch:
    """One random map for all gradients of the same parameters.

    Args:
        parameters: the parameters, in the order of their gradients.
        seed: of the signs.
        dimensions: k.
    """

    def __init__(self, parameters: Sequence[Tensor], *, seed: int, dimensions: int = DIMENSIONS) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._dimensions = dimensions
        self._signs = [
            torch.randint(2, (each.numel(),), generator=generator, dtype=torch.int8).mul_(2).sub_(1)
            for each in parameters
        ]

    def __call__(self, gradients: Sequence[Tensor]) -> Tensor:
        """The sketch `[k]` float32, on the CPU."""
        total, before = torch.zeros(self._dimensions), 0
        for signs, gradient in zip(self._signs, gradients, strict=True):
            signed = gradient.flatten().float().cpu() * signs
            # Each parameter goes on where the one before it ended, so that small ones do not share the first sums.
            whole = F.pad(signed, (before, -(before + len(signed)) % self._dimensions))
            total += whole.view(-1, self._dimensions).sum(0)
            before = (before + len(signed)) % self._dimensions
        return total
