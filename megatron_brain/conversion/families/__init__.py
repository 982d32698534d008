"""Families of Hugging Face models, one file each. `conversion.registry` lists them."""
