from live_avatar.serving.triton_model import DenoiserModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
