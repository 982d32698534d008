"""Every architecture option against a tiny random model of transformers: log-probabilities and all gradients.

The weights are carried over by the few lines here, not by the conversion.
"""

import pytest
import torch
import transformers

from megatron_brain.config.model import ModelConfig
from megatron_brain.config.parallel import ParallelConfig
from megatron_brain.data.groups import Group, pack_groups
from megatron_brain.models.architecture import resolve
from megatron_brain.models.provider import build_model

LAYERS, HIDDEN, HEADS, GROUPS, VOCABULARY = 2, 32, 4, 2, 64
NORM_EPSILON = {"RMSNorm": 1e-6, "LayerNorm": 1e-5}
"""transformers' defaults."""
TOKENS = torch.randint(VOCABULARY, (28,), generator=torch.Generator().manual_seed(0)).tolist()
PROMPT = 5

_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
_SCALED = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 16,
}


def neox(percent, **changes):
    """GPT-NeoX's configuration; it has no grouped queries."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": percent}
    sizes = {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"}
    return transformers.GPTNeoXConfig(**sizes, rope_parameters=rope, **changes)


_NEOX_SETTINGS = {
    "normalization": "LayerNorm",
    "hidden_act": "gelu",
    "gated_linear_unit": False,
    "add_bias_linear": True,
    "use_parallel_residual": True,
    "rotary_percent": 0.5,
    "num_query_groups": HEADS,
}

CASES = {
    "llama3.1": (
        transformers.LlamaConfig(**_LLAMA, rope_parameters=_SCALED),
        {
            "rotary_base": 1000.0,
            "rope_scaling_factor": 4.0,
            "rope_low_freq_factor": 1.5,
            "rope_high_freq_factor": 3.0,
            "rope_original_max_position_embeddings": 16,
        },
    ),
    "llama with biases and gelu": (
        transformers.LlamaConfig(**_LLAMA, attention_bias=True, mlp_bias=True, hidden_act="gelu"),
        {"add_bias_linear": True, "hidden_act": "gelu"},
    ),
    "llama with gelu_tanh": (
        transformers.LlamaConfig(**_LLAMA, hidden_act="gelu_pytorch_tanh"),
        {"hidden_act": "gelu_tanh"},
    ),
    "llama with biases and silu": (
        transformers.LlamaConfig(**_LLAMA, attention_bias=True, mlp_bias=True),
        {"add_bias_linear": True},
    ),
    "mistral": (transformers.MistralConfig(**_LLAMA, sliding_window=len(TOKENS)), {"window_size": len(TOKENS)}),
    "qwen2": (transformers.Qwen2Config(**_LLAMA), {"add_qkv_bias": True}),
    "qwen3": (transformers.Qwen3Config(**_LLAMA, head_dim=16), {"qk_layernorm": True, "kv_channels": 16}),
    "gpt_neox": (neox(0.5), _NEOX_SETTINGS),
    "gpt_neox in sequence": (
        neox(0.25, use_parallel_residual=False, hidden_act="silu"),
        _NEOX_SETTINGS | {"use_parallel_residual": False, "rotary_percent": 0.25, "hidden_act": "silu"},
    ),
    "gpt2": (
        transformers.GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=64,
            n_embd=HIDDEN,
            n_layer=LAYERS,
            n_head=HEADS,
            n_inner=48,
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
        ),
        {
            "position_embedding_type": "learned_absolute",
            "normalization": "LayerNorm",
            "hidden_act": "gelu_tanh",
            "gated_linear_unit": False,
            "add_bias_linear": True,
            "num_query_groups": HEADS,
            "untie_embeddings_and_output_weights": False,
        },
    ),
}


def theirs(config):
    """A model with random weights: norms near 1, biases near 0, all of them at work."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3)
            if parameter.dim() == 1 and name.endswith("weight"):
                parameter.add_(1.0)
    return model


def ours(parallel, settings, **run):
    model = resolve(
        ModelConfig(
            num_layers=LAYERS,
            hidden_size=HIDDEN,
            ffn_hidden_size=48,
            num_attention_heads=HEADS,
            vocab_size=VOCABULARY,
            max_position_embeddings=64,
            make_vocab_size_divisible_by=1,
            norm_epsilon=NORM_EPSILON[settings.get("normalization", "RMSNorm")],
            **{"num_query_groups": GROUPS, "untie_embeddings_and_output_weights": True} | settings,
            **run,
        ),
        None,
        "the test",
    )
    [built] = build_model(model, ParallelConfig(), parallel, head="policy", seed=1)
    return built


def by_group(query, key, value):
    """Rows of each query group together: query heads, key head, value head."""
    return torch.cat([part.unflatten(0, (GROUPS, -1)) for part in (query, key, value)], 1).flatten(0, 1)


def heads_together(fused):
    """GPT-2's rows, all queries, all keys, all values, as megatron-core has them: by head."""
    return fused.unflatten(0, (3, HEADS, -1)).transpose(0, 1).flatten(0, 2)


def of_llama(name, of):
    layer = "model." + name
    for kind in ("weight", "bias"):
        yield f"input_layernorm.{kind}", of(f"{layer}.input_layernorm.{kind}")
        yield f"pre_mlp_layernorm.{kind}", of(f"{layer}.post_attention_layernorm.{kind}")
        if of(f"{layer}.self_attn.q_proj.{kind}") is not None:
            yield (
                f"self_attention.linear_qkv.{kind}",
                by_group(*(of(f"{layer}.self_attn.{p}_proj.{kind}") for p in "qkv")),
            )
        yield f"self_attention.linear_proj.{kind}", of(f"{layer}.self_attn.o_proj.{kind}")
        yield f"self_attention.q_layernorm.{kind}", of(f"{layer}.self_attn.q_norm.{kind}")
        yield f"self_attention.k_layernorm.{kind}", of(f"{layer}.self_attn.k_norm.{kind}")
        if of(f"{layer}.mlp.gate_proj.{kind}") is not None:
            yield f"mlp.linear_fc1.{kind}", torch.cat([of(f"{layer}.mlp.{p}_proj.{kind}") for p in ("gate", "up")])
        yield f"mlp.linear_fc2.{kind}", of(f"{layer}.mlp.down_proj.{kind}")


def of_gpt_neox(name, of):
    layer = "gpt_neox." + name
    for kind in ("weight", "bias"):
        yield f"input_layernorm.{kind}", of(f"{layer}.input_layernorm.{kind}")
        yield f"pre_mlp_layernorm.{kind}", of(f"{layer}.post_attention_layernorm.{kind}")
        yield f"self_attention.linear_qkv.{kind}", of(f"{layer}.attention.query_key_value.{kind}")
        yield f"self_attention.linear_proj.{kind}", of(f"{layer}.attention.dense.{kind}")
        yield f"mlp.linear_fc1.{kind}", of(f"{layer}.mlp.dense_h_to_4h.{kind}")
        yield f"mlp.linear_fc2.{kind}", of(f"{layer}.mlp.dense_4h_to_h.{kind}")


def of_gpt2(name, of):
    layer = "transformer." + name.replace("layers", "h")
    for kind in ("weight", "bias"):
        yield f"input_layernorm.{kind}", of(f"{layer}.ln_1.{kind}")
        yield f"pre_mlp_layernorm.{kind}", of(f"{layer}.ln_2.{kind}")
        # Its linear maps hold their weights transposed.
        yield f"self_attention.linear_qkv.{kind}", heads_together(of(f"{layer}.attn.c_attn.{kind}").t())
        yield f"self_attention.linear_proj.{kind}", of(f"{layer}.attn.c_proj.{kind}").t()
        yield f"mlp.linear_fc1.{kind}", of(f"{layer}.mlp.c_fc.{kind}").t()
        yield f"mlp.linear_fc2.{kind}", of(f"{layer}.mlp.c_proj.{kind}").t()


LAYER = {"gpt_neox": of_gpt_neox, "gpt2": of_gpt2}
OUTSIDE = {
    "model.embed_tokens.weight": "embedding.word_embeddings.weight",
    "gpt_neox.embed_in.weight": "embedding.word_embeddings.weight",
    "transformer.wte.weight": "embedding.word_embeddings.weight",
    "transformer.wpe.weight": "embedding.position_embeddings.weight",
    "model.norm.weight": "decoder.final_layernorm.weight",
    "gpt_neox.final_layer_norm.weight": "decoder.final_layernorm.weight",
    "gpt_neox.final_layer_norm.bias": "decoder.final_layernorm.bias",
    "transformer.ln_f.weight": "decoder.final_layernorm.weight",
    "transformer.ln_f.bias": "decoder.final_layernorm.bias",
    "lm_head.weight": "output_layer.weight",
    "embed_out.weight": "output_layer.weight",
}


def in_our_terms(family, tensors):
    """Tensors of transformers' model, weights or gradients, under the names and in the layout of ours."""
    found = {OUTSIDE[key]: tensor for key, tensor in tensors.items() if key in OUTSIDE}
    for layer in range(LAYERS):
        for name, tensor in LAYER.get(family, of_llama)(f"layers.{layer}", tensors.get):
            if tensor is not None:
                found[f"decoder.layers.{layer}.{name}"] = tensor
    return found


def logprobs_and_gradients(model, logprobs):
    """The response tokens' log-probabilities, and the gradients of a weighted sum of them."""
    weights = torch.randn(len(logprobs), generator=torch.Generator().manual_seed(1))
    (logprobs * weights).sum().backward()
    return logprobs.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("config", "settings"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("recompute", [None, "full"])
def test_log_probabilities_and_gradients_are_those_of_transformers(single, config, settings, recompute):
    reference = theirs(config)
    logits = reference(torch.tensor([TOKENS])).logits[0, PROMPT - 1 : -1]
    targets = torch.tensor(TOKENS[PROMPT:])[:, None]
    expected, wanted = logprobs_and_gradients(reference, logits.log_softmax(-1).gather(1, targets)[:, 0])

    model = ours(single, settings, recompute_granularity=recompute)
    weights = in_our_terms(config.model_type, dict(reference.named_parameters()))
    assert weights.keys() == dict(model.named_parameters()).keys()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    group = Group(prompt=tuple(TOKENS[:PROMPT]), responses=(tuple(TOKENS[PROMPT:]),))
    actual, gradients = logprobs_and_gradients(model, model(pack_groups([group], shared_prefix=True)))

    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    for name, gradient in in_our_terms(config.model_type, wanted).items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
