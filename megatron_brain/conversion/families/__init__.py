"""Families of Hugging Face models, one file each: `FAMILY`, or `UNSUPPORTED` where our network cannot compute it."""
