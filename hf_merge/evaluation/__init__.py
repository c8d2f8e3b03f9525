"""From a model in memory to scores."""
