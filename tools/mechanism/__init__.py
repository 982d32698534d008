"""Bias and variance of the gradient of a group, for the three baselines of BRAIn (tools/gradient_study.py)."""
