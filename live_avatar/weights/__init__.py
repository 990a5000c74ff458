"""Checkpoint files read as named tensors: official, our own, adapters, FP8."""
