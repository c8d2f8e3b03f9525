"""The metrics shipped with hf_merge: each a true `evaluate.Metric` that needs no download."""
