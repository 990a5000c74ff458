"""A drawn talking face as training data, and the ruler for its mouth. The stages of the paper are to follow.

Knows the core; nothing of the core knows it.
"""
