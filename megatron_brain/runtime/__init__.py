"""Processes, process groups, devices and seeds. Only this package knows that machines without CUDA exist."""
