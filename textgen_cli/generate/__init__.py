"""The wing of textgen generate: prompts in, chunks of text out."""
