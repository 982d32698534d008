"""Random groups of responses in the form that an objective takes."""

import torch


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def random_group(n, seed=0):
    """log q_theta, log q', log p and rewards of n samples, all float64."""
    generator = torch.Generator().manual_seed(seed)
    log_policy, log_proposal, log_prior = -10 + 2 * torch.randn(3, n, generator=generator, dtype=torch.float64)
    return log_policy, log_proposal, log_prior, torch.randn(n, generator=generator, dtype=torch.float64)
