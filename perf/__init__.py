"""Measurements of speed, memory and accuracy, run from a checkout as `python -m perf.NAME`. Not installed."""
