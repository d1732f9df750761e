"""Benchmarks of the program as its users meet it: ratios against a peer measured in the same run."""
