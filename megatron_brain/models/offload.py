"""Weights of frozen models that live in host memory while the device is needed for something else."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from megatron_brain.models.fp8.state import forget_weights


class HostWeights:
    """Takes the weights of a frozen model off its device and lends them back.

    While the weights are away the parameters are empty, so using the model is an error rather than a silent zero, and
    Transformer Engine's copies of them in FP8 are gone.
    Host memory is pinned where the device is CUDA; there this has not been run.

    Args:
        modules: modules whose parameters move; buffers stay. None may be trained: its optimizer would lose it.
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
        """The weights are on their device, bit for bit what they were, inside of the context."""
        for parameter, device, host in zip(self._parameters, self._devices, self._host, strict=True):
            parameter.data = host.to(device, non_blocking=True)
        try:
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        for parameter in self._parameters:
            parameter.data = parameter.data.new_empty(0)
        # They would stay on the device, and stand in for the weights unnoticed.
        forget_weights(self._modules)


def _to_host(weight: torch.Tensor) -> torch.Tensor:
    if weight.device.type == "cpu":
        return weight
    host = torch.empty(weight.shape, dtype=weight.dtype, device="cpu", pin_memory=True)
    return host.copy_(weight)
