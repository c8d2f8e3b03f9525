"""One runner for each task: rows and a model to predictions."""
