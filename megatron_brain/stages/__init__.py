"""The stages of post-training, each a short story of what is its own."""
