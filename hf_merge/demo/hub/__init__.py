"""A local Hub that speaks HTTP to huggingface_hub and its friends, and that can misbehave on request."""
