"""Every tolerance of the tests, once. Absolute differences unless said."""

PORT = 1e-4  # ours against numbers of the official classes, float32
ROLLOUT = 2e-4  # the same after four steps and several blocks
INTERPOLATED_AUDIO = 2e-4  # the reference interpolates with float32 indices
FLOAT32 = 1e-5  # two orders of the same float32 arithmetic, values of size about 1
EXPORT = 1e-4  # a graph on ONNX Runtime against torch, float32, relative
PHASE = 5e-7  # a rotary phase at a position of up to 10^9: float64 angle, rounded to float32
STREAMED = 2e-5  # cached or streamed against all at once, float32, relative to the largest value
EXPORTED_STREAM = 2e-5  # latents of a stream on ONNX Runtime against torch, relative to the largest value
OTHER_LEVEL_SHARE = 1e-3  # part of its pixel values that may fall to the next level; 6e-4 measured on one processor

LEAST_PSNR_DB = 42.0
"""Of frames with the invisible mark to those without it."""
