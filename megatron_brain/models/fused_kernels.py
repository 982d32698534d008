"""Whether weight gradients can be added to their float32 buffers by the matrix product that computes them.

Otherwise a layer writes its gradient in bfloat16, and a second pass adds it to the buffer. The embedding, norms, heads
and the output layer (logprobs.py computes its gradient) take that second pass either way: megatron-core keeps the two
apart by a mark on each weight (`grad_added_to_main_grad`).
"""

import functools
import importlib

import torch

EXTENSION = "fused_weight_gradient_mlp_cuda"
"""Of Apex, in NVIDIA's build. Transformer Engine's layers have kernels of their own, but megatron-core's output layer,
which every GPTModel builds, refuses the setting without the extension."""


def gradient_accumulation_fusion(device: torch.device) -> tuple[bool, str]:
    """Whether megatron-core's option of this name can be on, and why."""
    if device.type != "cuda":
        return False, "there is no CUDA device"
    problem = _problem_of_extension()
    return (True, f"Apex's {EXTENSION}") if problem is None else (False, problem)


@functools.cache
def _problem_of_extension() -> str | None:
    try:
        importlib.import_module(EXTENSION)
    except ModuleNotFoundError:
        return f"Apex's {EXTENSION} is not installed"
    except ImportError as error:  # Built for another torch; megatron-core takes it for missing too.
        return f"Apex's {EXTENSION} cannot be imported: {error}"
    return None
