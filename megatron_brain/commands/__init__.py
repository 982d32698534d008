"""The tools: each module is a command, `python -m megatron_brain.commands.NAME`, and `tools/NAME.py` in a checkout."""
