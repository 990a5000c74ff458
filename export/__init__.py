"""Scripts beside `live-avatar export`: engines, comparison with torch, FP8 calibration, synthetic checkpoints."""
