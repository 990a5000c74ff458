"""The front door: the one listener for callers, in a process of its own before Triton."""
