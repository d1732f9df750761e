"""Words in, words out: plain Python on text, without a model."""
