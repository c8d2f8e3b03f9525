"""Finding good recipes; knows only a score function."""
