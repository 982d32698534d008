"""Reads and writes weights that exist only in FP8 (`--fp8-param-gather`) as the values that they represent.

Such a weight is a tensor of Transformer Engine with one scale for many elements. A write into a slice of it would be
lost, or would change the scale of the other elements. So plain tensors replace these weights while they are written.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from megatron.core.fp8_utils import is_float8tensor
from torch import Tensor
from torch.nn import Module, Parameter


def in_full(weight: Tensor) -> Tensor:
    """The values that a weight in FP8 represents; any other weight unchanged."""
    return weight.dequantize() if is_float8tensor(weight) else weight


@contextlib.contextmanager
def written(modules: Sequence[Module]) -> Iterator[None]:
    """Plain weights, at first zeros, replace those in FP8. At the end of the context they are rounded as a whole.

    An optimizer that is made afterwards starts from the values before rounding.
    """
    with _replaced(modules, lambda weight: torch.zeros_like(weight, dtype=weight.dtype)) as replaced:
        yield
    with torch.no_grad():
        for plain, weight in replaced:
            weight.quantize_(plain.detach())
            if hasattr(weight, "_high_precision_init_val"):
                weight._high_precision_init_val = plain.detach().cpu()


@contextlib.contextmanager
def outlined(modules: Sequence[Module]) -> Iterator[dict[int, Parameter]]:
    """Weights without memory replace those in FP8. It yields, by the id of each replacement, the weight it replaces."""
    with _replaced(modules, lambda weight: torch.empty(weight.shape, dtype=weight.dtype, device="meta")) as replaced:
        yield {id(outline): weight for outline, weight in replaced}


@contextlib.contextmanager
def _replaced(
    modules: Sequence[Module], make: Callable[[Tensor], Tensor]
) -> Iterator[list[tuple[Parameter, Parameter]]]:
    places = [
        (part, name, weight)
        for module in modules
        for part in module.modules()
        for name, weight in part.named_parameters(recurse=False)
        if is_float8tensor(weight)
    ]
    replaced = []
    for part, name, weight in places:
        plain = Parameter(make(weight), requires_grad=weight.requires_grad)
        for attribute in (
            "tensor_model_parallel",
            "partition_dim",
            "partition_stride",
            "allreduce",
            "sequence_parallel",
        ):
            if hasattr(weight, attribute):
                setattr(plain, attribute, getattr(weight, attribute))
        part._parameters[name] = plain
        replaced.append((plain, weight))
    try:
        yield replaced
    finally:
        for part, name, weight in places:
            part._parameters[name] = weight
