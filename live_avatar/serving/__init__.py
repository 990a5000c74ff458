"""The code of the Triton models and of the server. Only `triton_model` uses the Python API of Triton."""

LOG_MARK = " live-avatar "
"""Marks every log line that a stage writes."""
