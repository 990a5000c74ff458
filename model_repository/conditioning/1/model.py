from live_avatar.serving.triton_model import ConditioningModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
