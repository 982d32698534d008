"""Hugging Face models in and out."""

from megatron_brain.conversion.registry import read_hf_architecture, read_hf_model
from megatron_brain.conversion.weights import export_hf, load_hf_weights

__all__ = ["export_hf", "load_hf_weights", "read_hf_architecture", "read_hf_model"]
