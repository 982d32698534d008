"""Gemma 2, which is refused: megatron-core's GPTModel does not compute it."""

from megatron_brain.conversion.family import UnsupportedFamily

UNSUPPORTED = UnsupportedFamily(
    name="Gemma 2",
    classes=("Gemma2ForCausalLM", "Gemma2ForSequenceClassification"),
    missing=(
        "soft-capping of attention scores (attn_logit_softcapping)",
        "soft-capping of logits (final_logit_softcapping)",
        "norms after attention and feed-forward",
        "RMSNorm with a weight around zero",
        "embeddings scaled by the square root of the hidden size",
        "windows in every second layer",
    ),
)
