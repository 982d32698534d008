"""What the network is: architecture sizes and the implementation of its layers."""

from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True)
class ModelConfig:
    """Model architecture. Left unset, sizes come from --hf-model or from the checkpoint that is loaded."""

    hf_model: str | None = None
    """Hugging Face model directory: its config.json gives the sizes, its safetensors the initial weights."""

    num_layers: int | None = None
    """Number of transformer layers."""

    hidden_size: int | None = None
    """Width of the residual stream."""

    ffn_hidden_size: int | None = None
    """Width of the gated feed-forward layer."""

    num_attention_heads: int | None = None
    """Number of query heads."""

    num_query_groups: int | None = None
    """Number of key/value heads (grouped-query attention); default: --num-attention-heads."""

    kv_channels: int | None = None
    """Dimension of one head; default: hidden size / attention heads."""

    vocab_size: int | None = None
    """Number of token ids before padding for tensor parallelism."""

    max_position_embeddings: int | None = None
    """Longest sequence the model was made for, in tokens."""

    position_embedding_type: Literal["rope", "learned_absolute"] | None = None
    """Positions by rotating queries and keys, or by a learned embedding added to that of the token; default: rope."""

    rotary_base: float | None = None
    """Base of the rotary position embedding (Hugging Face: rope_theta); default: 10000."""

    norm_epsilon: float | None = None
    """Epsilon of RMSNorm; default: 1e-5."""

    untie_embeddings_and_output_weights: bool | None = None
    """Give the output layer weights of its own instead of the embedding's; default: tied."""

    init_method_std: float = 0.02
    """Standard deviation of random initial weights."""

    make_vocab_size_divisible_by: int = 128
    """The vocabulary is padded to a multiple of this times the tensor-parallel size."""

    hidden_dropout: float = 0.0
    """Dropout after attention and feed-forward; post-training uses 0."""

    attention_dropout: float = 0.0
    """Dropout of attention probabilities; post-training uses 0."""

    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Layer implementation; auto takes transformer_engine where it and CUDA are present."""

    bf16: bool = False
    """Compute in bfloat16 with float32 main weights."""

    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute activations in the backward pass: whole layers, or core attention only."""

    recompute_method: Literal["uniform", "block"] | None = None
    """How --recompute-granularity full chooses layers; default: uniform."""

    recompute_num_layers: int | None = None
    """Layers per recomputed chunk (uniform) or recomputed layers per stage (block); default: 1."""

    logprob_chunk_size: int = 2**25
    """Logits (positions x vocabulary entries of a process) that exist at one time when log-probabilities are computed;
    2**25 in float32 are 128 MiB."""

    def __post_init__(self) -> None:
        for name in ("hidden_dropout", "attention_dropout"):
            value = getattr(self, name)
            if not 0.0 <= value < 1.0:
                raise ValueError(f"{name}={value}: a dropout probability lies in [0, 1)")
        if self.recompute_method and self.recompute_granularity != "full":
            raise ValueError(
                f"recompute_method={self.recompute_method} needs recompute_granularity=full, "
                f"it is {self.recompute_granularity}"
            )
        if self.recompute_num_layers and self.recompute_granularity != "full":
            raise ValueError(
                f"recompute_num_layers={self.recompute_num_layers} needs recompute_granularity=full, "
                f"it is {self.recompute_granularity}"
            )
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value}: must be positive")
        self._check_heads()

    def _check_heads(self) -> None:
        """Heads share the hidden size, and key/value heads are shared by query heads, evenly."""
        heads = self.num_attention_heads
        if heads is None:
            return
        if self.num_query_groups is not None and heads % self.num_query_groups:
            raise ValueError(
                f"num_attention_heads={heads} is not a multiple of num_query_groups={self.num_query_groups}"
            )
        if self.kv_channels is None and self.hidden_size is not None and self.hidden_size % heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={heads}; "
                "set kv_channels, the dimension of a head"
            )


_POSITIVE = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "vocab_size",
    "max_position_embeddings",
    "rotary_base",
    "norm_epsilon",
    "make_vocab_size_divisible_by",
    "recompute_num_layers",
    "logprob_chunk_size",
)
