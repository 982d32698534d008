"""Whether the matrix product that computes a weight gradient can also add it to the float32 buffer.

Otherwise a layer writes its gradient in bfloat16, and a second pass adds it to the buffer. The embedding, norms, heads
and the output layer (logprobs.py computes its gradient) always take that second pass: megatron-core marks the weights
that do not need it (`grad_added_to_main_grad`).
"""

import functools
import importlib

import torch

EXTENSION = "fused_weight_gradient_mlp_cuda"
"""The extension belongs to NVIDIA's build of Apex. Transformer Engine's layers have kernels of their own, but every
GPTModel builds megatron-core's output layer, which refuses the setting without the extension."""


def gradient_accumulation_fusion(device: torch.device) -> tuple[bool, str]:
    """Whether megatron-core's option of this name can be on, and the reason."""
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
    except ImportError as error:  # It was built for another torch; megatron-core takes it for missing too.
        return f"Apex's {EXTENSION} cannot be imported: {error}"
    return None
