"""The state of every random generator of a process, as tensors."""

import random

import numpy
import torch
from torch import Tensor


def random_state() -> dict[str, Tensor]:
    """States of the generators of Python, NumPy, torch and CUDA, and of megatron-core's tensor-parallel ones.

    Returns:
        One-dimensional CPU tensors by name. Their lengths are the same on all ranks.
    """
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    _, words, gauss = random.getstate()
    state = numpy.random.get_state()
    assert isinstance(state, tuple)
    _, keys, position, has_gauss, cached = state
    trackers = get_cuda_rng_tracker().get_states()
    return {
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([gauss is not None, gauss or 0.0], dtype=torch.float64),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        **{f"tensor_parallel.{name}": state.clone() for name, state in trackers.items()},
    }


def set_random_state(state: dict[str, Tensor]) -> None:
    """Set the generators to the states that `random_state` returned."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    has_gauss, gauss = state["python_gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), gauss if has_gauss else None))
    *keys, position, has_gauss = state["numpy"].tolist()
    cached = state["numpy_gauss"].item()
    numpy.random.set_state(("MT19937", numpy.array(keys, dtype=numpy.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["cuda"])
    trackers = {name.split(".", 1)[1]: value for name, value in state.items() if name.startswith("tensor_parallel.")}
    get_cuda_rng_tracker().set_states(trackers)
