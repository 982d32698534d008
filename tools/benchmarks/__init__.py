"""Subjects of tools/benchmark.py and what they share."""
