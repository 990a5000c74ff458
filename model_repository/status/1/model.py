from live_avatar.serving.triton_model import StatusModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
