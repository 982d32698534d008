"""The state of every random generator of a process."""

import random

import numpy
import torch


def random_state() -> dict:
    """States of Python's, NumPy's and torch's generators, CUDA's and megatron-core's tensor-parallel ones included."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    return {
        "python": random.getstate(),
        "numpy": numpy.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tensor_parallel": get_cuda_rng_tracker().get_states(),
    }


def set_random_state(state: dict) -> None:
    """Set what `random_state` returned."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["tensor_parallel"])
