"""Merge fine-tunes of one base model, find the Pareto front of the merges, and publish any point of it."""
