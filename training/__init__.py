"""The training of the paper: a drawn talking face as data, the tiny networks, and the two stages of the distillation.

Run from a checkout as `python -m training.run`; see training/README.md.
"""
