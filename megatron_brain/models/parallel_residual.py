"""A layer whose attention and feed-forward layer read the same input (GPT-J, GPT-NeoX)."""

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor


class ParallelResidualLayer(TransformerLayer):
    """x + attention(norm1(x)) + mlp(norm2(x)); in megatron-core's layer norm2 gets x + attention(norm1(x)).

    Only this class knows the methods into which megatron-core divides its layer. They have these arguments from 0.16
    to 0.19.
    """

    def forward(self, hidden_states: Tensor, **options) -> tuple[Tensor, Tensor | None]:
        """Hidden states `[s, b, h]`; options and the second output are those of TransformerLayer."""
        after_attention, context = self._forward_attention(hidden_states, **options)
        mlp_output_with_bias = self.mlp(self._forward_pre_mlp_layernorm(hidden_states))
        return self._forward_post_mlp(mlp_output_with_bias, after_attention), context
