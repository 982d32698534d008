"""FP8 in the linear maps of the layers."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from megatron_brain.config.parallel import ParallelConfig
from megatron_brain.errors import ConfigError


@dataclass(kw_only=True)
class Fp8Config:
    """FP8 in the linear maps of the layers. Output layer, reward head, norms and attention never compute in FP8."""

    fp8_format: Literal["hybrid", "e4m3"] | None = None
    """hybrid: e4m3 for activations and weights, e5m2 for gradients; e4m3: for all of them; unset: no FP8."""

    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8", "custom"] = "tensorwise"
    """How scales are chosen: from earlier steps (delayed), from each tensor (tensorwise), from each block of it
    (blockwise; mxfp8, which H100 lacks), or by --fp8-quantizer-factory (custom)."""

    fp8_quantizer_factory: str | None = None
    """Function `package.module.function` that makes the quantizers of --fp8-recipe custom, with their formats."""

    fp8_margin: int = 0
    """With --fp8-recipe delayed, scales are divided by 2 to the power of this."""

    fp8_amax_history_len: int | None = None
    """Steps whose largest magnitudes --fp8-recipe delayed keeps; default: 1024."""

    fp8_amax_compute_algo: Literal["max", "most_recent"] | None = None
    """Which of these magnitudes --fp8-recipe delayed takes for the scale; default: max."""

    fp8_param_gather: bool = False
    """Keep and gather the weights of linear maps in FP8 alone; needs --use-distributed-optimizer. Layers that
    --first-last-layers-bf16 leaves out keep theirs in bf16."""

    first_last_layers_bf16: bool = False
    """Leave the first and last layers out of FP8; not with --fp8-recipe delayed."""

    num_layers_at_start_in_bf16: int | None = None
    """Layers at the start that --first-last-layers-bf16 leaves out; default: 1."""

    num_layers_at_end_in_bf16: int | None = None
    """Layers at the end that --first-last-layers-bf16 leaves out; default: 1."""

    fp8_emulate: bool = False
    """Emulate FP8's rounding in plain PyTorch, in local layers with --fp8-recipe tensorwise: slow, for research."""

    @property
    def uses_kernels(self) -> bool:
        """Whether FP8 is on and computed by the device, not emulated."""
        return self.fp8_format is not None and not self.fp8_emulate

    @property
    def sequence_multiple(self) -> int:
        """The number of rows of a GEMM in FP8 is a multiple of this; 1 where no FP8 kernel is called.

        Source: megatron-core's `get_fp8_align_size` (16, mxfp8 32), and the 128 rows of a block of --fp8-recipe
        blockwise. With sequence parallelism it applies to the rows of one process.
        """
        if not self.uses_kernels:
            return 1
        return {"mxfp8": 32, "blockwise": 128}.get(self.fp8_recipe, 16)

    def packed_multiple(self, parallel: ParallelConfig) -> int:
        """Packed sequences have a multiple of so many tokens, so that GEMMs on each process get whole rows."""
        rows, processes = self.sequence_multiple, parallel.tensor_model_parallel_size
        return rows * processes if parallel.sequence_parallel else math.lcm(rows, processes)

    @property
    def layers_in_bf16(self) -> tuple[int, int]:
        """Numbers of layers at the start and at the end that are left out of FP8."""
        if not self.first_last_layers_bf16:
            return 0, 0
        start, end = self.num_layers_at_start_in_bf16, self.num_layers_at_end_in_bf16
        return 1 if start is None else start, 1 if end is None else end

    def __post_init__(self) -> None:
        if self.fp8_format is None:
            for field in dataclasses.fields(self):
                if getattr(self, field.name) != field.default:
                    raise ConfigError(
                        f"{self._told(field.name)} does nothing without fp8_format: add --fp8-format hybrid, or drop it"
                    )
            return
        self._check_recipe()
        self._check_layers_in_bf16()
        if self.fp8_emulate and self.fp8_recipe != "tensorwise":
            raise ConfigError(
                f"fp8_emulate=true needs fp8_recipe=tensorwise, it is {self.fp8_recipe}: other recipes are not emulated"
            )
        if self.fp8_param_gather and self.fp8_emulate:
            raise ConfigError("fp8_param_gather=true: an emulation has no weights in FP8; drop fp8_param_gather")
        if self.fp8_param_gather and self.fp8_recipe not in ("tensorwise", "blockwise"):
            raise ConfigError(
                f"fp8_param_gather=true is for fp8_recipe=tensorwise or blockwise, it is {self.fp8_recipe}: drop "
                "fp8_param_gather, or use one of those"
            )

    def _check_recipe(self) -> None:
        """Check the settings that only some recipes read."""
        for name in ("fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo"):
            if getattr(self, name) not in (0, None) and self.fp8_recipe != "delayed":
                raise ConfigError(
                    f"{self._told(name)} is read by fp8_recipe=delayed alone, it is {self.fp8_recipe}: drop {name}"
                )
        if self.fp8_margin < 0:
            raise ConfigError(f"fp8_margin={self.fp8_margin}: a scale above what fits overflows; use 0 or more")
        if self.fp8_amax_history_len is not None and self.fp8_amax_history_len < 1:
            raise ConfigError(f"fp8_amax_history_len={self.fp8_amax_history_len}: must be at least 1")
        factory = self.fp8_quantizer_factory
        if (factory is not None) != (self.fp8_recipe == "custom"):
            cure = "add --fp8-quantizer-factory package.module.function" if factory is None else "drop it"
            raise ConfigError(
                f"fp8_quantizer_factory={factory} and fp8_recipe={self.fp8_recipe}: a factory goes with custom alone, "
                f"which needs one; {cure}"
            )
        if factory is not None and not ("." in factory and all(part.isidentifier() for part in factory.split("."))):
            raise ConfigError(f"fp8_quantizer_factory={factory!r}: expected package.module.function")
        if factory is not None and self.fp8_format != "hybrid":
            raise ConfigError(
                f"fp8_format={self.fp8_format} is not told to the factory of fp8_recipe=custom, which chooses formats "
                "itself: use --fp8-format hybrid"
            )

    def _check_layers_in_bf16(self) -> None:
        counts = ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")
        for name in counts:
            value = getattr(self, name)
            if value is not None and not self.first_last_layers_bf16:
                raise ConfigError(f"{name}={value} needs first_last_layers_bf16: add it, or drop {name}")
            if value is not None and value < 0:
                raise ConfigError(f"{name}={value}: must not be negative")
        if not self.first_last_layers_bf16:
            return
        if self.fp8_recipe == "delayed":
            raise ConfigError(
                "first_last_layers_bf16=true: fp8_recipe=delayed updates the scales of all layers at once and leaves "
                "none out; use another --fp8-recipe"
            )
        if self.layers_in_bf16 == (0, 0):
            raise ConfigError(f"first_last_layers_bf16=true leaves out no layer: raise {' or '.join(counts)}")

    def _told(self, name: str) -> str:
        """The setting as a user writes it, `name=value`."""
        value = getattr(self, name)
        return f"{name}={str(value).lower() if isinstance(value, bool) else value}"
