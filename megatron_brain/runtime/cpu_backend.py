"""Lets megatron-core, which is written for CUDA, run on a machine without it.

Megatron-core asks `torch.cuda` for the current device, streams, events and random states, and writes the literal
device "cuda" in places. `install` answers those calls with the CPU. Where CUDA is present, it replaces nothing. It
never replaces arithmetic: the layers, schedules, optimizers and checkpoints that run are megatron-core's own.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._device import _device_constructors

from megatron_brain.runtime import quiet

_CPU = torch.device("cpu")
_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn", "randint", "as_tensor")
_installed = False


def needs_cpu_backend() -> bool:
    """Whether this machine has no CUDA device."""
    return not torch.cuda.is_available()


def install() -> None:
    """Redirect the calls megatron-core makes to CUDA. Call once, before any megatron-core object is built."""
    global _installed
    if _installed:
        return
    # This import's torch.compile decorators make torch list the functions of torch.cuda, which must still be torch's.
    import megatron.core.models.gpt  # noqa: F401

    _redirect_torch_cuda()
    _redirect_device_literals()
    _redirect_random_states()
    quiet.ignore_advice_for_cuda()
    _installed = True


class _Stream:
    """A stream or an event of a device that does all work in order, so that no wait takes time."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def _done(self, *args: Any, **kwargs: Any) -> None: ...

    record = wait = wait_stream = wait_event = record_event = synchronize = _done

    def query(self) -> bool:
        return True

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *exc: object) -> None: ...


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _redirect_torch_cuda() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU
    cuda.Stream = cuda.Event = _Stream
    cuda.stream = lambda stream: contextlib.nullcontext()
    for name in ("current_stream", "default_stream"):
        setattr(cuda, name, lambda *args, **kwargs: _Stream())
    for name in ("set_device", "set_stream", "synchronize", "empty_cache"):
        setattr(cuda, name, _nothing)
    cuda.is_current_stream_capturing = lambda: False
    cuda.nvtx.range_push = cuda.nvtx.range_pop = _nothing
    cuda.nvtx.range = lambda *args, **kwargs: contextlib.nullcontext()


def _is_cuda(device: object) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def redirected(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        return function(*args, **kwargs)

    return redirected


def _redirect_device_literals() -> None:
    # `with torch.device(...)` looks factories up in a set that torch makes at the first use. We have it made here, so
    # that it holds torch's own factories: models that transformers builds on the meta device need those.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    tensor: Any = torch.Tensor
    tensor_to, tensor_type = tensor.to, tensor.type

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        return tensor_to(self, *(_CPU if _is_cuda(arg) else arg for arg in args), **kwargs)

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return tensor_type(self, *args, **kwargs)
        # The mixed-precision optimizers compare the name with 'torch.cuda.FloatTensor'.
        return tensor_type(self).replace("torch.", "torch.cuda.", 1)

    tensor.to = to
    tensor.type = type_
    tensor.cuda = lambda self, *args, **kwargs: self


def _redirect_random_states() -> None:
    def get_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(state)

    modules: tuple[Any, ...] = (torch.cuda, torch.cuda.random)
    for module in modules:
        module.get_rng_state = get_state
        module.set_rng_state = set_state
        # torch.manual_seed would not do: it seeds CUDA as well and would come back here.
        module.manual_seed = module.manual_seed_all = torch.default_generator.manual_seed

    import megatron.core.tensor_parallel.random as mcore_random

    for name, function in (("_get_cuda_rng_state", get_state), ("_set_cuda_rng_state", set_state)):
        setattr(mcore_random, name, function)
