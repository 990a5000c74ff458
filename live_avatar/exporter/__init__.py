"""From torch components to an artifacts folder: ONNX graphs, shared weights, FP8, TensorRT engines."""
