"""FP8: what a model remembers of it, weights kept in it, and its emulation without the hardware."""
