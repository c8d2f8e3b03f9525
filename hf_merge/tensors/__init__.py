"""Pure tensor maths that the merge methods share."""
