from live_avatar.serving.triton_model import RollingSinkModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
