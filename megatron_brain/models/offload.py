"""Weights in host memory: of frozen models while they do nothing, and of a policy as it was some steps ago."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from megatron_brain.models.fp8.state import forget_weights


class HostWeights:
    """Takes the weights of a frozen model off its device and lends them back.

    While the weights are away the parameters are empty, so that using the model raises an error. Transformer Engine's
    FP8 copies of them are freed. For a CUDA device, host memory is pinned; this has not been run on one.

    Args:
        modules: modules whose parameters move; buffers stay. No parameter may be trained: its optimizer would lose it.
    """

    def __init__(self, modules: Sequence[torch.nn.Module]) -> None:
        self._modules = list(modules)
        self._parameters = [parameter for module in modules for parameter in module.parameters()]
        is_trained = any(parameter.requires_grad for parameter in self._parameters)
        assert not is_trained, "only weights that are not trained can be offloaded"
        self._devices = [parameter.device for parameter in self._parameters]
        self._host = [_to_host(parameter.data) for parameter in self._parameters]
        self._leave()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Inside of the context the weights are on their device, with every bit as it was."""
        for parameter, device, host in zip(self._parameters, self._devices, self._host, strict=True):
            parameter.data = host.to(device, non_blocking=True)
        try:
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        for parameter in self._parameters:
            parameter.data = parameter.data.new_empty(0)
        # FP8 copies would stay on the device, and the layers would use them unnoticed in place of the weights.
        forget_weights(self._modules)


class WeightsCopy:
    """A copy of a model's weights in host memory, which can take the place of the model's own for a while.

    For a CUDA device, host memory is pinned; this has not been run on one.

    Args:
        modules: modules whose parameters are copied; buffers are not.
    """

    def __init__(self, modules: Sequence[torch.nn.Module]) -> None:
        self._modules = list(modules)
        self._parameters = [parameter for module in modules for parameter in module.parameters()]
        self._host = [_host_memory(parameter.data) for parameter in self._parameters]

    def take(self) -> None:
        """Copy the weights as they are now."""
        for host, parameter in zip(self._host, self._parameters, strict=True):
            host.copy_(parameter.data)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside of the context the model has the copied weights; then it has its own again, the same tensors."""
        own = [parameter.data for parameter in self._parameters]
        try:
            for parameter, host in zip(self._parameters, self._host, strict=True):
                parameter.data = host.to(parameter.device, non_blocking=True)
            forget_weights(self._modules)
            yield
        finally:
            for parameter, weight in zip(self._parameters, own, strict=True):
                parameter.data = weight
            forget_weights(self._modules)


def _to_host(weight: torch.Tensor) -> torch.Tensor:
    if weight.device.type == "cpu":
        return weight
    return _host_memory(weight).copy_(weight)


def _host_memory(weight: torch.Tensor) -> torch.Tensor:
    return torch.empty(weight.shape, dtype=weight.dtype, device="cpu", pin_memory=weight.device.type != "cpu")
