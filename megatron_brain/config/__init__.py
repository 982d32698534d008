"""Typed configuration: dataclasses, one YAML file, command-line overrides, checks before anything starts."""
