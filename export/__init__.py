"""From a preset's torch components to an artifacts folder: ONNX graphs, shared weights, a manifest.

Run as `live-avatar export` or, to check a folder against torch, as `python -m export.compare`.
"""
