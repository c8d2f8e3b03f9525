"""The samplers by name."""
