"""Hugging Face models in and out."""

from megatron_brain.conversion.registry import read_hf_architecture, read_hf_model
from megatron_brain.conversion.weights import load_hf_weights

__all__ = ["load_hf_weights", "read_hf_architecture", "read_hf_model"]
