"""Tokenizers, records, and the groups and packed batches made of them."""
