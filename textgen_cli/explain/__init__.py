"""Why a model said that: what each part of its input did to its answer. Shared by generate and score."""
