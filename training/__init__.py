"""The paper's training at a small size: a drawn talking face as data, the tiny networks, two stages of distillation.

Run from a checkout as `python -m training.run`; see training/README.md.
"""
