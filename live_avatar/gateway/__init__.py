"""The front door: the process that callers talk to, between the network and Triton."""
