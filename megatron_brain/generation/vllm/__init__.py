"""Draws responses with `vllm serve` processes over HTTP, gives them weights, and proves which weights they have."""

from megatron_brain.generation.vllm.engine import VllmEngine

__all__ = ["VllmEngine"]
