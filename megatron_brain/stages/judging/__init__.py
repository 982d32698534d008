"""Comparison of answers by a language model over HTTP."""
