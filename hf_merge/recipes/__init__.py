"""What to merge and how, as data."""
