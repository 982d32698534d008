"""Tells megatron-core and Transformer Engine our settings of FP8, and checks them there."""

from typing import Any

import torch
from megatron.core.fp8_utils import get_fp8_recipe
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_brain.config.fp8 import Fp8Config
from megatron_brain.config.fp8_checks import validate_fp8_device
from megatron_brain.errors import ConfigError
from megatron_brain.runtime import transformer_engine


def fp8_settings(fp8: Fp8Config | None) -> dict[str, Any]:
    """The settings under the names of megatron-core's TransformerConfig; none where FP8 is only emulated."""
    if fp8 is None or not fp8.uses_kernels:
        return {}
    start, end = fp8.layers_in_bf16
    return {
        "fp8": fp8.fp8_format,
        "fp8_recipe": fp8.fp8_recipe,
        "fp8_quantizer_factory": fp8.fp8_quantizer_factory,
        "fp8_param": fp8.fp8_param_gather,
        "fp8_margin": fp8.fp8_margin,
        "fp8_amax_history_len": fp8.fp8_amax_history_len or 1024,
        "fp8_amax_compute_algo": fp8.fp8_amax_compute_algo or "max",
        "first_last_layers_bf16": fp8.first_last_layers_bf16,
        "num_layers_at_start_in_bf16": start,
        "num_layers_at_end_in_bf16": end,
    }


def check_fp8(fp8: Fp8Config, config: TransformerConfig, impl: str, reason: str, device: torch.device) -> None:
    """Raise ConfigError if the layers, the device or Transformer Engine cannot do what the recipe asks for.

    Args:
        config: a configuration that contains `fp8_settings`.
        impl, reason: implementation of the layers, and the reason for this choice.
    """
    if impl != "transformer_engine":
        raise ConfigError(
            f"fp8_format={fp8.fp8_format} needs the layers of transformer_engine, and these are the {impl} ones "
            f"({reason}): drop it, or add --fp8-emulate to study the rounding"
        )
    validate_fp8_device(fp8, transformer_engine.capability(device), transformer_engine.cuda_version())
    try:
        get_fp8_recipe(config)
    except Exception as error:  # Any type is possible: the factory is the user's code, and its import may fail.
        raise ConfigError(
            f"fp8_recipe={fp8.fp8_recipe}: Transformer Engine {transformer_engine.version()} makes no such recipe "
            f"({type(error).__name__}: {error})"
        ) from error
