"""Architectures that together have every option of a layer, as settings without the sizes."""

ARCHITECTURES: dict[str, dict[str, object]] = {
    "gpt2": {
        "position_embedding_type": "learned_absolute",
        "normalization": "LayerNorm",
        "hidden_act": "gelu_tanh",
        "gated_linear_unit": False,
        "add_bias_linear": True,
    },
    "qwen3": {
        "qk_layernorm": True,
        "add_qkv_bias": True,
        "rope_scaling_factor": 8.0,
        "rope_original_max_position_embeddings": 32,
        "untie_embeddings_and_output_weights": True,
    },
    "gpt_neox": {
        "normalization": "LayerNorm",
        "hidden_act": "gelu",
        "gated_linear_unit": True,
        "add_bias_linear": True,
        "use_parallel_residual": True,
        "rotary_percent": 0.5,
        "untie_embeddings_and_output_weights": True,
    },
}
"""By the family they resemble. The second also has Qwen2's biases and Llama 3.1's frequencies, the third has a gate."""


def flags(settings: dict[str, object]) -> list[str]:
    """Settings as command-line flags."""
    found = []
    for name, value in settings.items():
        dashed = name.replace("_", "-")
        found += (
            [f"--{dashed}" if value else f"--no-{dashed}"] if isinstance(value, bool) else [f"--{dashed}", str(value)]
        )
    return found
