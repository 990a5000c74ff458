"""The networks and the sampler, with explicit state."""
