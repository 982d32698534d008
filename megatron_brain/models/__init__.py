"""The networks: megatron-core GPT trunks with our attention, norm and heads."""
