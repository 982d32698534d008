"""Processes, process groups, devices and seeds. Only this package knows that machines without CUDA exist."""

import warnings

# Of the libraries' own making, at every import and every checkpoint, and nothing a user could act on.
warnings.filterwarnings("ignore", message="Apex is not installed")
warnings.filterwarnings("ignore", message="Please use DTensor instead", category=FutureWarning)
