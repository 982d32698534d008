"""The state that Transformer Engine's linear layers keep in FP8 from one pass to the next, and control over it.

Two things outlive a pass. Each layer keeps a copy of its weight in FP8, made at the first micro-batch that a schedule
of megatron-core runs. With `--fp8-recipe delayed` each layer also keeps scales, one for each tensor that it rounds, and
the largest magnitudes that they follow from. The other recipes compute a scale from the tensor itself.

Scales follow one rule: **they move once a step, after it, and at no other time.** Every micro-batch of a step and every
pass without gradients before the next update is rounded with the same scales. So the pass that scores a response and
the pass that trains on it compute the same function, in any order of micro-batches. (Transformer Engine by itself moves
scales after each micro-batch that is trained on, and lets the maxima of validation and scoring affect the next ones.)

Maxima are reduced over tensor- and data-parallel ranks, so all of them hold the same scales.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core.enums import Fp8Recipe
from megatron.core.fp8_utils import get_fp8_context
from torch import Tensor
from torch.nn import Module

from megatron_brain.config.fp8 import Fp8Config

_DIRECTIONS = {"forward": "scaling_fwd", "backward": "scaling_bwd"}
_WEIGHT = 1
"""Index of the weight among the tensors of a forward pass: input, weight, output."""
_E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max

Saved = list[tuple[Tensor, Tensor]]


def weights_changed(chunks: Sequence[Module]) -> None:
    """Make the next pass round the weights again, even if no schedule runs it."""
    for chunk in chunks:
        chunk.set_is_first_microbatch()


def forget_weights(modules: Sequence[Module]) -> None:
    """Free the FP8 copies of weights; the next pass makes them again."""
    for module in modules:
        for layer in _linear_layers(module).values():
            layer._fp8_workspaces.clear()


@contextlib.contextmanager
def switched_off(chunks: Sequence[Module]) -> Iterator[None]:
    """Inside of the context the chunks compute in the weights' own precision, and take any number of rows."""
    formats = [chunk.config.fp8 for chunk in chunks]
    emulating = [module for chunk in chunks for module in chunk.modules() if getattr(module, "emulates_fp8", False)]
    for chunk in chunks:
        chunk.config.fp8 = None
    for module in emulating:
        module.emulates_fp8 = False
    try:
        yield
    finally:
        for chunk, kept in zip(chunks, formats, strict=True):
            chunk.config.fp8 = kept
        for module in emulating:
            module.emulates_fp8 = True


def without_history(fp8: Fp8Config) -> Fp8Config:
    """The settings for a model that is not trained: `tensorwise` scales in place of `delayed` ones.

    A model that has never run has no history to take scales from, and a model that does not train makes none.
    """
    plain = dataclasses.replace(fp8, fp8_param_gather=False)
    if fp8.fp8_recipe != "delayed":
        return plain
    return dataclasses.replace(
        plain, fp8_recipe="tensorwise", fp8_margin=0, fp8_amax_history_len=None, fp8_amax_compute_algo=None
    )


def summary(chunks: Sequence[Module]) -> str:
    """The FP8 that the chunks compute in, in words."""
    config = chunks[0].config
    if any(getattr(module, "emulates_fp8", False) for chunk in chunks for module in chunk.modules()):
        return "emulated FP8"
    return f"FP8 ({config.fp8}, {Fp8Recipe(config.fp8_recipe).value})" if config.fp8 else "no FP8"


def keeps_scales(chunks: Sequence[Module]) -> bool:
    """Whether the layers keep scales, which is so with --fp8-recipe delayed."""
    config = chunks[0].config
    return bool(config.fp8) and config.fp8_recipe == Fp8Recipe.delayed


@torch.no_grad()
def scales(chunks: Sequence[Module]) -> dict[str, Tensor]:
    """Every scale and every history of maxima, by global name; {} where none are kept. Writing to them has effect.

    Each linear layer and direction has `scale` `[tensors]` and `amax_history` `[length, tensors]` in float32: three
    tensors forward (input, weight, output), two backward (gradients of output and input).
    """
    if not keeps_scales(chunks):
        return {}
    layers = {name: layer for chunk in chunks for name, layer in _linear_layers(chunk).items()}
    # A layer makes them at its first call, so they are made here. With gradients, the context's end would move them.
    with get_fp8_context(chunks[0].config):
        for layer in layers.values():
            layer.init_fp8_metadata()
    return {
        f"{name}.{direction}.{kind}": getattr(layer.fp8_meta[key], kind)
        for name, layer in layers.items()
        for direction, key in _DIRECTIONS.items()
        for kind in ("scale", "amax_history")
    }


@torch.no_grad()
def scale_weights(chunks: Sequence[Module], tensor_parallel_group: dist.ProcessGroup) -> None:
    """Set the scales of weights from the present weights; scales of activations and gradients stay.

    A new layer's scales are all 1, which would round weights of the usual size of 0.02 to the nearest 1/512. All
    tensor-parallel ranks call it, after the weights are set.
    """
    found = scales(chunks)
    weights = {
        f"{name}.forward": layer.weight for chunk in chunks for name, layer in _linear_layers(chunk).items() if found
    }
    if not weights:
        return
    largest = torch.stack([weight.detach().abs().amax().float() for weight in weights.values()])
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=tensor_parallel_group)
    margin = 2 ** chunks[0].config.fp8_margin
    for name, amax in zip(weights, largest.tolist(), strict=True):
        if amax > 0:
            found[f"{name}.scale"][_WEIGHT] = _E4M3_MAX / amax / margin
            # In the history the next pass writes the first entry; the last entry is that of the pass before.
            found[f"{name}.amax_history"][-1, _WEIGHT] = amax


@contextlib.contextmanager
def one_step(chunks: Sequence[Module]) -> Iterator[None]:
    """Scales do not move inside of the context. They move once at its end, by the maxima of all passes in it.

    All ranks that share maxima enter and leave it together.
    """
    if not keeps_scales(chunks):
        yield
        return
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    # megatron-core opens a context of Transformer Engine for each pass. Transformer Engine moves the scales of forward
    # passes where the outermost context ends, so this context delays that.
    with get_fp8_context(chunks[0].config):
        # It moves those of backward passes after the first layer of a context. After this call no layer is the first.
        FP8GlobalStateManager.is_first_fp8_module()
        yield
    FP8GlobalStateManager.reduce_and_update_fp8_tensors(forward=False)


@contextlib.contextmanager
def preserved(chunks: Sequence[Module]) -> Iterator[None]:
    """After the context, scales and maxima are the same as before it."""
    saved = save_scales(chunks)
    try:
        yield
    finally:
        restore_scales(saved)


def save_scales(chunks: Sequence[Module]) -> Saved:
    """The present scales and maxima, for `restore_scales`."""
    return [(tensor, tensor.clone()) for tensor in scales(chunks).values()]


def restore_scales(saved: Saved) -> None:
    """Put back what `save_scales` found."""
    for tensor, value in saved:
        tensor.copy_(value)


def _linear_layers(module: Module) -> dict[str, Module]:
    """Transformer Engine's linear layers by global name, of a chunk that may be wrapped for data parallelism."""
    chunk = getattr(module, "module", module)
    decoder = getattr(chunk, "decoder", None)
    return {
        f"decoder.layers.{block.layer_number - 1}.{name}": layer
        for block in (decoder.layers if decoder is not None else ())
        for name, layer in block.named_modules()
        if hasattr(layer, "fp8_meta") and hasattr(layer, "weight")
    }
