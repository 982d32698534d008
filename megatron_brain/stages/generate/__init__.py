"""Responses for a file of prompts."""
