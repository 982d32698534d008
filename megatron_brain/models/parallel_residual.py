"""A layer whose attention and feed-forward layer read the same input (GPT-J, GPT-NeoX)."""

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor


class ParallelResidualLayer(TransformerLayer):
    """x + attention(norm1(x)) + mlp(norm2(x)), where megatron-core's layer hands norm2 the sum so far.

    The one place that knows how megatron-core divides up its layer: the methods called here are there, with these
    arguments, from 0.16 to 0.19.
    """

    def forward(self, hidden_states: Tensor, **options) -> tuple[Tensor, Tensor | None]:
        """Hidden states `[s, b, h]`; options and the second output are those of TransformerLayer."""
        after_attention, context = self._forward_attention(hidden_states, **options)
        mlp_output_with_bias = self.mlp(self._forward_pre_mlp_layernorm(hidden_states))
        return self._forward_post_mlp(mlp_output_with_bias, after_attention), context
