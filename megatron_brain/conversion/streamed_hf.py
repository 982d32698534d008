"""transformers' model of a directory, run with one module's weights in memory at a time.

The code that runs is transformers' own. Two modules are replaced, because whole vocabulary matrices are not to be held
in float32: the embedding reads the rows of the tokens there are, the output layer multiplies with a block of rows at a
time.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from megatron_brain.conversion.registry import HFModel
from megatron_brain.conversion.safetensors_files import SafetensorsReader
from megatron_brain.errors import ConfigError

BLOCK_ELEMENTS = 2**25
"""Entries of a vocabulary matrix that are in memory at one time."""


def streamed_hf_model(
    source: HFModel,
    files: SafetensorsReader,
    names: Mapping[str, str],
    dtype: torch.dtype,
    device: torch.device,
) -> nn.Module:
    """transformers' model of a directory, its weights rounded to `dtype` and computed with in float32.

    Weights are read when a module is called, and are gone when it has returned.

    Args:
        files: of the directory.
        names: names in the files of the tensors in the family's table, as `check_tensors` returns them.

    Raises:
        ConfigError: transformers does not take config.json.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    auto = AutoModelForCausalLM if source.head == "policy" else AutoModelForSequenceClassification
    with parameters_without_memory():
        try:
            config = AutoConfig.from_pretrained(source.directory, trust_remote_code=False)
            hf = auto.from_config(config, dtype=torch.float32, trust_remote_code=False).eval()
        except ValueError as error:
            raise ConfigError(
                f"{source.directory / 'config.json'}: transformers makes no model of it ({error}): correct it, or do "
                "not compare (--no-compare)"
            ) from error
    weights = _Weights(files, names, dtype, device)
    # By the table: transformers has other names for some output layers in memory than in files.
    embedding, output = (weight.sources[0].name for weight in (source.family.embedding[0], source.family.output))
    hf.set_input_embeddings(_RowEmbedding(weights, embedding))
    if source.head == "policy":
        hf.set_output_embeddings(_BlockedOutput(weights, embedding if config.tie_word_embeddings else output))
    for path, module in hf.named_modules():
        _to_device(module, device)
        _stream(module, path, weights)
    return hf


@contextmanager
def parameters_without_memory() -> Iterator[None]:
    """Modules made meanwhile have their parameters on the meta device, and their buffers as they make them."""

    def without_memory(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

    handle = register_module_parameter_registration_hook(without_memory)
    try:
        yield
    finally:
        handle.remove()


class _Weights:
    """Tensors of the files by transformers' names, rounded to a type and then float32."""

    def __init__(
        self, files: SafetensorsReader, names: Mapping[str, str], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._files, self._names, self._dtype, self._device = files, names, dtype, device

    def whole(self, name: str) -> Tensor:
        return self._rounded(self._files.read(self._names[name]))

    def rows(self, name: str, start: int, end: int) -> Tensor:
        return self._rounded(self._files.rows(self._names[name], start, end))

    def shape(self, name: str) -> tuple[int, ...]:
        return self._files.shape(self._names[name])

    def _rounded(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._dtype).to(device=self._device, dtype=torch.float32)


class _RowEmbedding(nn.Module):
    """An embedding that reads the rows it is asked for."""

    def __init__(self, weights: _Weights, name: str) -> None:
        super().__init__()
        self._weights, self._name = weights, name

    def forward(self, ids: Tensor) -> Tensor:
        unique, place = ids.unique(return_inverse=True)
        rows = [self._weights.rows(self._name, token, token + 1) for token in unique.tolist()]
        return torch.cat(rows)[place]


class _BlockedOutput(nn.Module):
    """An output layer without bias that reads a block of its rows at a time."""

    def __init__(self, weights: _Weights, name: str) -> None:
        super().__init__()
        self._weights, self._name = weights, name

    def forward(self, hidden: Tensor) -> Tensor:
        count, width = self._weights.shape(self._name)
        logits = hidden.new_empty(*hidden.shape[:-1], count)
        step = max(1, BLOCK_ELEMENTS // width)
        for start in range(0, count, step):
            end = min(start + step, count)
            logits[..., start:end] = F.linear(hidden, self._weights.rows(self._name, start, end))
        return logits


def _to_device(module: nn.Module, device: torch.device) -> None:
    for name, buffer in module.named_buffers(recurse=False):
        setattr(module, name, buffer.to(device))


def _stream(module: nn.Module, path: str, weights: _Weights) -> None:
    """Give a module its own parameters before each call and take them after it."""
    absent = dict(module.named_parameters(recurse=False))

    def fill(module: nn.Module, args: tuple) -> None:
        for name in absent:
            weight = weights.whole(f"{path}.{name}")
            setattr(module, name, nn.Parameter(weight, requires_grad=False))

    def empty(module: nn.Module, args: tuple, output: object) -> None:
        for name, parameter in absent.items():
            setattr(module, name, parameter)

    if absent:
        module.register_forward_pre_hook(fill)
        module.register_forward_hook(empty)
