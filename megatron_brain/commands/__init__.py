"""The tools. Each module is a command, `python -m megatron_brain.commands.NAME`, or `tools/NAME.py` in a checkout."""
