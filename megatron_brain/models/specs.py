"""Layer specs: megatron-core modules (`local`) or Transformer Engine ones, with the parts that we bring ourselves."""

import functools
import importlib.util

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_brain.config.model import ModelConfig
from megatron_brain.models.activation import activation_module
from megatron_brain.models.attention import CoreAttention
from megatron_brain.models.norm import NORMS, RMSNorm
from megatron_brain.models.parallel_residual import ParallelResidualLayer
from megatron_brain.models.te_attention import TransformerEngineAttention


def choose_transformer_impl(requested: str, device: torch.device) -> tuple[str, str]:
    """Resolve `auto`. Returns the implementation and why it was taken.

    Raises:
        ValueError: Transformer Engine was asked for and cannot run here.
    """
    installed = importlib.util.find_spec("transformer_engine") is not None
    usable = installed and device.type == "cuda"
    missing = "there is no CUDA device" if installed else "transformer_engine is not installed"
    if requested == "transformer_engine" and not usable:
        raise ValueError(f"--transformer-impl transformer_engine: {missing}; use local, or pip install .[gpu]")
    if requested == "auto":
        return ("transformer_engine", "installed, on CUDA") if usable else ("local", missing)
    return requested, "asked for"


def layer_spec(transformer_impl: str, model: ModelConfig) -> ModuleSpec:
    """Spec of one decoder layer. The transformer_engine one has not been run on a GPU."""
    if transformer_impl == "transformer_engine":
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=model.qk_layernorm)
        spec.submodules.self_attention.submodules.core_attention = TransformerEngineAttention
    else:
        spec = _local_spec(model)
    if model.use_parallel_residual:
        spec.module = ParallelResidualLayer
    mlp = spec.submodules.mlp
    # A ModuleSpec in megatron-core 0.16, a partial in 0.19.
    submodules = mlp.keywords["submodules"] if isinstance(mlp, functools.partial) else mlp.submodules
    submodules.activation_func = activation_module(model)
    return spec


def _local_spec(model: ModelConfig) -> ModuleSpec:
    spec = get_gpt_layer_local_spec(normalization=model.normalization, qk_layernorm=model.qk_layernorm)
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = NORMS[model.normalization]
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = CoreAttention
    if model.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return spec
