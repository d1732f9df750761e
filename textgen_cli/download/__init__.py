"""The wing of textgen download: a model's name in, a checked folder out."""
