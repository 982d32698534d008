"""The brain stage: its rounds, the sources of their responses, and its loss."""
