"""Modules whose parameters are in memory only while they are called."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

BLOCK_ELEMENTS = 2**25
"""Entries of a vocabulary matrix that are in memory at one time."""


@contextmanager
def parameters_without_memory() -> Iterator[None]:
    """Modules that are made in the block have their parameters on the meta device. Their buffers are as usual."""

    def without_memory(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

    handle = register_module_parameter_registration_hook(without_memory)
    try:
        yield
    finally:
        handle.remove()


def read_when_called(module: nn.Module, read: Callable[[str], nn.Parameter]) -> None:
    """Give a module its own parameters, not those of its submodules, before each call, and take them after it.

    Args:
        module: its parameters have no memory.
        read: returns the parameter of a name, in memory.
    """
    without_memory = dict(module.named_parameters(recurse=False))

    def fill(module: nn.Module, args: tuple) -> None:
        for name in without_memory:
            setattr(module, name, read(name))

    def empty(module: nn.Module, args: tuple, output: object) -> None:
        for name, parameter in without_memory.items():
            setattr(module, name, parameter)

    if without_memory:
        module.register_forward_pre_hook(fill)
        module.register_forward_hook(empty)
