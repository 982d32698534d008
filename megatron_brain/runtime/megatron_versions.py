"""The differences, as far as they concern us, between the versions of megatron-core that we support: 0.16 to 0.19.

When support for an old version ends, look for users of this module: they can be simplified.
"""

import functools
from typing import Any

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor


def mlp_submodules(layer: ModuleSpec) -> MLPSubmodules:
    """Submodules of the feed-forward layer in a layer's spec. The caller may change them in place."""
    submodules: Any = layer.submodules
    # The feed-forward layer is a ModuleSpec in 0.16, a partial in 0.19.
    mlp = submodules.mlp
    found: MLPSubmodules = mlp.keywords["submodules"] if isinstance(mlp, functools.partial) else mlp.submodules
    return found


def grads_for_norm(optimizer: MegatronOptimizer) -> list[Tensor]:
    """Gradients that this rank adds to the norm: each counts on one rank. The optimizer is not a chain of several."""
    newer, in_0_16 = "get_grads_for_grad_norm", "get_main_grads_for_grad_norm"
    grads: list[Tensor] = getattr(optimizer, newer if hasattr(optimizer, newer) else in_0_16)()
    return grads
