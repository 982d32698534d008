"""The network: sizes of its architecture and the implementation of its layers."""

from dataclasses import dataclass
from typing import Literal

from megatron_brain.errors import ConfigError


@dataclass(kw_only=True)
class ModelConfig:
    """Model architecture. Sizes that are unset come from --hf-model or from the checkpoint that is loaded."""

    hf_model: str | None = None
    """Hugging Face model directory; its config.json gives the sizes, its safetensors files the initial weights."""

    num_layers: int | None = None
    """Number of transformer layers."""

    hidden_size: int | None = None
    """Width of the residual stream."""

    ffn_hidden_size: int | None = None
    """Width of the feed-forward layer."""

    num_attention_heads: int | None = None
    """Number of query heads."""

    num_query_groups: int | None = None
    """Number of key/value heads (grouped-query attention); default: --num-attention-heads."""

    kv_channels: int | None = None
    """Dimension of one head; default: hidden size / attention heads."""

    vocab_size: int | None = None
    """Number of token ids before padding for tensor parallelism."""

    max_position_embeddings: int | None = None
    """Longest sequence that the model was made for, in tokens."""

    position_embedding_type: Literal["rope", "learned_absolute"] | None = None
    """How positions enter: queries and keys are rotated (rope), or a learned embedding is added; default: rope."""

    rotary_base: float | None = None
    """Base of the rotary position embedding (Hugging Face: rope_theta); default: 10000."""

    rotary_percent: float | None = None
    """Share of the channels of an attention head that is rotated, the first ones; default: 1."""

    rope_scaling_factor: float | None = None
    """Low rotary frequencies are divided by this, as in Llama 3.1 for longer sequences; default: 1, unchanged."""

    rope_low_freq_factor: float | None = None
    """Frequencies of fewer turns than this in the original length are divided by --rope-scaling-factor; default: 1."""

    rope_high_freq_factor: float | None = None
    """Frequencies of more turns than this in the original length stay unchanged, those between the two factors are
    interpolated; default: 4."""

    rope_original_max_position_embeddings: int | None = None
    """Sequence length, in tokens, for which the model was made before --rope-scaling-factor; default: 8192."""

    window_size: int | None = None
    """Tokens that a token of the Hugging Face model attends to, itself included. Windows are not computed:
    sequences of at most this length do not need one, longer ones are refused. Default: no window."""

    normalization: Literal["RMSNorm", "LayerNorm"] | None = None
    """Norm before attention, before the feed-forward layer and at the end; default: RMSNorm."""

    norm_epsilon: float | None = None
    """Epsilon of the norms; default: 1e-5."""

    qk_layernorm: bool | None = None
    """Apply RMSNorm to each attention head of queries and keys before they are rotated; default: no."""

    hidden_act: Literal["silu", "gelu", "gelu_tanh"] | None = None
    """Activation of the feed-forward layer: gelu is exact, gelu_tanh its tanh approximation; default: silu."""

    gated_linear_unit: bool | None = None
    """Multiply the activation by a second projection of the input; default: yes."""

    add_bias_linear: bool | None = None
    """Add biases to all linear maps of a layer; default: no."""

    add_qkv_bias: bool | None = None
    """Add biases to queries, keys and values, also without --add-bias-linear; default: no."""

    use_parallel_residual: bool | None = None
    """Let attention and feed-forward layer both read the layer's input: x + attention(norm x) + mlp(norm x); default:
    no, the feed-forward layer reads the sum of input and attention."""

    untie_embeddings_and_output_weights: bool | None = None
    """Give the output layer its own weights instead of those of the embedding; default: no."""

    hf_model_type: str | None = None
    """`model_type` of the config.json that an export writes; default: that of the Hugging Face model the weights come
    from, else that of the first family that can have these sizes."""

    init_method_std: float = 0.02
    """Standard deviation of random initial weights."""

    make_vocab_size_divisible_by: int = 128
    """The vocabulary is padded to a multiple of this times the tensor-parallel size."""

    hidden_dropout: float = 0.0
    """Dropout after attention and feed-forward layer; post-training uses 0."""

    attention_dropout: float = 0.0
    """Dropout of attention probabilities; post-training uses 0."""

    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Implementation of the layers; auto takes transformer_engine where it and CUDA are present."""

    bf16: bool = False
    """Compute in bfloat16 with float32 main weights."""

    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute activations in the backward pass: of whole layers, or of core attention only."""

    recompute_method: Literal["uniform", "block"] | None = None
    """How --recompute-granularity full chooses layers; default: uniform."""

    recompute_num_layers: int | None = None
    """Layers that are recomputed together (uniform), or recomputed layers of a model chunk (block); default: 1."""

    logprob_chunk_size: int = 2**25
    """Logits (positions x vocabulary entries of a process) that exist at one time when log-probabilities are computed;
    2**25 in float32 are 128 MiB."""

    @property
    def longest_sequence(self) -> tuple[int, str]:
        """Largest number of tokens in a sequence, and the setting that limits it, in words; for resolved sizes."""
        limit, setting = self.max_position_embeddings, f"max_position_embeddings={self.max_position_embeddings}"
        assert limit is not None
        if self.window_size is not None and self.window_size < limit:
            return self.window_size, f"window_size={self.window_size} (attention over a window is not computed)"
        return limit, setting

    def __post_init__(self) -> None:
        for name in ("hidden_dropout", "attention_dropout"):
            value = getattr(self, name)
            if not 0.0 <= value < 1.0:
                raise ConfigError(f"{name}={value}: a dropout probability lies in [0, 1)")
        if self.recompute_method and self.recompute_granularity != "full":
            raise ConfigError(
                f"recompute_method={self.recompute_method} needs recompute_granularity=full, "
                f"it is {self.recompute_granularity}"
            )
        if self.recompute_num_layers and self.recompute_granularity != "full":
            raise ConfigError(
                f"recompute_num_layers={self.recompute_num_layers} needs recompute_granularity=full, "
                f"it is {self.recompute_granularity}"
            )
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name}={value}: must be positive")
        if self.init_method_std < 0:
            raise ConfigError(f"init_method_std={self.init_method_std}: a standard deviation must not be negative")
        self._check_heads()
        self._check_rotation()
        if self.qk_layernorm and self.normalization == "LayerNorm":
            raise ConfigError("qk_layernorm is an RMSNorm over heads and needs normalization=RMSNorm, it is LayerNorm")

    def _check_heads(self) -> None:
        """Check that attention heads divide the hidden size, and key/value heads the query heads."""
        heads = self.num_attention_heads
        if heads is None:
            return
        if self.num_query_groups is not None and heads % self.num_query_groups:
            raise ConfigError(
                f"num_attention_heads={heads} is not a multiple of num_query_groups={self.num_query_groups}"
            )
        if self.kv_channels is None and self.hidden_size is not None and self.hidden_size % heads:
            raise ConfigError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={heads}; "
                "set kv_channels, the dimension of a head"
            )

    def _check_rotation(self) -> None:
        """Check that an even number of channels is rotated, and that the frequency factors are in order."""
        percent, scaling = self.rotary_percent or 1.0, self.rope_scaling_factor or 1.0
        if self.position_embedding_type == "learned_absolute":
            for name, value in (("rotary_percent", percent), ("rope_scaling_factor", scaling)):
                if value != 1.0:
                    raise ConfigError(f"{name}={value} needs position_embedding_type=rope, it is learned_absolute")
            return
        if percent > 1.0:
            raise ConfigError(f"rotary_percent={percent}: a share of a head's channels lies in (0, 1]")
        if self.kv_channels is not None:
            rotated = int(self.kv_channels * percent)
            if rotated == 0 or rotated % 2:
                raise ConfigError(
                    f"rotary_percent={percent} of kv_channels={self.kv_channels} are {rotated} channels: they are "
                    "rotated in pairs, so it must be an even number above 0"
                )
        if scaling < 1.0:
            raise ConfigError(f"rope_scaling_factor={scaling}: it divides frequencies and is 1 or more")
        low, high = self.rope_low_freq_factor or 1.0, self.rope_high_freq_factor or 4.0
        if low >= high:
            raise ConfigError(f"rope_low_freq_factor={low} must be less than rope_high_freq_factor={high}")


@dataclass(kw_only=True)
class ResolvedModel(ModelConfig):
    """A model whose sizes are all known, from `models.architecture.resolve`."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int
    rotary_percent: float


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
    "rotary_percent",
    "rope_scaling_factor",
    "rope_low_freq_factor",
    "rope_high_freq_factor",
    "rope_original_max_position_embeddings",
    "window_size",
    "norm_epsilon",
    "make_vocab_size_divisible_by",
    "recompute_num_layers",
    "logprob_chunk_size",
)
