from live_avatar.serving.triton_model import DiTStepModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
