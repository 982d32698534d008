"""The reward of a response: a weighted sum of reward models, functions of the user, and servers."""
