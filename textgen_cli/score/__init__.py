"""The wing of `textgen score`."""
