"""Runs transformers' model of a directory with one module's weights in memory at a time.

The code that runs is transformers' own. Only two modules are replaced, because a whole vocabulary matrix in float32
takes too much memory: our embedding reads the rows of the tokens that occur, and our output layer multiplies with one
block of rows at a time.
"""

from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_brain.conversion.registry import HFModel
from megatron_brain.conversion.safetensors_files import SafetensorsReader
from megatron_brain.conversion.streaming import BLOCK_ELEMENTS, parameters_without_memory, read_when_called
from megatron_brain.errors import ConfigError


def streamed_hf_model(
    source: HFModel,
    files: SafetensorsReader,
    names: Mapping[str, str],
    dtype: torch.dtype,
    device: torch.device,
) -> nn.Module:
    """transformers' model of a directory. It rounds its weights to `dtype` and computes in float32.

    A module reads its weights when it is called, and drops them when it returns.

    Args:
        files: those of the directory.
        names: the names in the files of the tensors in the family's table, as `check_tensors` returns them.

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
    # The table has the names in files. transformers has other names for some output layers in memory.
    embedding, output = (weight.sources[0].name for weight in (source.family.embedding[0], source.family.output))
    hf.set_input_embeddings(_RowEmbedding(weights, embedding))
    if source.head == "policy":
        hf.set_output_embeddings(_BlockedOutput(weights, embedding if config.tie_word_embeddings else output))
    for path, module in hf.named_modules():
        _to_device(module, device)
        read_when_called(module, partial(weights.parameter, path))
    return hf


class _Weights:
    """Tensors of the files, by transformers' names, rounded to a type and returned in float32."""

    def __init__(
        self, files: SafetensorsReader, names: Mapping[str, str], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._files, self._names, self._dtype, self._device = files, names, dtype, device

    def parameter(self, module: str, name: str) -> nn.Parameter:
        whole = self._files.read(self._names[f"{module}.{name}"])
        return nn.Parameter(self._rounded(whole), requires_grad=False)

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
    """An output layer without bias that reads one block of its rows at a time."""

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
