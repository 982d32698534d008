"""Whether counts fit a distribution."""

import torch
from torch import Tensor


def assert_fits(counts: Tensor, probs: Tensor) -> None:
    """Check counts against the probabilities of their cells by a chi-square test at four deviations.

    Cells that expect fewer than 5 are taken together. A cell of probability 0 must be empty.
    """
    counts, probs = counts.flatten().double(), probs.flatten().double()
    expected = probs * counts.sum()
    assert not counts[probs == 0].any(), "something was drawn that has probability 0"
    likely = expected >= 5
    observed, expected = (
        torch.cat([values[likely], values[~likely].sum()[None]]) if (probs[~likely] > 0).any() else values[likely]
        for values in (counts, expected)
    )
    free = len(expected) - 1
    assert free >= 2, f"{free + 1} cells say little"
    chi_square = float(((observed - expected) ** 2 / expected).sum())
    # Its mean is `free`, its variance 2 free. Too small a value would be a draw that is not random.
    assert abs(chi_square - free) < 4 * (2 * free) ** 0.5, f"chi-square {chi_square:.1f} of {free} degrees of freedom"
