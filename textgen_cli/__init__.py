"""textgen: language models in the Unix toolbox."""

__version__ = "0.1.0"
