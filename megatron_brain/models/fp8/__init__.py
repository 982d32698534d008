"""FP8: the state that layers keep for it, weights stored in it, and its emulation without the hardware."""
