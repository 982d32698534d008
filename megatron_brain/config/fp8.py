"""FP8 in the linear maps of the layers."""

from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True)
class Fp8Config:
    """FP8 in the linear maps of the layers. The output layer, the reward head, norms and attention never are in FP8."""

    fp8_format: Literal["hybrid", "e4m3"] | None = None
    """hybrid: e4m3 for activations and weights, e5m2 for gradients; e4m3: for all of them; unset: no FP8."""

    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8", "custom"] = "tensorwise"
    """How scales are chosen: from earlier steps (delayed), from each tensor itself (tensorwise), from each block of it
    (blockwise; mxfp8, which H100 lacks), or by --fp8-quantizer-factory (custom)."""

    fp8_quantizer_factory: str | None = None
    """Function `package.module.function` that makes the quantizers of --fp8-recipe custom."""

    fp8_margin: int = 0
    """Scales of --fp8-recipe delayed are lowered by 2 to this power."""

    fp8_amax_history_len: int | None = None
    """Steps whose largest magnitudes --fp8-recipe delayed remembers; default: 1024."""

    fp8_amax_compute_algo: Literal["max", "most_recent"] | None = None
    """What --fp8-recipe delayed makes of them; default: max."""

    fp8_wgrad: bool = True
    """Compute weight gradients in FP8 too; off needs --fp8-recipe delayed."""

    fp8_param_gather: bool = False
    """Keep the weights of linear maps in FP8 alone and gather them so; needs --use-distributed-optimizer."""

    first_last_layers_bf16: bool = False
    """Leave the first and last layers out of FP8; not with --fp8-recipe delayed."""

    num_layers_at_start_in_bf16: int | None = None
    """Layers at the start that --first-last-layers-bf16 leaves out; default: 1."""

    num_layers_at_end_in_bf16: int | None = None
    """Layers at the end that --first-last-layers-bf16 leaves out; default: 1."""

    fp8_emulate: bool = False
    """Round as FP8 would, in plain PyTorch on the local layers, with --fp8-recipe tensorwise: slow, for research."""
