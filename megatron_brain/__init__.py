"""Post-training of megatron-core GPT models: supervised fine-tuning, reward models and BRAIn."""

__version__ = "0.1.0"
